// Torch-free tests of csrc/core, csrc/cpu/simd_*.cpp and the thread bodies of csrc/cuda: `make sanitize`. Arguments: the
// parts to run (core, round, simd, threads, rounds); none: all.
#include <algorithm>
#include <string_view>

#include "tests/check.h"

int main(int count, char** names) {
  const auto wanted = [&](std::string_view part) {
    return count == 1 || std::find(names + 1, names + count, part) != names + count;
  };
  if (wanted("core")) flowfast::test_core();
  if (wanted("round")) flowfast::test_round();
  if (wanted("simd")) flowfast::test_simd();
  if (wanted("threads")) flowfast::test_cuda_threads();
  if (wanted("rounds")) flowfast::test_cuda_rounds();
  if (flowfast::failures > 0) {
    std::printf("%d checks failed\n", flowfast::failures);
    return 1;
  }
  std::printf("all checks passed\n");
  return 0;
}
