#include "api.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <ctime>
#include <limits>
#include <optional>

#include <boost/json/src.hpp>  // all of Boost.JSON: nothing to link

namespace json = boost::json;

namespace {

// clang-format off
constexpr std::array kFields = {
    "prompt", "n", "seed", "budget", "guidance", "negative_prompt", "priority", "deadline", "model", "size", "quality",
    "response_format", "output_format", "output_compression", "stream", "partial_images",
    "style", "background", "moderation", "user", "safety_identifier"};  // these mean nothing here
// clang-format on
constexpr int64_t kExact = int64_t{1} << 53;  // up to here a number of JSON is exact wherever it is read

std::string valid_fields() {
  std::string names;
  for (const char* field : kFields) names += (names.empty() ? "" : ", ") + std::string(field);
  return names;
}

[[noreturn]] void refuse(const std::string& field, const std::string& expected, const json::value& got,
                         unsigned status = 400) {
  std::string shown = json::serialize(got);
  if (shown.size() > 60) {
    size_t end = 60;
    while ((shown[end] & 0xc0) == 0x80) --end;  // not in the midst of a character
    shown = shown.substr(0, end) + "...";
  }
  throw Refusal(status, field + " must be " + expected + ", got " + shown, field);
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

bool boolean(const json::object& fields, const std::string& name) {
  const json::value* value = find(fields, name);
  if (value && !value->is_bool()) refuse(name, "true or false", *value);
  return value && value->as_bool();
}

// A text that says one of these, the first where there is none.
std::string choice(const json::object& fields, const std::string& name, const std::vector<std::string>& choices,
                   unsigned status = 400) {
  const std::optional<std::string> value = text(fields, name);
  if (!value || std::find(choices.begin(), choices.end(), *value) != choices.end()) return value.value_or(choices[0]);
  std::string said;
  for (const std::string& choice : choices) said += (said.empty() ? "" : " or ") + ('"' + choice + '"');
  refuse(name, said, *find(fields, name), status);
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

json::object fields_of(const std::string& body) {
  boost::system::error_code error;
  const json::value document = json::parse(body, error);
  if (error) throw Refusal(400, "the body must be JSON: " + error.message());
  if (!document.is_object()) throw Refusal(400, "the body must be a JSON object with any of " + valid_fields());
  for (const auto& field : document.as_object())
    if (std::find(kFields.begin(), kFields.end(), field.key()) == kFields.end())
      throw Refusal(400, "unknown field " + json::serialize(json::value(field.key())) + ": choose of " + valid_fields(),
                    std::string(field.key()));
  return document.as_object();
}

std::string size_of(const flowfast::Image& image) {
  return std::to_string(image.width) + "x" + std::to_string(image.height);
}

// As OpenAI counts: an NFE is an output token.
json::object usage_of(int64_t nfe) {
  const json::object none{{"image_tokens", 0}, {"text_tokens", 0}}, spent{{"image_tokens", nfe}, {"text_tokens", 0}};
  return {{"input_tokens", 0},
          {"input_tokens_details", none},
          {"output_tokens", nfe},
          {"output_tokens_details", spent},
          {"total_tokens", nfe}};
}

std::string event(const json::object& data) {
  return "event: " + std::string(data.at("type").as_string()) + "\ndata: " + json::serialize(data) + "\n\n";
}

// What all answers and events with images say.
json::object about(const Asked& asked, const std::string& size) {
  return {{"background", "opaque"}, {"output_format", "png"}, {"quality", asked.quality}, {"size", size}};
}

json::object image_event(const char* type, const Asked& asked, const flowfast::Image& image) {
  json::object data = about(asked, size_of(image));
  data["type"] = std::string("image_generation.") + type;
  data["created_at"] = static_cast<int64_t>(std::time(nullptr));
  return data;
}

}  // namespace

Asked read_request(const std::string& body, const Offer& offer) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const json::object fields = fields_of(body);
  const std::optional<std::string> prompt = text(fields, "prompt");
  if (!prompt) throw Refusal(400, "prompt is missing: a string that says what to draw", "prompt");
  if (prompt->find_first_not_of(" \t\n\r\v\f") == std::string::npos)
    throw Refusal(400, "prompt is empty: write what the picture shows", "prompt");
  choice(fields, "model", {offer.model}, 404);
  std::vector<std::string> sizes = {"auto"}, qualities;
  if (!offer.size.empty()) sizes.push_back(offer.size);
  for (const auto& [name, nfe] : offer.quality) qualities.push_back(name);  // "auto" is the first
  choice(fields, "size", sizes);
  choice(fields, "response_format", {"b64_json"});
  choice(fields, "output_format", {"png"});
  integer(fields, "output_compression", 100, 0, 100);
  for (const char* name : {"style", "background", "moderation", "user", "safety_identifier"}) text(fields, name);

  Asked asked{.quality = choice(fields, "quality", qualities),
              .stream = boolean(fields, "stream"),
              .partial_images = integer(fields, "partial_images", 0, 0, 3)};
  const flowfast::Request request{
      .prompt = *prompt,
      .budget = integer(fields, "budget", offer.quality.at(asked.quality), 1, kMost),
      .seed = seed(fields),
      .guidance = number(fields, "guidance"),
      .negative_prompt = text(fields, "negative_prompt"),
      .priority = static_cast<int>(integer(fields, "priority", 0, -1000, 1000)),
      .deadline = number(fields, "deadline"),
  };
  asked.searches.assign(integer(fields, "n", 1, 1, offer.most_images), request);
  for (size_t i = 0; i < asked.searches.size(); ++i) asked.searches[i].repeat = static_cast<int64_t>(i);
  return asked;
}

Answer collect(const Asked& asked, const std::vector<flowfast::Handle>& handles, const Offer& offer,
               const std::function<void(std::string)>& tell) {
  json::array data;
  int64_t nfe = 0;
  std::string size;
  std::exception_ptr error;
  for (size_t i = 0; i < handles.size(); ++i) try {
      const flowfast::Result result = handles[i].get();
      const flowfast::Request& search = asked.searches[i];
      nfe += result.nfe, size = size_of(result.image());
      json::object entry{{"b64_json", base64(result.image().png())}};
      entry["flowfast"] = json::object{{"reward", json_of(result.reward())},
                                       {"nfe", result.nfe},
                                       {"budget", search.budget},
                                       {"reward_calls", result.reward_calls},
                                       {"method", offer.method},
                                       {"seed", json_of(search.seed)},
                                       {"repeat", search.repeat},
                                       {"micro_batch", offer.micro_batch},
                                       {"stopped", result.cuts.empty() ? "budget" : "deadline"},
                                       {"queue_s", result.seconds_waited},
                                       {"total_s", result.seconds_waited + result.seconds},
                                       {"index", i}};
      if (asked.stream) {
        json::object completed = image_event("completed", asked, result.image());
        completed.insert(entry.begin(), entry.end());
        completed["usage"] = usage_of(result.nfe);
        tell(event(completed));
      } else {
        data.push_back(std::move(entry));
      }
    } catch (...) {
      if (!error) error = std::current_exception();
      for (const flowfast::Handle& handle : handles) handle.cancel();
    }
  if (error) return error_answer(error);
  json::object answer = about(asked, size);
  answer["created"] = static_cast<int64_t>(std::time(nullptr));
  answer["data"] = std::move(data);
  answer["usage"] = usage_of(nfe);
  return {.status = 200, .body = json::serialize(answer), .nfe = nfe};
}

std::string Looks::due(const flowfast::Progress& now, const Asked& asked, const Offer& offer) {
  for (const flowfast::Candidate& next : now.candidates) {
    if (std::isnan(next.reward)) continue;
    const int64_t further = best_ ? next.step.transition - best_->step.transition : 1;
    if (further > 0 || (further == 0 && next.reward > best_->reward)) best_ = next;
  }
  const int64_t passed = std::min(asked.partial_images, now.nfe * (asked.partial_images + 1) / now.budget);
  if (!best_ || passed <= passed_) return "";
  passed_ = passed;
  const bool finished = best_->step.transition + 1 == offer.transitions;
  json::object data = image_event("partial_image", asked, best_->image);
  data["b64_json"] = base64(best_->image.png());
  data["partial_image_index"] = sent_++;
  data["flowfast"] = json::object{{"index", index_},
                                  {"nfe", now.nfe},
                                  {"budget", now.budget},
                                  {"best_reward", finished ? json_of(best_->reward) : json::value(nullptr)}};
  return event(data);
}

Answer models(const Offer& offer, const std::string& name, int64_t created) {
  json::object model{{"id", offer.model}, {"object", "model"}, {"created", created}, {"owned_by", "flowfast"}};
  if (name == offer.model) return {.body = json::serialize(model)};
  if (!name.empty()) return error_body(404, "model must be \"" + offer.model + "\": there is no other", "model");
  return {.body = json::serialize(json::object{{"object", "list"}, {"data", json::array{std::move(model)}}})};
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
  } catch (const flowfast::OptionError& refusal) {  // what read_request leaves to the archive
    const std::string why = refusal.what();
    const auto names = [&](const char* field) { return why.find(field) != std::string::npos; };
    return error_body(400, why, names("deadline") ? "deadline" : names("guidance") ? "guidance" : "");
  } catch (const flowfast::QueueFullError& refusal) {
    return error_body(429, refusal.what());
  } catch (const flowfast::DeadlineError& refusal) {
    return error_body(504, refusal.what(), "deadline");
  } catch (const std::exception& failure) {
    return error_body(500, failure.what());
  }
}
