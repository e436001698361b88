// flowfast::assign_lanes on a GPU: one block of threads for all chains.
#include "cuda/assign_lanes.h"

#include "cpu/round.h"
#include "cuda/block.h"
#include "cuda/launch.h"

namespace flowfast {
namespace {

__global__ void __launch_bounds__(kBlockThreads)
    assign_lanes_kernel(const __grid_constant__ Round round, int64_t width) {
  __shared__ alignas(16) unsigned char scratch[Block::kScratchBytes];
  __shared__ int64_t counts[kBlockThreads];
  Block block(scratch);
  assign_lanes_block(block, round, width, {counts, kBlockThreads});
}

void assign_lanes_cuda(const Round& round, int64_t width, int32_t device) {
  const OnDevice on(device);
  assign_lanes_kernel<<<1, kBlockThreads, 0, on.stream>>>(round, width);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("assign_lanes", TORCH_BOX(&assign_lanes_op<assign_lanes_cuda>)); }

}  // namespace flowfast
