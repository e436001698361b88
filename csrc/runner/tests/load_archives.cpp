// Loads each file that stdin names, a line each, in a child process, and says on stdout how that ended:
// "loaded", "refused: what the ArchiveError says", or, as it must never end, "failed: ...".
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <iostream>
#include <string>

#include "runner/searcher.h"

namespace {

constexpr unsigned kSeconds = 60;  // then it hangs

// The child's: writes the verdict and ends without destructors, which are the parent's.
[[noreturn]] void load(const std::string& path, int out) {
  alarm(kSeconds);
  std::string verdict;
  try {
    flowfast::Searcher searcher(path, {.threads = 1});
    verdict = "loaded";
  } catch (const flowfast::ArchiveError& error) {
    verdict = std::string("refused: ") + error.what();
  } catch (const std::exception& error) {
    verdict = std::string("failed: not an ArchiveError: ") + error.what();
  }
  std::replace(verdict.begin(), verdict.end(), '\n', ' ');
  verdict.resize(std::min<size_t>(verdict.size(), 4000));  // a pipe takes so much without a reader
  _exit(write(out, verdict.data(), verdict.size()) == static_cast<ssize_t>(verdict.size()) ? 0 : 1);
}

std::string verdict_on(const std::string& path) {
  int ends[2];
  if (pipe(ends) != 0) return "failed: no pipe";
  const pid_t child = fork();
  if (child < 0) return "failed: no child";
  if (child == 0) load(path, ends[1]);
  close(ends[1]);
  std::string verdict(4096, '\0');
  const ssize_t count = read(ends[0], verdict.data(), verdict.size());
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) return "failed: signal " + std::to_string(WTERMSIG(status));
  if (status != 0 || count <= 0) return "failed: no verdict";
  verdict.resize(static_cast<size_t>(count));
  return verdict;
}

}  // namespace

int main() {
  for (std::string path; std::getline(std::cin, path);) std::cout << verdict_on(path) << std::endl;
  return 0;
}
