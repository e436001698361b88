// flowfast::decide on the CPU: core/round.h, then the rows of winners, in place.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/copy_rows.h"
#include "cpu/round.h"

namespace flowfast {
namespace {

// Rows of `to` from the lanes that source names; for the best samples also from older places, which only move down.
void take_rows(void* to, const void* lanes, int64_t bytes, const int64_t* source, int64_t count, int64_t top,
               std::vector<RowCopy>& copies) {
  const auto* from = static_cast<const char*>(lanes);
  auto* rows = static_cast<char*>(to);
  for (int64_t i = count - 1; i >= 0; --i) {
    if (source[i] >= 0) {
      copies.push_back({from + source[i] * bytes, rows + i * bytes});
    } else if (top > 1 && -1 - source[i] != i % top) {
      std::memcpy(rows + i * bytes, rows + (i - i % top - 1 - source[i]) * bytes, bytes);
    }
  }
}

void decide_cpu(const Decision& decision, int64_t, int32_t) {
  const Round& r = decision.round;
  const int64_t B = r.batch(), K = r.lanes, bytes = decision.bytes;
  check_values("decide", r);
  for (int64_t cell = 0; cell < B * K; ++cell)
    if (r.live[cell] && (r.position[cell] < 0 || r.position[cell] >= r.widest))
      fail("decide: position of cell ", cell, " must lie in 0..", r.widest - 1, ", got ", r.position[cell]);
  decide_round(r);

  std::vector<RowCopy> copies;
  take_rows(decision.x, decision.x_lane, bytes, r.store_source, 2 * B, 0, copies);
  take_rows(decision.u, decision.u_lane, bytes, r.store_source, 2 * B, 0, copies);
  take_rows(decision.top_x, decision.x_lane, bytes, r.top_source, r.slots * r.top, r.top, copies);
  take_rows(decision.top_x0, decision.x0_lane, bytes, r.top_source, r.slots * r.top, r.top, copies);
  copy_rows(copies, bytes);
  if (decision.next_width >= 0) assign_lanes(r, decision.next_width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("decide", TORCH_BOX(&decide_op<decide_cpu>)); }

}  // namespace flowfast
