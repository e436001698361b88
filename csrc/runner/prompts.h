// Lists of prompts: the same kinds, read by the same rules as flowfast/prompts/lists.py, where they are written down.
// tests/prompt_lists.json has cases that both are held to. Of the fields beside a prompt only its seed is read here.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runner/searcher.h"

namespace flowfast {

struct Listed {
  std::string prompt;
  std::optional<Seed> seed = std::nullopt;  // of its own noise, instead of the call's
};

// The prompts of a file, a folder, or "-", standard input. column: where they stand, of a table or of objects.
// Throws OptionError where it cannot be read or has no such column, PromptError where it is no list of prompts.
std::vector<Listed> read_prompts(const std::string& place, const std::optional<std::string>& column = std::nullopt);

}  // namespace flowfast
