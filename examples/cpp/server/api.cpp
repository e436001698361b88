#include "api.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <limits>
#include <optional>

#include <boost/json/src.hpp>  // all of Boost.JSON: nothing to link

namespace json = boost::json;

namespace {

constexpr std::array kFields = {"prompt",          "n",     "seed",            "budget", "guidance",
                                "negative_prompt", "model", "response_format", "user"};

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

int64_t integer(const json::object& fields, const std::string& name, int64_t otherwise, int64_t least, int64_t most) {
  const json::value* value = find(fields, name);
  if (!value) return otherwise;
  if (!value->is_int64() || value->as_int64() < least || value->as_int64() > most)
    refuse(name, "a whole number from " + std::to_string(least) + " to " + std::to_string(most), *value);
  return value->as_int64();
}

std::optional<double> number(const json::object& fields, const std::string& name) {
  const json::value* value = find(fields, name);
  if (!value) return std::nullopt;
  if (!value->is_number()) refuse(name, "a number", *value);
  return value->to_number<double>();
}

void expect(const json::object& fields, const std::string& name, const std::string& only) {
  const std::optional<std::string> value = text(fields, name);
  if (value && *value != only) refuse(name, '"' + only + '"', *find(fields, name));
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
  error["type"] = status < 500 ? "invalid_request_error" : "server_error";
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
  expect(fields, "model", limits.model);
  expect(fields, "response_format", "b64_json");
  text(fields, "user");
  flowfast::Request request{
      .prompt = *prompt,
      .budget = integer(fields, "budget", limits.budget, 1, kMost),
      .seed = integer(fields, "seed", 0, 0, kMost),
      .guidance = number(fields, "guidance"),
      .negative_prompt = text(fields, "negative_prompt"),
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
                                  {"reward", result.reward()},
                                  {"nfe", result.nfe},
                                  {"seed", searches[i].seed},
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
  } catch (const std::exception& failure) {
    return error_body(500, failure.what());
  }
}
