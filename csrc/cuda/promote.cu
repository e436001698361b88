// flowfast::promote_ on a GPU. One launch; blocks of rows without a winner end at once.
#include "cuda/promote.h"

#include "cuda/copy_rows_launch.h"

namespace flowfast {
namespace {

template <int kBytes>
__global__ void __launch_bounds__(kThreads) promote_kernel(const __grid_constant__ Promote task) {
  if (row_of_grid() < 2 * task.rows) promote_thread<kBytes>(task, row_of_grid(), blockIdx.x, threadIdx.x);
}

void promote_(Tensor x_store, Tensor u_store, const Tensor& x_lane, const Tensor& u_lane, const Tensor& source) {
  constexpr const char* op = "promote_";
  const int32_t device = device_of(op, "x_store", x_store);
  check_latents(op, "x_store", x_store, device);
  check_latents(op, "x_lane", x_lane, device);
  const int64_t rows = x_store.size(0), n = x_store.size(1), lanes = x_lane.size(0);
  const ScalarType dtype = x_store.scalar_type();
  check_operand(op, "u_store", u_store, dtype, {rows, n}, device);
  check_operand(op, "x_lane", x_lane, dtype, {lanes, n}, device);
  check_operand(op, "u_lane", u_lane, dtype, {lanes, n}, device);
  const int64_t* lane = column<int64_t>(op, "source", source, ScalarType::Long, rows, device);
  if (rows == 0 || n == 0) return;

  const auto size = static_cast<int64_t>(x_store.element_size());
  const Promote task{lane,
                     rows,
                     lanes,
                     n * size,
                     x_lane.const_data_ptr(),
                     u_lane.const_data_ptr(),
                     x_store.mutable_data_ptr(),
                     u_store.mutable_data_ptr()};
  const OnDevice on(device);
  with_access(n, size, {task.x_lane, task.u_lane, task.x_store, task.u_store}, [&]<int kBytes>() {
    const dim3 grid = grid_of(copy_blocks(task.bytes, kBytes), 2 * rows);
    promote_kernel<kBytes><<<grid, kThreads, 0, on.stream>>>(task);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("promote_", TORCH_BOX(&promote_)); }

}  // namespace flowfast
