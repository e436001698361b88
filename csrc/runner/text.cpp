#include "runner/text.h"

#include <algorithm>
#include <cstdio>

#include "runner/searcher.h"

namespace flowfast {
namespace {

// What Python's str.strip() takes off.
constexpr std::string_view kSpaces[] = {"\t",           "\n",           "\v",           "\f",           "\r",
                                        "\x1c",         "\x1d",         "\x1e",         "\x1f",         " ",
                                        "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
                                        "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
                                        "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
                                        "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

std::string text_of(double number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), number).ptr};
}

std::string_view trimmed(std::string_view text) {
  for (size_t before = text.size() + 1; text.size() < before;) {
    before = text.size();
    for (const std::string_view space : kSpaces) {
      if (text.starts_with(space)) text.remove_prefix(space.size());
      if (text.ends_with(space)) text.remove_suffix(space.size());
    }
  }
  return text;
}

std::string lowered(std::string_view text) {
  std::string found(text);
  for (char& c : found) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 'a' - 'A') : c;
  return found;
}

std::string quoted(std::string_view text) {
  size_t end = std::min<size_t>(text.size(), 100);
  while (end < text.size() && end > 0 && (text[end] & 0xc0) == 0x80) --end;
  return '"' + std::string(text.substr(0, end)) + (end < text.size() ? "..." : "") + '"';
}

std::string shown(std::string_view text) {
  size_t end = std::min<size_t>(text.size(), 60);
  while (end < text.size() && end > 0 && (text[end] & 0xc0) == 0x80) --end;
  const std::string_view part = text.substr(0, end);
  const char quote = part.find('\'') != part.npos && part.find('"') == part.npos ? '"' : '\'';
  std::string found(1, quote);
  for (const char c : part)
    if (c == '\n' || c == '\t' || c == '\\' || c == quote)
      (found += '\\') += c == '\n' ? 'n' : c == '\t' ? 't' : c;
    else
      found += static_cast<uint8_t>(c) < 0x20 ? '?' : c;
  return found + (end < text.size() ? "..." : "") + quote;
}

void append_utf8(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  text += static_cast<char>("\x00\xc0\xe0\xf0"[more] | static_cast<char>(code >> 6 * more));
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> 6 * i & 0x3f));
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

std::optional<std::string> fault_of(std::string_view prompt, bool empty) {
  const auto character = [&](size_t at) {  // its number
    const auto begins = [](char c) { return (c & 0xc0) != 0x80; };
    return std::to_string(1 + std::count_if(prompt.begin(), prompt.begin() + at, begins));
  };
  if (!empty && trimmed(prompt).empty()) return "it is empty";
  const size_t nul = prompt.find('\0');
  if (nul != prompt.npos) return "it has a NUL character (at " + character(nul) + ")";
  const std::optional<size_t> wrong = not_utf8(prompt);
  if (!wrong) return std::nullopt;
  const auto byte = [&](size_t i) { return *wrong + i < prompt.size() ? static_cast<uint8_t>(prompt[*wrong + i]) : 0; };
  if (byte(0) != 0xed || byte(1) < 0xa0) return "it is no UTF-8 from byte " + std::to_string(*wrong + 1) + " on";
  char code[5];
  std::snprintf(code, sizeof(code), "%04X", 0xd000u | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu));
  return "character " + character(*wrong) + " is half of a pair (U+" + code + "), no text: write it as UTF-8";
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
