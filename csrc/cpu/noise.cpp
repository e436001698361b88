#include <torch/csrc/stable/library.h>

#include "cpu/rows.h"

namespace flowfast {
namespace {

template <class Kernel>
void fill(const char* op, Kernel kernel, const Tensor& out, const Tensor& key, const Tensor& row,
          const Tensor& candidate, const Tensor& chain, int64_t purpose) {
  const int64_t lanes = out.size(0), n = out.size(1);
  check_row_length(op, n);
  const Addresses addresses(op, key, row, candidate, chain, lanes);
  if (purpose < 0 || purpose >= kPurposes) fail(op, ": purpose must lie in 0..15, got ", purpose);
  for (int64_t lane = 0; lane < lanes; ++lane)
    if (addresses.row[lane] >= 0) addresses.check_lane(op, lane);
  for_pieces(lanes, n, [&](int64_t lane, int64_t begin, int64_t end) {
    if (addresses.row[lane] < 0) return;
    kernel({addresses.at(lane, static_cast<uint32_t>(purpose)), begin, end, row_start_mutable(out, lane)});
  });
}

void normal_(const Tensor& out, const Tensor& key, const Tensor& row, const Tensor& candidate, const Tensor& chain,
             int64_t purpose) {
  check_latents("normal_", "out", out);
  fill("normal_", kernels().normal[storage_of(out)], out, key, row, candidate, chain, purpose);
}

void uniform_(const Tensor& out, const Tensor& key, const Tensor& row, const Tensor& candidate, const Tensor& chain,
              int64_t purpose) {
  check_latents("uniform_", "out", out);
  check_dtype("uniform_", "out", out, ScalarType::Float);
  fill("uniform_", kernels().uniform, out, key, row, candidate, chain, purpose);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) {
  m.impl("normal_", TORCH_BOX(&normal_));
  m.impl("uniform_", TORCH_BOX(&uniform_));
}

}  // namespace flowfast
