// flowfast::posterior_mean on a GPU. One launch; x, u (and u_uncond) in, u_out (where wanted) and x0_out out.
#include "cuda/posterior_mean.h"

#include <optional>

#include "cuda/launch.h"

namespace flowfast {
namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) posterior_mean_kernel(const __grid_constant__ PosteriorMean task) {
  if (row_of_grid() < task.lanes) posterior_mean_thread<T, kWidth>(task, row_of_grid(), thread_of_grid());
}

void posterior_mean(const Tensor& x, const Tensor& u, const std::optional<Tensor>& u_uncond,
                    const std::optional<Tensor>& guidance, const Tensor& row, const Tensor& table,
                    const std::optional<Tensor>& u_out, const Tensor& x0_out, const std::optional<Tensor>& broken) {
  constexpr const char* op = "posterior_mean";
  const int32_t device = device_of(op, "x", x);
  check_latents(op, "x", x, device);
  const int64_t lanes = x.size(0), n = x.size(1);
  const ScalarType dtype = x.scalar_type();
  check_operand(op, "u", u, dtype, {lanes, n}, device);
  if (u_out) check_operand(op, "u_out", *u_out, dtype, {lanes, n}, device);
  check_operand(op, "x0_out", x0_out, dtype, {lanes, n}, device);
  const float* scale = nullptr;
  if (u_uncond) {
    check_operand(op, "u_uncond", *u_uncond, dtype, {lanes, n}, device);
    if (!u_out) fail(op, ": u_uncond needs u_out; only without guidance it may be left out");
    if (!guidance) fail(op, ": u_uncond needs guidance, one scale a lane; pass both or neither");
    scale = column<float>(op, "guidance", *guidance, ScalarType::Float, lanes, device);
  }
  if (broken) check_operand(op, "broken", *broken, ScalarType::Bool, {lanes}, device);
  const int64_t* row_of = column<int64_t>(op, "row", row, ScalarType::Long, lanes, device);
  const int64_t rows = check_table(op, table, device);
  if (lanes == 0 || n == 0) return;

  const PosteriorMean task{row_of,
                           table.const_data_ptr<float>(),
                           scale,
                           rows,
                           lanes,
                           n,
                           x.const_data_ptr(),
                           u.const_data_ptr(),
                           u_uncond ? u_uncond->const_data_ptr() : nullptr,
                           u_out ? u_out->mutable_data_ptr() : nullptr,
                           x0_out.mutable_data_ptr(),
                           broken ? static_cast<bool*>(broken->mutable_data_ptr()) : nullptr};
  const OnDevice on(device);
  const bool vectors = rows_take_vectors(n, x.element_size(), {task.x, task.u, task.u_uncond, task.u_out, task.x0_out});
  with_storage(dtype, vectors, [&]<class T, int kWidth>() {
    const dim3 grid = grid_of(ceil_div(ceil_div(n, kWidth), kThreads), lanes);
    posterior_mean_kernel<T, kWidth><<<grid, kThreads, 0, on.stream>>>(task);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("posterior_mean", TORCH_BOX(&posterior_mean)); }

}  // namespace flowfast
