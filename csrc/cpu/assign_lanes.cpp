// flowfast::assign_lanes on the CPU: core/round.h.
#include <torch/csrc/stable/library.h>

#include "cpu/round.h"

namespace flowfast {
namespace {

void assign_lanes_cpu(const Tensor& chain, const Tensor& alive, const Tensor& slot, const Tensor& slot_real,
                      const Tensor& given, const Tensor& time, const Tensor& linear_time, const Tensor& lane,
                      const Tensor& lane_real, const Tensor& lane_live, const Tensor& live, int64_t width) {
  constexpr const char* op = "assign_lanes";
  const Round r = round_of(op, chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live);
  if (width < 0 || width > r.widest) fail(op, ": width must lie in 0..", r.widest, ", got ", width);
  assign_lanes(r, width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("assign_lanes", TORCH_BOX(&assign_lanes_cpu)); }

}  // namespace flowfast
