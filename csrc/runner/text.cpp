#include "runner/text.h"

#include <algorithm>
#include <cstdint>

#include "runner/searcher.h"

namespace flowfast {
namespace {

constexpr std::string_view kSpace = " \t\n\r\v\f";
constexpr size_t kMostDigits = 4300;  // of a whole number: Python's own bound

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

std::string text_of(double number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), number).ptr};
}

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

std::string quoted(std::string_view text) {
  size_t end = std::min<size_t>(text.size(), 100);
  while (end < text.size() && end > 0 && (text[end] & 0xc0) == 0x80) --end;
  return '"' + std::string(text.substr(0, end)) + (end < text.size() ? "..." : "") + '"';
}

std::optional<size_t> not_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const auto byte = [&](size_t i) { return at + i < text.size() ? static_cast<uint8_t>(text[at + i]) : 0u; };
    const uint32_t lead = byte(0);
    const size_t more = lead < 0x80 ? 0 : lead < 0xc2 ? 4 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : lead < 0xf5 ? 3 : 4;
    if (more == 4) return at;
    uint32_t code = more == 0 ? lead : lead & (0x3f >> more);
    for (size_t i = 1; i <= more; ++i) {
      if ((byte(i) & 0xc0) != 0x80) return at;
      code = code << 6 | (byte(i) & 0x3f);
    }
    if ((more == 2 && code < 0x800) || (more == 3 && code < 0x10000) || code > 0x10ffff ||
        (code >= 0xd800 && code < 0xe000))
      return at;
    at += more + 1;
  }
  return std::nullopt;
}

Seed::Seed(std::string_view text) {
  std::string_view rest = trimmed(text);
  const bool minus = rest.starts_with('-');
  if (minus || rest.starts_with('+')) rest.remove_prefix(1);
  std::string digits;
  bool sound = !rest.empty() && rest.back() != '_';
  for (char before = '_'; const char c : rest) {
    sound = sound && (is_digit(c) || (c == '_' && before != '_'));  // one between two digits, as Python takes it
    if (c != '_') digits += c;
    before = c;
  }
  if (!sound || digits.size() > kMostDigits)
    throw OptionError("a seed must be a whole number of up to " + std::to_string(kMostDigits) + " digits, got " +
                      quoted(text));
  digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size() - 1));  // "007"
  digits_ = (minus && digits != "0" ? "-" : "") + digits;
}

}  // namespace flowfast
