#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/rows.h"

namespace flowfast {
namespace {

constexpr char kOp[] = "branch_step";

void branch_step(const Tensor& x, const Tensor& u, const Tensor& parent, const Tensor& row, const Tensor& key,
                 const Tensor& candidate, const Tensor& chain, const Tensor& table, const Tensor& out,
                 const std::optional<Tensor>& x0_out, const std::optional<Tensor>& grad) {
  check_latents(kOp, "x", x);
  const int64_t parents = x.size(0), n = x.size(1);
  check_row_length(kOp, n);
  check_operand(kOp, "u", u, x.scalar_type(), {parents, n});
  check_latents(kOp, "out", out);
  const int64_t lanes = out.size(0);
  check_operand(kOp, "out", out, x.scalar_type(), {lanes, n});
  if (x0_out) check_operand(kOp, "x0_out", *x0_out, x.scalar_type(), {lanes, n});
  if (grad) check_operand(kOp, "grad", *grad, x.scalar_type(), {lanes, n});
  const int64_t* parent_of = Addresses::column(kOp, "parent", parent, lanes);
  const Addresses addresses(kOp, key, row, candidate, chain, lanes);
  check_dense(kOp, "table", table);
  const int64_t rows = table.dim() == 2 ? table.size(0) : 0;
  check_operand(kOp, "table", table, ScalarType::Float, {rows, kColumns});

  const bool in_place = n > 0 && out.const_data_ptr() == x.const_data_ptr();
  const auto is_padding = [&](int64_t lane) { return parent_of[lane] < 0 || addresses.row[lane] < 0; };
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (is_padding(lane)) continue;
    addresses.check_lane(kOp, lane);
    if (parent_of[lane] >= parents)
      fail(kOp, ": parent must lie in 0..", parents - 1, " (or below 0 for padding), got ", parent_of[lane]);
    if (addresses.row[lane] >= rows)
      fail(kOp, ": row must lie in 0..", rows - 1, " (or below 0 for padding), got ", addresses.row[lane]);
    if (in_place && parent_of[lane] != lane)
      fail(kOp, ": out may be x only where every lane is its own parent; lane ", lane, " has parent ", parent_of[lane]);
  }

  const auto kernel = kernels().branch_step[storage_of(x)];
  const float* coefficients = table.const_data_ptr<float>();
  for_pieces(lanes, n, [&](int64_t lane, int64_t begin, int64_t end) {
    if (is_padding(lane)) return;
    const int64_t from = parent_of[lane], transition = addresses.row[lane];
    const Purpose purpose = transition == kInitialRow ? kInitialNoise : kTransition;
    kernel({addresses.at(lane, purpose), begin, end, coefficients + transition * kColumns, row_start(x, from),
            row_start(u, from), grad ? row_start(*grad, lane) : nullptr, row_start_mutable(out, lane),
            x0_out ? row_start_mutable(*x0_out, lane) : nullptr});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("branch_step", TORCH_BOX(&branch_step)); }

}  // namespace flowfast
