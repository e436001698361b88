// flowfast::gather_ancestors_ on a GPU. One launch; blocks of rows that survive end at once.
#include "cuda/gather_ancestors.h"

#include "cuda/copy_rows_launch.h"

namespace flowfast {
namespace {

template <int kBytes>
__global__ void __launch_bounds__(kThreads) gather_ancestors_kernel(const __grid_constant__ GatherAncestors task) {
  if (row_of_grid() < 2 * task.rows) gather_ancestors_thread<kBytes>(task, row_of_grid(), blockIdx.x, threadIdx.x);
}

void gather_ancestors_(Tensor x, Tensor u, const Tensor& ancestors) {
  constexpr const char* op = "gather_ancestors_";
  const int32_t device = device_of(op, "x", x);
  check_latents(op, "x", x, device);
  const int64_t rows = x.size(0), n = x.size(1);
  check_operand(op, "u", u, x.scalar_type(), {rows, n}, device);
  const int64_t* a = column<int64_t>(op, "ancestors", ancestors, ScalarType::Long, rows, device);
  if (rows == 0 || n == 0) return;

  const auto size = static_cast<int64_t>(x.element_size());
  const GatherAncestors task{a, rows, n * size, x.mutable_data_ptr(), u.mutable_data_ptr()};
  const OnDevice on(device);
  with_access(n, size, {task.x, task.u}, [&]<int kBytes>() {
    const dim3 grid = grid_of(copy_blocks(task.bytes, kBytes), 2 * rows);
    gather_ancestors_kernel<kBytes><<<grid, kThreads, 0, on.stream>>>(task);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("gather_ancestors_", TORCH_BOX(&gather_ancestors_)); }

}  // namespace flowfast
