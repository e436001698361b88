// Texts, and numbers in them: the same in every locale of the host program.
#pragma once

#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace flowfast {

constexpr size_t kMostDigits = 4300;  // of a whole number: Python's own bound

// The number that all of the text is; nothing where it is something else, or too large.
template <class Number>
std::optional<Number> number_in(std::string_view text) {
  Number number{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  return error == std::errc() && stop == end ? std::optional(number) : std::nullopt;
}

// The shortest text that reads back as the same number.
std::string text_of(double number);

// Without white space at its ends, as Python's str.strip() has it.
std::string_view trimmed(std::string_view text);

// The letters of ASCII as small ones.
std::string lowered(std::string_view text);

// In quotes, for an error; a long one is cut between two characters. `shown` has Python's quotes and escapes.
std::string quoted(std::string_view text);
std::string shown(std::string_view text);

void append_utf8(std::string& text, uint32_t code);

// Where the text stops being UTF-8; nothing where it is.
std::optional<size_t> not_utf8(std::string_view text);

// Why a prompt cannot be drawn, as flowfast/prompts/fields.py says it; nothing: it can. Where `empty`, also without any text.
std::optional<std::string> fault_of(std::string_view prompt, bool empty = false);

}  // namespace flowfast
