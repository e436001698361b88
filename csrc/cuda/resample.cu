// flowfast::resample on a GPU: a block of threads for each slot.
#include "cuda/resample.h"

#include "core/log_weights.h"
#include "cuda/block.h"
#include "cuda/launch.h"

namespace flowfast {
namespace {

constexpr int kTileParticles = 2048;  // 32 KiB; with the block's scratch below the 48 KiB that need no opt-in

template <class scalar>
__global__ void __launch_bounds__(kBlockThreads) resample_kernel(const __grid_constant__ Resample<scalar> task) {
  __shared__ alignas(16) unsigned char scratch[Block::kScratchBytes];
  __shared__ int64_t sums[kTileParticles], marks[kTileParticles];
  if (row_of_grid() >= task.slots) return;
  Block block(scratch);
  resample_block(block, task, row_of_grid(), {sums, kTileParticles}, marks);
}

template <class scalar>
void launch(const Tensor& weights, const Tensor& key, const Tensor& row, const Tensor& enabled, int64_t scheme,
            Tensor& ancestors, const OnDevice& on) {
  const int64_t slots = weights.size(0), n = weights.size(1);
  const Resample<scalar> task{static_cast<const scalar*>(weights.const_data_ptr()),
                              key.const_data_ptr<int64_t>(),
                              row.const_data_ptr<int64_t>(),
                              enabled.const_data_ptr<bool>(),
                              scheme,
                              slots,
                              n,
                              ancestors.mutable_data_ptr<int64_t>()};
  resample_kernel<<<grid_of(1, slots), kBlockThreads, 0, on.stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void resample(const Tensor& weights, const Tensor& key, const Tensor& row, const Tensor& enabled, int64_t scheme,
              Tensor ancestors) {
  constexpr const char* op = "resample";
  const int32_t device = device_of(op, "weights", weights);
  check_dense(op, "weights", weights, device);
  const ScalarType dtype = weights.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail(op, ": weights must be float32 or float64, got ", torch::headeronly::toString(dtype));
  if (weights.dim() != 2 || weights.size(1) < 1 || weights.size(1) > kMaxParticles)
    fail(op, ": weights must have shape (slots, particles) with 1..", kMaxParticles, " particles, got ",
         shape_text(weights));
  if (scheme < 0 || scheme >= kSchemes)
    fail(op, ": scheme must be one of 0 multinomial, 1 stratified, 2 systematic, 3 residual, 4 ssp, got ", scheme);
  const int64_t slots = weights.size(0);
  check_operand(op, "key", key, ScalarType::Long, {slots}, device);
  check_operand(op, "row", row, ScalarType::Long, {slots}, device);
  check_operand(op, "enabled", enabled, ScalarType::Bool, {slots}, device);
  check_operand(op, "ancestors", ancestors, ScalarType::Long, {slots, weights.size(1)}, device);
  if (slots == 0) return;
  const OnDevice on(device);
  if (dtype == ScalarType::Float)
    launch<float>(weights, key, row, enabled, scheme, ancestors, on);
  else
    launch<double>(weights, key, row, enabled, scheme, ancestors, on);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("resample", TORCH_BOX(&resample)); }

}  // namespace flowfast
