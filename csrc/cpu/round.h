// Operands of assign_lanes and decide, checked once, as core/round.h wants them; for the CPU and for CUDA.
#pragma once

#include <optional>
#include <tuple>

#include "core/round.h"
#include "cpu/checks.h"

namespace flowfast {

// Takes the data of operands that lie on one device.
struct Operands {
  const char* op;
  int32_t device;

  template <class T>
  T* writable(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) const {
    check_operand(op, name, tensor, dtype, shape, device);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  template <class T>
  const T* readable(const char* name, const Tensor& tensor, ScalarType dtype,
                    std::initializer_list<int64_t> shape) const {
    check_operand(op, name, tensor, dtype, shape, device);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

// The device that the first operand names; all others must be there too.
inline int32_t round_device(const Tensor& chain) { return chain.is_cuda() ? chain.get_device_index() : kOnCpu; }

// What both ops read: chains, slots, times and lanes. Sizes come from given (S), live (B, K), time (T + 1), lane_live.
inline Round round_of(const Operands& of, const Tensor& chain, const Tensor& alive, const Tensor& slot,
                      const Tensor& slot_real, const Tensor& given, const Tensor& time, const Tensor& linear_time,
                      const Tensor& lane, const Tensor& lane_real, const Tensor& lane_live, const Tensor& live,
                      const Tensor& position) {
  if (given.dim() != 1 || live.dim() != 2 || time.dim() != 1 || lane_live.dim() != 1 || given.size(0) == 0 ||
      live.size(0) % given.size(0) != 0 || time.size(0) < 2)
    fail(of.op, ": expected given (S,), live (S * C, K), time (T + 1,) and lane_live (N,), got ", shape_text(given),
         ", ", shape_text(live), ", ", shape_text(time), " and ", shape_text(lane_live));
  Round r{};
  r.slots = given.size(0);
  r.chains = live.size(0) / r.slots;
  r.lanes = live.size(1);
  r.transitions = time.size(0) - 1;
  r.widest = lane_live.size(0);
  const int64_t B = r.batch();
  r.chain = of.writable<int64_t>("chain", chain, ScalarType::Long, {kChainRows, B});
  r.alive = of.writable<bool>("alive", alive, ScalarType::Bool, {B});
  r.slot = of.writable<int64_t>("slot", slot, ScalarType::Long, {kSlotRows, r.slots});
  r.slot_real = of.readable<float>("slot_real", slot_real, ScalarType::Float, {kSlotRealRows, r.slots});
  r.given = of.readable<bool>("given", given, ScalarType::Bool, {r.slots});
  r.time = of.readable<float>("time", time, ScalarType::Float, {r.transitions + 1});
  r.linear_time = of.readable<float>("linear_time", linear_time, ScalarType::Float, {r.transitions + 1});
  r.lane = of.writable<int64_t>("lane", lane, ScalarType::Long, {kLaneRows, r.widest});
  r.lane_real = of.writable<float>("lane_real", lane_real, ScalarType::Float, {kLaneRealRows, r.widest});
  r.lane_live = of.writable<bool>("lane_live", lane_live, ScalarType::Bool, {r.widest});
  r.live = of.writable<bool>("live", live, ScalarType::Bool, {B, r.lanes});
  r.position = of.writable<int64_t>("position", position, ScalarType::Long, {B, r.lanes});
  return r;
}

// What only the CPU can look at without making anyone wait.
inline void check_rows(const char* op, const Round& r) {
  for (int64_t b = 0; b < r.batch(); ++b)
    if (r.alive[b] && (r.of_chain(kRow, b) < 0 || r.of_chain(kRow, b) >= r.transitions))
      fail(op, ": a live chain must stand at a transition in 0..", r.transitions - 1, ", chain ", b, " stands at ",
           r.of_chain(kRow, b));
}

// assign_lanes, checked; kRun(round, width, device) does the work.
template <void (*kRun)(const Round&, int64_t, int32_t)>
void assign_lanes_op(const Tensor& chain, const Tensor& alive, const Tensor& slot, const Tensor& slot_real,
                     const Tensor& given, const Tensor& time, const Tensor& linear_time, const Tensor& lane,
                     const Tensor& lane_real, const Tensor& lane_live, const Tensor& live, const Tensor& position,
                     int64_t width) {
  const Operands of{"assign_lanes", round_device(chain)};
  const Round r =
      round_of(of, chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live, position);
  if (width < 0 || width > r.widest) fail(of.op, ": width must lie in 0..", r.widest, ", got ", width);
  kRun(r, width, of.device);
}

// decide, checked; kRun(decision, bytes of an element, device) does the work.
template <void (*kRun)(const Decision&, int64_t, int32_t)>
void decide_op(const Tensor& rewards, double temperature, const std::optional<Tensor>& bias, const Tensor& chain,
               const Tensor& score, const Tensor& alive, const Tensor& slot, const Tensor& slot_real,
               const Tensor& given, const Tensor& quota_table, const Tensor& path_chain, const Tensor& path_candidate,
               const Tensor& top_reward, const Tensor& top_row, const Tensor& top_chain, const Tensor& top_candidate,
               const Tensor& accept, const Tensor& finished, const Tensor& time, const Tensor& linear_time,
               const Tensor& lane, const Tensor& lane_real, const Tensor& lane_live, const Tensor& live,
               const Tensor& position, const Tensor& broken, const Tensor& x_lane, const Tensor& u_lane,
               const Tensor& x0_lane, const Tensor& x, const Tensor& u, const Tensor& top_x, const Tensor& top_x0,
               const Tensor& dense, const Tensor& status, const Tensor& advance, const Tensor& store_source,
               const Tensor& top_source, const Tensor& ticket, double margin, bool carry, int64_t passes,
               int64_t next_width) {
  const Operands of{"decide", round_device(chain)};
  Decision decision{};
  Round& r = decision.round;
  r = round_of(of, chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live, position);
  const int64_t S = r.slots, B = r.batch(), K = r.lanes, T = r.transitions;
  if (top_reward.dim() != 2 || top_reward.size(1) < 1)
    fail(of.op, ": top_reward must have shape (slots, top), top at least 1, got ", shape_text(top_reward));
  r.top = top_reward.size(1);
  r.passes = passes;
  r.margin = static_cast<float>(margin);
  r.carry = carry;
  r.temperature = static_cast<float>(temperature);
  r.score = of.writable<float>("score", score, ScalarType::Float, {kScoreRows, B});
  r.quota_table = of.readable<int64_t>("quota_table", quota_table, ScalarType::Long, {B, T});
  r.path_chain = of.writable<int64_t>("path_chain", path_chain, ScalarType::Long, {B, T});
  r.path_candidate = of.writable<int64_t>("path_candidate", path_candidate, ScalarType::Long, {B, T});
  r.top_reward = of.writable<float>("top_reward", top_reward, ScalarType::Float, {S, r.top});
  r.top_row = of.writable<int64_t>("top_row", top_row, ScalarType::Long, {S, r.top});
  r.top_chain = of.writable<int64_t>("top_chain", top_chain, ScalarType::Long, {S, r.top, T});
  r.top_candidate = of.writable<int64_t>("top_candidate", top_candidate, ScalarType::Long, {S, r.top, T});
  r.accept = of.readable<bool>("accept", accept, ScalarType::Bool, {T});
  r.finished = of.readable<bool>("finished", finished, ScalarType::Bool, {T});
  r.broken = of.writable<bool>("broken", broken, ScalarType::Bool, {r.widest});
  r.dense = of.writable<float>("dense", dense, ScalarType::Float, {B, K});
  r.status = of.writable<int64_t>("status", status, ScalarType::Long, {B, K});
  r.advance = of.writable<int64_t>("advance", advance, ScalarType::Long, {B});
  r.store_source = of.writable<int64_t>("store_source", store_source, ScalarType::Long, {2 * B});
  r.top_source = of.writable<int64_t>("top_source", top_source, ScalarType::Long, {S, r.top});
  decision.ticket = of.writable<int32_t>("ticket", ticket, ScalarType::Int, {1});
  check_latents(of.op, "x_lane", x_lane, of.device);
  const ScalarType dtype = x_lane.scalar_type();
  const int64_t n = x_lane.size(1), element_size = static_cast<int64_t>(x_lane.element_size());
  for (const auto& [name, latents, rows] : {std::tuple{"x_lane", &x_lane, r.widest}, {"u_lane", &u_lane, r.widest},
                                            {"x0_lane", &x0_lane, r.widest}, {"x", &x, 2 * B}, {"u", &u, 2 * B},
                                            {"top_x", &top_x, S * r.top}, {"top_x0", &top_x0, S * r.top}})
    check_operand(of.op, name, *latents, dtype, {rows, n}, of.device);
  r.seen = rewards.dim() == 1 ? rewards.size(0) : -1;
  if (r.seen < 0 || r.seen > r.widest)
    fail(of.op, ": rewards must have shape (N,), N up to ", r.widest, ", got ", shape_text(rewards));
  r.rewards = of.readable<float>("rewards", rewards, ScalarType::Float, {r.seen});
  r.bias = bias ? of.readable<float>("bias", *bias, ScalarType::Float, {r.seen}) : nullptr;
  if (next_width < -1 || next_width > r.widest)
    fail(of.op, ": next_width must lie in -1..", r.widest, ", got ", next_width);
  decision.next_width = next_width;
  decision.bytes = n * element_size;
  decision.x_lane = x_lane.const_data_ptr();
  decision.u_lane = u_lane.const_data_ptr();
  decision.x0_lane = x0_lane.const_data_ptr();
  decision.x = x.mutable_data_ptr();
  decision.u = u.mutable_data_ptr();
  decision.top_x = top_x.mutable_data_ptr();
  decision.top_x0 = top_x0.mutable_data_ptr();
  kRun(decision, element_size, of.device);
}

}  // namespace flowfast
