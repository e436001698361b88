// flowfast::promote_ on the CPU: only the rows of winners are read and written.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/checks.h"
#include "cpu/copy_rows.h"

namespace flowfast {
namespace {

void promote_(Tensor x_store, Tensor u_store, const Tensor& x_lane, const Tensor& u_lane, const Tensor& source) {
  constexpr const char* op = "promote_";
  check_latents(op, "x_store", x_store);
  check_latents(op, "x_lane", x_lane);
  const int64_t rows = x_store.size(0), n = x_store.size(1), lanes = x_lane.size(0);
  const ScalarType dtype = x_store.scalar_type();
  check_operand(op, "u_store", u_store, dtype, {rows, n});
  check_operand(op, "x_lane", x_lane, dtype, {lanes, n});
  check_operand(op, "u_lane", u_lane, dtype, {lanes, n});
  check_operand(op, "source", source, ScalarType::Long, {rows});

  const int64_t* lane = source.const_data_ptr<int64_t>();
  const int64_t bytes = n * static_cast<int64_t>(x_store.element_size());
  const auto* x_from = static_cast<const char*>(x_lane.const_data_ptr());
  const auto* u_from = static_cast<const char*>(u_lane.const_data_ptr());
  auto* x_to = static_cast<char*>(x_store.mutable_data_ptr());
  auto* u_to = static_cast<char*>(u_store.mutable_data_ptr());
  std::vector<RowCopy> copies;
  for (int64_t i = 0; i < rows; ++i) {
    if (lane[i] < 0) continue;
    if (lane[i] >= lanes) fail(op, ": source must be below ", lanes, " (the lanes), got source[", i, "] = ", lane[i]);
    copies.push_back({x_from + lane[i] * bytes, x_to + i * bytes});
    copies.push_back({u_from + lane[i] * bytes, u_to + i * bytes});
  }
  copy_rows(copies, bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("promote_", TORCH_BOX(&promote_)); }

}  // namespace flowfast
