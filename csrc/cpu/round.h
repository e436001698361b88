// Operands of assign_lanes and decide, checked once, as core/round.h wants them.
#pragma once

#include "core/round.h"
#include "cpu/checks.h"

namespace flowfast {

template <class T>
T* writable(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
            std::initializer_list<int64_t> shape) {
  check_operand(op, name, tensor, dtype, shape);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* readable(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  check_operand(op, name, tensor, dtype, shape);
  return static_cast<const T*>(tensor.const_data_ptr());
}

// What both ops read: chains, slots, times and lanes. Sizes come from given (S), live (B, K), time (T + 1), lane_live.
inline Round round_of(const char* op, const Tensor& chain, const Tensor& alive, const Tensor& slot,
                      const Tensor& slot_real, const Tensor& given, const Tensor& time, const Tensor& linear_time,
                      const Tensor& lane, const Tensor& lane_real, const Tensor& lane_live, const Tensor& live) {
  if (given.dim() != 1 || live.dim() != 2 || time.dim() != 1 || lane_live.dim() != 1 || given.size(0) == 0 ||
      live.size(0) % given.size(0) != 0 || time.size(0) < 2)
    fail(op, ": expected given (S,), live (S * C, K), time (T + 1,) and lane_live (N,), got ", shape_text(given), ", ",
         shape_text(live), ", ", shape_text(time), " and ", shape_text(lane_live));
  Round r{};
  r.slots = given.size(0);
  r.chains = live.size(0) / r.slots;
  r.lanes = live.size(1);
  r.transitions = time.size(0) - 1;
  r.widest = lane_live.size(0);
  const int64_t B = r.batch();
  r.chain = writable<int64_t>(op, "chain", chain, ScalarType::Long, {kChainRows, B});
  r.alive = writable<bool>(op, "alive", alive, ScalarType::Bool, {B});
  r.slot = writable<int64_t>(op, "slot", slot, ScalarType::Long, {kSlotRows, r.slots});
  r.slot_real = readable<float>(op, "slot_real", slot_real, ScalarType::Float, {kSlotRealRows, r.slots});
  r.given = readable<bool>(op, "given", given, ScalarType::Bool, {r.slots});
  r.time = readable<float>(op, "time", time, ScalarType::Float, {r.transitions + 1});
  r.linear_time = readable<float>(op, "linear_time", linear_time, ScalarType::Float, {r.transitions + 1});
  r.lane = writable<int64_t>(op, "lane", lane, ScalarType::Long, {kLaneRows, r.widest});
  r.lane_real = writable<float>(op, "lane_real", lane_real, ScalarType::Float, {kLaneRealRows, r.widest});
  r.lane_live = writable<bool>(op, "lane_live", lane_live, ScalarType::Bool, {r.widest});
  r.live = writable<bool>(op, "live", live, ScalarType::Bool, {B, r.lanes});
  for (int64_t b = 0; b < B; ++b)
    if (r.alive[b] && (r.of_chain(kRow, b) < 0 || r.of_chain(kRow, b) >= r.transitions))
      fail(op, ": a live chain must stand at a transition in 0..", r.transitions - 1, ", chain ", b, " stands at ",
           r.of_chain(kRow, b));
  return r;
}

}  // namespace flowfast
