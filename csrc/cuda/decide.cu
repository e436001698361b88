// flowfast::decide on a GPU. One launch; blocks of rows without a winner end at once, the last block keeps the books.
#include "cuda/decide.h"

#include "cpu/round.h"
#include "cuda/block.h"
#include "cuda/copy_rows_launch.h"

namespace flowfast {
namespace {

// With the registers that 4 blocks leave each other the books spill on sm_90; with those of 3 they do not.
template <int kBytes>
__global__ void __launch_bounds__(kBlockThreads, 3) decide_kernel(const __grid_constant__ Decision task) {
  __shared__ alignas(16) unsigned char scratch[Block::kScratchBytes];
  __shared__ int64_t counts[kBlockThreads];
  Block block(scratch);
  decide_block<kBytes>(block, task, row_of_grid(), blockIdx.x, int64_t{gridDim.x} * gridDim.y * gridDim.z,
                       {counts, kBlockThreads});
}

void decide_cuda(const Decision& task, int64_t element_size, int32_t device) {
  const OnDevice on(device);
  with_access(task.bytes / element_size, element_size,
              {task.x_lane, task.u_lane, task.x0_lane, task.x, task.u, task.top_x, task.top_x0}, [&]<int kBytes>() {
                const dim3 grid = grid_of(decide_chunks<kBytes>(task), task.round.batch() + task.round.slots);
                decide_kernel<kBytes><<<grid, kBlockThreads, 0, on.stream>>>(task);
              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("decide", TORCH_BOX(&decide_op<decide_cuda>)); }

}  // namespace flowfast
