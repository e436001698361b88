// Operands of assign_lanes and decide, checked once, as core/round.h wants them; for the CPU and for CUDA.
#pragma once

#include <optional>
#include <tuple>

#include "core/round.h"
#include "cpu/checks.h"

namespace flowfast {

// The device that the first packed buffer names; all other operands must be there too.
inline int32_t round_device(const Tensor& ints) { return ints.is_cuda() ? ints.get_device_index() : kOnCpu; }

// A round in packed buffers (core/layout.h).
inline Round round_of(const char* op, const Tensor& ints, const Tensor& floats, const Tensor& flags,
                      const Sizes& sizes) {
  for (const auto& [name, size] : {std::pair{"slots", sizes.slots},
                                   {"chains", sizes.chains},
                                   {"lanes", sizes.lanes},
                                   {"transitions", sizes.transitions},
                                   {"top", sizes.top}})
    if (size < 1) fail(op, ": ", name, " must be at least 1, got ", size);
  Round r{};
  static_cast<Sizes&>(r) = sizes;
  const int32_t device = round_device(ints);
  const Extents extents = lay_out(sizes, nullptr, nullptr, nullptr, r);
  check_operand(op, "ints", ints, ScalarType::Long, {extents.ints}, device);
  check_operand(op, "floats", floats, ScalarType::Float, {extents.floats}, device);
  check_operand(op, "flags", flags, ScalarType::Bool, {extents.flags}, device);
  lay_out(sizes, static_cast<int64_t*>(ints.mutable_data_ptr()), static_cast<float*>(floats.mutable_data_ptr()),
          static_cast<bool*>(flags.mutable_data_ptr()), r);
  return r;
}

// What only the CPU can look at without making anyone wait.
inline void check_values(const char* op, const Round& r) {
  for (int64_t b = 0; b < r.batch(); ++b)
    if (r.alive[b] && (r.of_chain(kChainTransition, b) < 0 || r.of_chain(kChainTransition, b) >= r.transitions))
      fail(op, ": a live chain must stand at a transition in 0..", r.transitions - 1, ", chain ", b, " stands at ",
           r.of_chain(kChainTransition, b));
  for (int64_t t = 0; t < r.transitions; ++t)
    if (r.passes[t] < 1)
      fail(op, ": passes must be at least 1 at every transition, got ", r.passes[t], " at transition ", t);
}

// assign_lanes, checked; kRun(round, width, device) does the work.
template <void (*kRun)(const Round&, int64_t, int32_t)>
void assign_lanes_op(const Tensor& ints, const Tensor& floats, const Tensor& flags, int64_t slots, int64_t chains,
                     int64_t lanes, int64_t transitions, int64_t widest, int64_t top, int64_t width) {
  const char* op = "assign_lanes";
  if (widest < 0) fail(op, ": widest must be at least 0, got ", widest);
  const Round r = round_of(op, ints, floats, flags, {slots, chains, lanes, transitions, widest, top});
  if (width < 0 || width > widest) fail(op, ": width must lie in 0..", widest, ", got ", width);
  kRun(r, width, round_device(ints));
}

// decide, checked; kRun(decision, bytes of an element, device) does the work.
template <void (*kRun)(const Decision&, int64_t, int32_t)>
void decide_op(const Tensor& rewards, double temperature, const std::optional<Tensor>& bias, const Tensor& ints,
               const Tensor& floats, const Tensor& flags, const Tensor& x_lane, const Tensor& u_lane,
               const Tensor& x0_lane, const Tensor& x, const Tensor& u, const Tensor& top_x, const Tensor& top_x0,
               int64_t slots, int64_t lanes, int64_t transitions, double margin, bool carry, int64_t next_width) {
  const char* op = "decide";
  const int32_t device = round_device(ints);
  check_latents(op, "x_lane", x_lane, device);
  const int64_t n = x_lane.size(1), N = x_lane.size(0), element_size = static_cast<int64_t>(x_lane.element_size());
  if (slots < 1 || x.dim() != 2 || top_x.dim() != 2 || x.size(0) % (2 * slots) != 0 || top_x.size(0) % slots != 0)
    fail(op, ": expected x (2 * slots * chains, n) and top_x (slots * top, n) of ", slots, " slots, got ",
         shape_text(x), " and ", shape_text(top_x));
  Decision decision{};
  Round& r = decision.round;
  r = round_of(op, ints, floats, flags, {slots, x.size(0) / 2 / slots, lanes, transitions, N, top_x.size(0) / slots});
  r.margin = static_cast<float>(margin);
  r.carry = carry;
  r.temperature = static_cast<float>(temperature);
  for (const auto& [name, latents, rows] : {std::tuple{"u_lane", &u_lane, N},
                                            {"x0_lane", &x0_lane, N},
                                            {"x", &x, 2 * r.batch()},
                                            {"u", &u, 2 * r.batch()},
                                            {"top_x", &top_x, slots * r.top},
                                            {"top_x0", &top_x0, slots * r.top}})
    check_operand(op, name, *latents, x_lane.scalar_type(), {rows, n}, device);
  r.seen = rewards.dim() == 1 ? rewards.size(0) : -1;
  if (r.seen < 0 || r.seen > N) fail(op, ": rewards must have shape (N,), N up to ", N, ", got ", shape_text(rewards));
  check_operand(op, "rewards", rewards, ScalarType::Float, {r.seen}, device);
  if (bias) check_operand(op, "bias", *bias, ScalarType::Float, {r.seen}, device);
  if (next_width < -1 || next_width > N) fail(op, ": next_width must lie in -1..", N, ", got ", next_width);
  r.rewards = static_cast<const float*>(rewards.const_data_ptr());
  r.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  decision.next_width = next_width;
  decision.bytes = n * element_size;
  decision.x_lane = x_lane.const_data_ptr();
  decision.u_lane = u_lane.const_data_ptr();
  decision.x0_lane = x0_lane.const_data_ptr();
  decision.x = x.mutable_data_ptr();
  decision.u = u.mutable_data_ptr();
  decision.top_x = top_x.mutable_data_ptr();
  decision.top_x0 = top_x0.mutable_data_ptr();
  kRun(decision, element_size, device);
}

}  // namespace flowfast
