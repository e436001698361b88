#include "api.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <ctime>
#include <initializer_list>
#include <limits>
#include <optional>

#include <boost/json/src.hpp>  // all of Boost.JSON: nothing to link

namespace json = boost::json;

namespace {

// The last two lines are what clients of OpenAI's API send and what means nothing here.
constexpr std::array kFields = {"prompt",
                                "n",
                                "seed",
                                "budget",
                                "guidance",
                                "negative_prompt",
                                "priority",
                                "deadline",
                                "model",
                                "size",
                                "response_format",
                                "output_format",
                                "stream",
                                "quality",
                                "style",
                                "background",
                                "moderation",
                                "user",
                                "output_compression",
                                "partial_images"};
constexpr int64_t kExact = int64_t{1} << 53;  // up to here a number of JSON is exact wherever it is read

std::string valid_fields() {
  std::string names;
  for (const char* field : kFields) names += (names.empty() ? "" : ", ") + std::string(field);
  return names;
}

[[noreturn]] void refuse(const std::string& field, const std::string& expected, const json::value& got) {
  std::string shown = json::serialize(got);
  if (shown.size() > 60) {
    size_t end = 60;
    while ((shown[end] & 0xc0) == 0x80) --end;  // not in the midst of a character
    shown = shown.substr(0, end) + "...";
  }
  throw Refusal(400, field + " must be " + expected + ", got " + shown, field);
}

// A field's value; null means the same as none.
const json::value* find(const json::object& fields, const std::string& name) {
  const json::value* value = fields.if_contains(name);
  return value && !value->is_null() ? value : nullptr;
}

std::optional<std::string> text(const json::object& fields, const std::string& name) {
  const json::value* value = find(fields, name);
  if (!value) return std::nullopt;
  if (!value->is_string()) refuse(name, "a string", *value);
  return std::string(value->as_string());
}

// 3, and 3.0, which some clients send; nothing for another number.
std::optional<int64_t> whole(const json::value& value) {
  if (value.is_int64()) return value.as_int64();
  if (!value.is_double() || !(std::abs(value.as_double()) <= kExact)) return std::nullopt;
  const auto integer = static_cast<int64_t>(value.as_double());
  return static_cast<double>(integer) == value.as_double() ? std::optional(integer) : std::nullopt;
}

int64_t integer(const json::object& fields, const std::string& name, int64_t otherwise, int64_t least, int64_t most) {
  const json::value* value = find(fields, name);
  if (!value) return otherwise;
  const std::optional<int64_t> found = whole(*value);
  if (!found || *found < least || *found > most)
    refuse(name, "a whole number from " + std::to_string(least) + " to " + std::to_string(most), *value);
  return *found;
}

// Any whole number; as a text where a number of JSON does not hold it.
flowfast::Seed seed(const json::object& fields) {
  const json::value* value = find(fields, "seed");
  if (!value) return {};
  try {
    if (value->is_string()) return flowfast::Seed(std::string_view(value->as_string()));
  } catch (const flowfast::OptionError& error) {
    throw Refusal(400, error.what(), "seed");
  }
  if (value->is_uint64()) return value->as_uint64();
  const std::optional<int64_t> found = whole(*value);
  if (!found) refuse("seed", "a whole number, or its digits as a text where it has more than 64 bits", *value);
  return *found;
}

// JSON knows no infinity: "inf", "-inf".
json::value json_of(float reward) {
  return std::isinf(reward) ? json::value(reward > 0 ? "inf" : "-inf") : json::value(reward);
}

json::value json_of(const flowfast::Seed& seed) {
  int64_t number = 0;
  const std::string& digits = seed.digits();
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (error == std::errc() && number >= -kExact && number <= kExact) return number;
  return json::string(digits);
}

std::optional<double> number(const json::object& fields, const std::string& name) {
  const json::value* value = find(fields, name);
  if (!value) return std::nullopt;
  if (!value->is_number()) refuse(name, "a number", *value);
  return value->to_number<double>();
}

// A text that may say nothing but one of these.
void expect(const json::object& fields, const std::string& name, std::initializer_list<std::string> choices) {
  const std::optional<std::string> value = text(fields, name);
  if (!value || std::find(choices.begin(), choices.end(), *value) != choices.end()) return;
  std::string said;
  for (const std::string& choice : choices) said += (said.empty() ? "" : " or ") + ('"' + choice + '"');
  refuse(name, said, *find(fields, name));
}

std::string base64(const std::string& bytes) {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t j = i; j < i + 3; ++j) group = group << 8 | (j < bytes.size() ? static_cast<uint8_t>(bytes[j]) : 0);
    for (int digit = 0; digit < 4; ++digit)
      out += i + digit <= bytes.size() ? kDigits[group >> (18 - 6 * digit) & 63] : '=';
  }
  return out;
}

