// flowfast::branch_step on a GPU. One launch; x and u of the parent in, out (and x0_out) out.
#include <optional>

#include "cuda/branch_step.h"
#include "cuda/launch.h"

namespace flowfast {
namespace {

// 4 blocks an SM: at most 128 registers.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) branch_step_kernel(const __grid_constant__ BranchStep task) {
  if (row_of_grid() < task.lanes) branch_step_thread<T, kWidth>(task, row_of_grid(), thread_of_grid());
}

void branch_step(const Tensor& x, const Tensor& u, const Tensor& parent, const Tensor& row, const Tensor& key,
                 const Tensor& candidate, const Tensor& chain, const Tensor& table, const Tensor& out,
                 const std::optional<Tensor>& x0_out, const std::optional<Tensor>& grad) {
  constexpr const char* op = "branch_step";
  const int32_t device = device_of(op, "x", x);
  check_latents(op, "x", x, device);
  const int64_t parents = x.size(0), n = x.size(1);
  const ScalarType dtype = x.scalar_type();
  check_row_has_counters(op, n);
  check_operand(op, "u", u, dtype, {parents, n}, device);
  check_latents(op, "out", out, device);
  const int64_t lanes = out.size(0);
  check_operand(op, "out", out, dtype, {lanes, n}, device);
  if (x0_out) check_operand(op, "x0_out", *x0_out, dtype, {lanes, n}, device);
  if (grad) check_operand(op, "grad", *grad, dtype, {lanes, n}, device);
  const int64_t* parent_of = column<int64_t>(op, "parent", parent, ScalarType::Long, lanes, device);
  const AddressColumns address = address_columns(op, key, row, candidate, chain, lanes, device);
  const int64_t rows = check_table(op, table, device);
  if (lanes == 0 || n == 0) return;

  const BranchStep task{address,
                        parent_of,
                        table.const_data_ptr<float>(),
                        parents,
                        rows,
                        lanes,
                        n,
                        x.const_data_ptr(),
                        u.const_data_ptr(),
                        grad ? grad->const_data_ptr() : nullptr,
                        out.mutable_data_ptr(),
                        x0_out ? x0_out->mutable_data_ptr() : nullptr};
  const OnDevice on(device);
  const bool vectors = rows_take_vectors(n, x.element_size(), {task.x, task.u, task.grad, task.out, task.x0_out});
  with_storage(dtype, vectors, [&]<class T, int kWidth>() {
    const dim3 grid = grid_of(ceil_div(planar_threads(n, kWidth), kThreads), lanes);
    branch_step_kernel<T, kWidth><<<grid, kThreads, 0, on.stream>>>(task);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("branch_step", TORCH_BOX(&branch_step)); }

}  // namespace flowfast
