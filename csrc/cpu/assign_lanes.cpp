// flowfast::assign_lanes on the CPU: core/round.h.
#include <torch/csrc/stable/library.h>

#include "cpu/round.h"

namespace flowfast {
namespace {

void assign_lanes_cpu(const Round& round, int64_t width, int32_t) {
  check_values("assign_lanes", round);
  assign_lanes(round, width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("assign_lanes", TORCH_BOX(&assign_lanes_op<assign_lanes_cpu>)); }

}  // namespace flowfast