Answer error_body(unsigned status, const std::string& message, const std::string& field = "") {
  json::object error;
  error["message"] = message;
  error["type"] = status < 500 && status != 429 ? "invalid_request_error" : "server_error";
  error["param"] = field.empty() ? json::value(nullptr) : json::value(field);
  error["code"] = nullptr;
  return {.status = status, .body = json::serialize(json::object{{"error", std::move(error)}})};
}

}  // namespace

std::vector<flowfast::Request> read_request(const std::string& body, const Limits& limits) {
  boost::system::error_code error;
  const json::value document = json::parse(body, error);
  if (error) throw Refusal(400, "the body must be JSON: " + error.message());
  if (!document.is_object()) throw Refusal(400, "the body must be a JSON object with any of " + valid_fields());
  const json::object& fields = document.as_object();
  for (const auto& field : fields)
    if (std::find(kFields.begin(), kFields.end(), field.key()) == kFields.end())
      throw Refusal(400, "unknown field " + json::serialize(json::value(field.key())) + ": choose of " + valid_fields(),
                    std::string(field.key()));

  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const std::optional<std::string> prompt = text(fields, "prompt");
  if (!prompt) throw Refusal(400, "prompt is missing: a string that says what to draw", "prompt");
  if (prompt->find_first_not_of(" \t\n\r\v\f") == std::string::npos)
    throw Refusal(400, "prompt is empty: write what the picture shows", "prompt");
  expect(fields, "model", {limits.model});
  if (limits.size.empty())
    expect(fields, "size", {"auto"});
  else
    expect(fields, "size", {"auto", limits.size});
  expect(fields, "response_format", {"b64_json"});
  expect(fields, "output_format", {"png"});
  if (const json::value* stream = find(fields, "stream"); stream && *stream != json::value(false))
    refuse("stream", "false: this server does not stream", *stream);
  for (const char* name : {"quality", "style", "background", "moderation", "user"}) text(fields, name);
  for (const char* name : {"output_compression", "partial_images"}) number(fields, name);
  flowfast::Request request{
      .prompt = *prompt,
      .budget = integer(fields, "budget", limits.budget, 1, kMost),
      .seed = seed(fields),
      .guidance = number(fields, "guidance"),
      .negative_prompt = text(fields, "negative_prompt"),
      .priority = static_cast<int>(integer(fields, "priority", 0, -1000, 1000)),
      .deadline = number(fields, "deadline"),
  };
  std::vector<flowfast::Request> searches(integer(fields, "n", 1, 1, limits.most_images), request);
  for (size_t i = 0; i < searches.size(); ++i) searches[i].repeat = static_cast<int64_t>(i);
  return searches;
}

Answer collect(const std::vector<flowfast::Request>& searches, const std::vector<flowfast::Handle>& handles) {
  json::array data;
  int64_t nfe = 0;
  std::exception_ptr error;
  for (size_t i = 0; i < handles.size(); ++i) try {
      const flowfast::Result result = handles[i].get();
      nfe += result.nfe;
      data.push_back(json::object{{"b64_json", base64(result.image().png())},
                                  {"reward", json_of(result.reward())},
                                  {"nfe", result.nfe},
                                  {"seed", json_of(searches[i].seed)},
                                  {"repeat", searches[i].repeat},
                                  {"seconds", result.seconds},
                                  {"seconds_waited", result.seconds_waited}});
    } catch (...) {
      if (!error) error = std::current_exception();
      for (const flowfast::Handle& handle : handles) handle.cancel();
    }
  if (error) return error_answer(error);
  const json::object answer{{"created", static_cast<int64_t>(std::time(nullptr))}, {"data", std::move(data)}};
  return {.status = 200, .body = json::serialize(answer), .nfe = nfe};
}

Answer error_answer(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const Refusal& refusal) {
    return error_body(refusal.status, refusal.what(), refusal.field);
  } catch (const flowfast::PromptError& refusal) {
    return error_body(400, refusal.what(), "prompt");
  } catch (const flowfast::BudgetError& refusal) {
    return error_body(400, refusal.what(), "budget");
  } catch (const flowfast::OptionError& refusal) {
    return error_body(400, refusal.what());
  } catch (const flowfast::QueueFullError& refusal) {
    return error_body(429, refusal.what());
  } catch (const flowfast::DeadlineError& refusal) {
    return error_body(504, refusal.what(), "deadline");
  } catch (const std::exception& failure) {
    return error_body(500, failure.what());
  }
}
