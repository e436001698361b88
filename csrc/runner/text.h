// Texts, and numbers in them: the same in every locale of the host program.
#pragma once

#include <charconv>
#include <optional>
#include <string>
#include <string_view>

namespace flowfast {

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

// Without the white space of ASCII at its ends.
std::string_view trimmed(std::string_view text);

// In quotes, for an error; a long one is cut between two characters.
std::string quoted(std::string_view text);

// Where the text stops being UTF-8; nothing where it is.
std::optional<size_t> not_utf8(std::string_view text);

}  // namespace flowfast
