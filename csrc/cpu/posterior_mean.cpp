#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "cpu/rows.h"

namespace flowfast {
namespace {

constexpr char kOp[] = "posterior_mean";

void posterior_mean(const Tensor& x, const Tensor& u, const std::optional<Tensor>& u_uncond,
                    const std::optional<Tensor>& guidance, const Tensor& row, const Tensor& table,
                    const std::optional<Tensor>& u_out, const Tensor& x0_out, const std::optional<Tensor>& broken) {
  check_latents(kOp, "x", x);
  const int64_t lanes = x.size(0), n = x.size(1);
  check_operand(kOp, "u", u, x.scalar_type(), {lanes, n});
  if (u_out) check_operand(kOp, "u_out", *u_out, x.scalar_type(), {lanes, n});
  check_operand(kOp, "x0_out", x0_out, x.scalar_type(), {lanes, n});
  if (u_uncond) {
    check_operand(kOp, "u_uncond", *u_uncond, x.scalar_type(), {lanes, n});
    if (!u_out) fail(kOp, ": u_uncond needs u_out; only without guidance it may be left out");
    if (!guidance) fail(kOp, ": u_uncond needs guidance, one scale a lane; pass both or neither");
    check_operand(kOp, "guidance", *guidance, ScalarType::Float, {lanes});
  }
  if (broken) check_operand(kOp, "broken", *broken, ScalarType::Bool, {lanes});
  const int64_t* row_of = Addresses::column(kOp, "row", row, lanes);
  check_dense(kOp, "table", table);
  const int64_t rows = table.dim() == 2 ? table.size(0) : 0;
  check_operand(kOp, "table", table, ScalarType::Float, {rows, kColumns});
  for (int64_t lane = 0; lane < lanes; ++lane)
    if (row_of[lane] >= rows)
      fail(kOp, ": row must lie in 0..", rows - 1, " (or below 0 for padding), got ", row_of[lane]);

  const auto kernel = kernels().posterior_mean[storage_of(x)];
  const float* coefficients = table.const_data_ptr<float>();
  const float* scale = u_uncond ? guidance->const_data_ptr<float>() : nullptr;
  bool* marks = broken ? static_cast<bool*>(broken->mutable_data_ptr()) : nullptr;
  for_pieces(lanes, n, [&](int64_t lane, int64_t begin, int64_t end) {
    if (row_of[lane] < 0) return;
    const bool finite = kernel({begin, end, coefficients + row_of[lane] * kColumns, scale ? scale[lane] : 1.0f,
                                row_start(x, lane), row_start(u, lane), u_uncond ? row_start(*u_uncond, lane) : nullptr,
                                u_out ? row_start_mutable(*u_out, lane) : nullptr, row_start_mutable(x0_out, lane)});
    if (marks && !finite) std::atomic_ref(marks[lane]).store(true, std::memory_order_relaxed);  // pieces share a lane
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("posterior_mean", TORCH_BOX(&posterior_mean)); }

}  // namespace flowfast
