// flowfast::rollover on the CPU: core/rollover.h for each chain.
#include "core/rollover.h"

#include <torch/csrc/stable/library.h>

#include "cpu/checks.h"

namespace flowfast {
namespace {

void rollover(const Tensor& rewards, const Tensor& live, const Tensor& next_quota, bool carry, Tensor quota,
              Tensor threshold, Tensor best_child, Tensor winner, Tensor advance, Tensor used) {
  constexpr const char* op = "rollover";
  if (rewards.dim() != 2) fail(op, ": rewards must have shape (chains, lanes), got ", shape_text(rewards));
  const int64_t chains = rewards.size(0), lanes = rewards.size(1);
  check_operand(op, "rewards", rewards, ScalarType::Float, {chains, lanes});
  check_operand(op, "live", live, ScalarType::Bool, {chains, lanes});
  check_operand(op, "next_quota", next_quota, ScalarType::Long, {chains});
  check_operand(op, "quota", quota, ScalarType::Long, {chains});
  check_operand(op, "threshold", threshold, ScalarType::Float, {chains});
  check_operand(op, "best_child", best_child, ScalarType::Float, {chains});
  check_operand(op, "winner", winner, ScalarType::Long, {chains});
  check_operand(op, "advance", advance, ScalarType::Long, {chains});
  check_operand(op, "used", used, ScalarType::Long, {chains});

  const float* reward = rewards.const_data_ptr<float>();
  const bool* is_live = live.const_data_ptr<bool>();
  const int64_t* next = next_quota.const_data_ptr<int64_t>();
  int64_t* quota_left = quota.mutable_data_ptr<int64_t>();
  float* to_beat = threshold.mutable_data_ptr<float>();
  float* best = best_child.mutable_data_ptr<float>();
  int64_t* winners = winner.mutable_data_ptr<int64_t>();
  int64_t* advances = advance.mutable_data_ptr<int64_t>();
  int64_t* counted = used.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < chains; ++b) {
    ChainState state{quota_left[b], to_beat[b], best[b]};
    const RoundResult result = rollover_chain(reward + b * lanes, is_live + b * lanes, lanes, next[b], carry, state);
    quota_left[b] = state.quota;
    to_beat[b] = state.threshold;
    best[b] = state.best_child;
    winners[b] = result.winner;
    advances[b] = result.advance;
    counted[b] = result.used;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("rollover", TORCH_BOX(&rollover)); }

}  // namespace flowfast
