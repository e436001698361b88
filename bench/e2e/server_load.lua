-- For wrk: a seed a request; counts what was sent and what came, and how long the images took in the server.
local threads = {}

function setup(thread)
  thread:set("number", #threads)
  table.insert(threads, thread)
end

function init(arguments)
  budget, statuses, milliseconds = arguments[1], {}, {}
  sent = number == 0 and -1 or 0  -- wrk asks the first thread for one request that it does not send
end

function request()
  sent = sent + 1
  local seed = number * 1000000 + sent
  local body = string.format('{"prompt": "three red circles and one blue square", "budget": %s, "seed": %d}', budget, seed)
  return wrk.format("POST", "/v1/images/generations", {["Content-Type"] = "application/json"}, body)
end

function response(status, headers, body)
  local key = tostring(status)
  statuses[key] = (statuses[key] or 0) + 1
  if status == 200 then
    table.insert(milliseconds, 1000 * tonumber(body:match('"total_s":([^,}]+)')))
  end
end

function done(summary, latency)
  local all, total, counts = {}, 0, {}
  for _, thread in ipairs(threads) do
    total = total + thread:get("sent")
    for status, count in pairs(thread:get("statuses")) do counts[status] = (counts[status] or 0) + count end
    for _, value in ipairs(thread:get("milliseconds")) do table.insert(all, value) end
  end
  table.sort(all)
  local share = function(q) return all[math.max(1, math.ceil(q * #all))] or 0 end
  local errors = summary.errors
  io.write(string.format('{"seconds": %.3f, "sent": %d, "images_ms": {"p50": %.1f, "p99": %.1f}, ',
    summary.duration / 1e6, total, share(0.5), share(0.99)))
  io.write(string.format('"all_ms": {"p50": %.1f, "p99": %.1f}, ', latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
  io.write(string.format('"errors": {"connect": %d, "read": %d, "write": %d, "timeout": %d}, "statuses": {',
    errors.connect, errors.read, errors.write, errors.timeout))
  local separator = ""
  for status, count in pairs(counts) do
    io.write(string.format('%s"%s": %d', separator, status, count))
    separator = ", "
  end
  io.write("}}\n")
end
