// JSON as Python's json module reads it (NaN and Infinity are numbers), for lists of prompts: depth and digits are
// bounded, and a name that comes twice in an object is an error.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace flowfast {

struct Json {
  enum Kind { kNull, kBool, kNumber, kText, kList, kObject };

  Kind kind = kNull;
  std::string text;           // of a text; a number or a truth value as it stands there
  std::vector<Json> entries;  // of a list
  std::vector<std::pair<std::string, Json>> members;

  const Json* find(std::string_view name) const;  // of an object; null: it has none of that name
};

struct JsonError : std::runtime_error {
  JsonError(const std::string& reason, size_t line) : std::runtime_error(reason), line(line) {}
  size_t line;  // of the text, from 1 on; 0: not known
};

// The one value that the text (UTF-8) is. Half of a surrogate pair becomes 3 bytes that are no UTF-8. Throws JsonError.
Json parse_json(std::string_view text);

}  // namespace flowfast
