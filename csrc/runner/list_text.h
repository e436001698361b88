// The text of a list of prompts, from its bytes.
#pragma once

#include <string>

namespace flowfast {

// The file at `place` ("-": standard input) as UTF-8 with LF as line end and without byte-order marks. name: in errors.
// Throws OptionError where it cannot be read, PromptError where it is no text in UTF-8, or UTF-16 with a mark.
std::string list_text(const std::string& place, const std::string& name);

}  // namespace flowfast
