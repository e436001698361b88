// flowfast::rollover on a GPU: a thread for each chain.
#include "cuda/rollover.h"

#include "cuda/launch.h"

namespace flowfast {
namespace {

__global__ void __launch_bounds__(kThreads) rollover_kernel(const __grid_constant__ Rollover task) {
  rollover_thread(task, thread_of_grid());
}

void rollover(const Tensor& rewards, const Tensor& live, const Tensor& next_quota, bool carry, Tensor quota,
              Tensor threshold, Tensor best_child, Tensor winner, Tensor advance, Tensor used) {
  constexpr const char* op = "rollover";
  const int32_t device = device_of(op, "rewards", rewards);
  if (rewards.dim() != 2) fail(op, ": rewards must have shape (chains, lanes), got ", shape_text(rewards));
  const int64_t chains = rewards.size(0), lanes = rewards.size(1);
  check_operand(op, "rewards", rewards, ScalarType::Float, {chains, lanes}, device);
  check_operand(op, "live", live, ScalarType::Bool, {chains, lanes}, device);
  check_operand(op, "next_quota", next_quota, ScalarType::Long, {chains}, device);
  check_operand(op, "quota", quota, ScalarType::Long, {chains}, device);
  check_operand(op, "threshold", threshold, ScalarType::Float, {chains}, device);
  check_operand(op, "best_child", best_child, ScalarType::Float, {chains}, device);
  check_operand(op, "winner", winner, ScalarType::Long, {chains}, device);
  check_operand(op, "advance", advance, ScalarType::Long, {chains}, device);
  check_operand(op, "used", used, ScalarType::Long, {chains}, device);
  if (chains == 0) return;

  const Rollover task{rewards.const_data_ptr<float>(),
                      live.const_data_ptr<bool>(),
                      next_quota.const_data_ptr<int64_t>(),
                      carry,
                      chains,
                      lanes,
                      quota.mutable_data_ptr<int64_t>(),
                      threshold.mutable_data_ptr<float>(),
                      best_child.mutable_data_ptr<float>(),
                      winner.mutable_data_ptr<int64_t>(),
                      advance.mutable_data_ptr<int64_t>(),
                      used.mutable_data_ptr<int64_t>()};
  const OnDevice on(device);
  rollover_kernel<<<grid_of(ceil_div(chains, kThreads), 1), kThreads, 0, on.stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CUDA, m) { m.impl("rollover", TORCH_BOX(&rollover)); }

}  // namespace flowfast
