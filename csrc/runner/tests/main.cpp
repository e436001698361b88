// Tests of the runner's own code, without PyTorch: driver, seal, PNG. `make cpp` and `make sanitize` run them.
#include "runner/tests/tests.h"

#include <cstdio>

#include "tests/check.h"

int main() {
  flowfast::test_pieces();
  flowfast::test_driver();
  if (flowfast::failures > 0) {
    std::printf("%d checks failed\n", flowfast::failures);
    return 1;
  }
  std::printf("runner: all checks passed\n");
  return 0;
}
