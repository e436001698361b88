#include "runner/json.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "runner/text.h"

namespace flowfast {
namespace {

constexpr int kDepth = 900;

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  Json whole() {
    Json found = value(0);
    space();
    if (at_ < text_.size()) fail("more after the value");
    return found;
  }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    const size_t end = std::min(at_, text_.size());
    throw JsonError(reason, static_cast<size_t>(std::count(text_.begin(), text_.begin() + end, '\n')) + 1);
  }

  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool take(std::string_view word) {
    if (!text_.substr(at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }
  size_t digits() {
    const size_t start = at_;
    while (next() >= '0' && next() <= '9') ++at_;
    return at_ - start;
  }

  Json value(int depth) {
    if (depth > kDepth) throw JsonError("nested too deep", 0);
    space();
    switch (next()) {
      case '{':
        return object(depth);
      case '[':
        return list(depth);
      case '"':
        return {Json::kText, string(), {}, {}};
    }
    for (const auto& [word, kind] : {std::pair("null", Json::kNull),
                                     {"true", Json::kBool},
                                     {"false", Json::kBool},
                                     {"NaN", Json::kNumber},
                                     {"Infinity", Json::kNumber},
                                     {"-Infinity", Json::kNumber}})
      if (take(word)) return {kind, word, {}, {}};
    return number();
  }

  Json object(int depth) {
    Json found{Json::kObject, "", {}, {}};
    ++at_;
    space();
    if (take("}")) return found;
    do {
      space();
      if (next() != '"') fail("a name in double quotes is missing");
      std::string name = string();
      space();
      if (!take(":")) fail("':' is missing");
      found.members.emplace_back(std::move(name), value(depth + 1));
      space();
    } while (take(","));
    if (!take("}")) fail("',' or '}' is missing");
    std::vector<std::string_view> names;
    for (const auto& member : found.members) names.push_back(member.first);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) throw JsonError(shown(*twice) + " stands there twice", 0);
    return found;
  }

  Json list(int depth) {
    Json found{Json::kList, "", {}, {}};
    ++at_;
    space();
    if (take("]")) return found;
    do {
      found.entries.push_back(value(depth + 1));
      space();
    } while (take(","));
    if (!take("]")) fail("',' or ']' is missing");
    return found;
  }

  Json number() {
    const size_t start = at_;
    take("-");
    const size_t first = at_, count = digits();
    if (count == 0 || (count > 1 && text_[first] == '0')) fail("no value");
    if (count > kMostDigits) throw JsonError("a number has too many digits", 0);
    for (const std::string_view& part : {std::string_view("."), std::string_view("eE")}) {
      const size_t before = at_;
      if (part.find(next()) == std::string_view::npos || at_ == text_.size()) continue;
      ++at_;
      if (part != "." && (next() == '+' || next() == '-')) ++at_;
      if (digits() == 0) at_ = before;
    }
    return {Json::kNumber, std::string(text_.substr(start, at_ - start)), {}, {}};
  }

  std::string string() {
    std::string found;
    ++at_;
    while (next() != '"') {
      if (at_ >= text_.size()) fail("a text does not end");
      if (static_cast<uint8_t>(next()) < 0x20) fail("a control character in a text");
      if (next() != '\\') {
        found += text_[at_++];
        continue;
      }
      ++at_;
      constexpr std::string_view kShort = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
      const size_t known = at_ < text_.size() ? kShort.find(next()) : std::string_view::npos;
      if (known != std::string_view::npos)
        found += kMeant[known], ++at_;
      else if (next() == 'u')
        append_utf8(found, unicode());
      else
        fail("a wrong escape in a text");
    }
    ++at_;
    return found;
  }

  uint32_t unicode() {
    const uint32_t first = code().value_or(0);
    const size_t after = at_;
    if (first >= 0xd800 && first < 0xdc00 && text_.substr(at_).starts_with("\\u")) {
      ++at_;
      const uint32_t second = code().value_or(0);
      if (second >= 0xdc00 && second < 0xe000) return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
      at_ = after;
    }
    return first;
  }

  std::optional<uint32_t> code() {  // of "uXXXX"
    uint32_t found = 0;
    const std::string_view four = text_.substr(std::min(text_.size(), at_ + 1), 4);
    const auto [end, error] = std::from_chars(four.data(), four.data() + four.size(), found, 16);
    if (four.size() < 4 || error != std::errc() || end != four.data() + 4) fail("a wrong escape in a text");
    at_ += 5;
    return found;
  }

  const std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& member : members)
    if (member.first == name) return &member.second;
  return nullptr;
}

Json parse_json(std::string_view text) { return Reader(text).whole(); }

}  // namespace flowfast
