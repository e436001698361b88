// flowfast_list_prompts PLACE [COLUMN]: the prompts of a list, a line of JSON each: [PROMPT] or [PROMPT, SEED], both as
// texts; or what is wrong with it, and exit code 2. tests/runner holds it to the cases of tests/prompt_lists.json.
#include <cstdio>

#include "runner/prompts.h"

namespace {

void print(const std::string& text) {
  std::putchar('"');
  for (const char c : text)
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 0x20)
      std::printf("\\u%04x", static_cast<unsigned char>(c));
    else
      std::putchar(c);
  std::putchar('"');
}

}  // namespace

int main(int argc, char** argv) try {
  const auto column = argc > 2 ? std::optional<std::string>(argv[2]) : std::nullopt;
  for (const flowfast::Listed& listed : flowfast::read_prompts(argv[1], column)) {
    std::putchar('[');
    print(listed.prompt);
    if (listed.seed) std::fputs(", ", stdout), print(listed.seed->digits());
    std::puts("]");
  }
  return 0;
} catch (const flowfast::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
