// Torch-free tests of csrc/core, csrc/cpu/simd_*.cpp and the thread bodies of csrc/cuda: `make sanitize`.
#include "tests/check.h"

int main() {
  flowfast::test_core();
  flowfast::test_simd();
  flowfast::test_cuda_threads();
  flowfast::test_cuda_rounds();
  if (flowfast::failures > 0) {
    std::printf("%d checks failed\n", flowfast::failures);
    return 1;
  }
  std::printf("core, SIMD kernels and CUDA thread bodies: all checks passed\n");
  return 0;
}
