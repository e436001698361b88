// flowfast::normalize_log_weights on a GPU: a block of threads for each slot.
#include "cuda/normalize_log_weights.h"

#include "cuda/block.h"
#include "cuda/launch.h"

namespace flowfast {
namespace {

template <class scalar>
__global__ void __launch_bounds__(kBlockThreads)
    normalize_log_weights_kernel(const __grid_constant__ NormalizeLogWeights<scalar> task) {
  __shared__ alignas(16) unsigned char scratch[Block::kScratchBytes];
  Block block(scratch);
  if (row_of_grid() < task.slots) normalize_log_weights_block(block, task, row_of_grid());
}

template <class scalar>
void launch(const Tensor& log_weights, Tensor& weights, Tensor& ess, Tensor& log_normalizer, const OnDevice& on) {
  const NormalizeLogWeights<scalar> task{static_cast<const scalar*>(log_weights.const_data_ptr()),
                                         log_weights.size(0),
                                         log_weights.size(1),
                                         static_cast<scalar*>(weights.mutable_data_ptr()),
                                         static_cast<scalar*>(ess.mutable_data_ptr()),
                                         static_cast<scalar*>(log_normalizer.mutable_data_ptr())};
  normalize_log_weights_kernel<<<grid_of(1, task.slots), kBlockThreads, 0, on.stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void normalize_log_weights(const Tensor& log_weights, Tensor weights, Tensor ess, Tensor log_normalizer) {
  constexpr const char* op = "normalize_log_weights";
  const int32_t device = device_of(op, "log_weights", log_weights);
  check_dense(op, "log_weights", log_weights, device);
  const ScalarType dtype = log_weights.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail(op, ": log_weights must be float32 or float64, got ", torch::headeronly::toString(dtype));
  if (log_weights.dim() != 2 || log_weights.size(1) < 1 || log_weights.size(1) > kMaxParticles)
    fail(op, ": log_weights must have shape (slots, particles) with 1..", kMaxParticles, " particles, got ",
         shape_text(log_weights));
  const int64_t slots = log_weights.size(0);
  check_operand(op, "weights", weights, dtype, {slots, log_weights.size(1)}, device);
  check_operand(op, "ess", ess, dtype, {slots}, device);
  check_operand(op, "log_normalizer", log_normalizer, dtype, {slots}, device);
  if (slots == 0) return;
  const OnDevice on(device);
  if (dtype == ScalarType::Float)
    launch<float>(log_weights, weights, ess, log_normalizer, on);
  else
    launch<double>(log_weights, weights, ess, log_normalizer, on);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("normalize_log_weights", TORCH_BOX(&normalize_log_weights)); }

}  // namespace flowfast
