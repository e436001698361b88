// Tests of the runner's own code, without PyTorch: engine, driver, seal, PNG. `make cpp` and `make sanitize-cpp` run
// them: flowfast_runner_tests tests/engine/traces.json.
#include "runner/tests/tests.h"

#include <cstdio>

#include "tests/check.h"

int main(int argc, char** argv) {
  if (argc != 2) return std::printf("usage: flowfast_runner_tests TRACES\n"), 2;
  flowfast::test_pieces();
  flowfast::test_trace(argv[1]);
  flowfast::test_engine();
  flowfast::test_driver();
  if (flowfast::failures > 0) {
    std::printf("%d checks failed\n", flowfast::failures);
    return 1;
  }
  std::printf("runner: all checks passed\n");
  return 0;
}
