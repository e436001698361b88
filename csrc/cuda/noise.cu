// flowfast::normal_ and flowfast::uniform_ on a GPU. One launch each; only out is written.
#include "cuda/noise.h"

#include "cuda/launch.h"

namespace flowfast {
namespace {

template <class T, int kWidth, bool kUniform>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ NoiseFill task) {
  if (row_of_grid() < task.lanes) noise_thread<T, kWidth, kUniform>(task, row_of_grid(), thread_of_grid());
}

NoiseFill fill_task(const char* op, const Tensor& out, const Tensor& key, const Tensor& row, const Tensor& candidate,
                    const Tensor& chain, int64_t purpose, int32_t device) {
  check_latents(op, "out", out, device);
  const int64_t lanes = out.size(0), n = out.size(1);
  check_row_has_counters(op, n);
  const AddressColumns address = address_columns(op, key, row, candidate, chain, lanes, device);
  if (purpose < 0 || purpose >= kPurposes) fail(op, ": purpose must lie in 0..15, got ", purpose);
  return {address, static_cast<uint32_t>(purpose), lanes, n, out.mutable_data_ptr()};
}

template <class T, int kWidth, bool kUniform>
void launch(const NoiseFill& task, const OnDevice& on) {
  const dim3 grid = grid_of(ceil_div(planar_threads(task.n, kWidth), kThreads), task.lanes);
  noise_kernel<T, kWidth, kUniform><<<grid, kThreads, 0, on.stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void normal_(const Tensor& out, const Tensor& key, const Tensor& row, const Tensor& candidate, const Tensor& chain,
             int64_t purpose) {
  const int32_t device = device_of("normal_", "out", out);
  const NoiseFill task = fill_task("normal_", out, key, row, candidate, chain, purpose, device);
  if (task.lanes == 0 || task.n == 0) return;
  const OnDevice on(device);
  with_storage(out.scalar_type(), rows_take_vectors(task.n, out.element_size(), {task.out}),
               [&]<class T, int kWidth>() { launch<T, kWidth, false>(task, on); });
}

void uniform_(const Tensor& out, const Tensor& key, const Tensor& row, const Tensor& candidate, const Tensor& chain,
              int64_t purpose) {
  const int32_t device = device_of("uniform_", "out", out);
  const NoiseFill task = fill_task("uniform_", out, key, row, candidate, chain, purpose, device);
  check_dtype("uniform_", "out", out, ScalarType::Float);
  if (task.lanes == 0 || task.n == 0) return;
  const OnDevice on(device);
  if (rows_take_vectors(task.n, out.element_size(), {task.out}))
    launch<float, kVector<float>, true>(task, on);
  else
    launch<float, 1, true>(task, on);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) {
  m.impl("normal_", TORCH_BOX(&normal_));
  m.impl("uniform_", TORCH_BOX(&uniform_));
}

}  // namespace flowfast
