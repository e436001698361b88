// flowfast::decide on the CPU: core/round.h for each chain, then the rows of winners, in place.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/copy_rows.h"
#include "cpu/round.h"
#include "cpu/rows.h"

namespace flowfast {
namespace {

constexpr char kOp[] = "decide";

// No element of the row is infinite or NaN: exponent bits all set.
template <class Bits, Bits kExponent>
bool all_finite(const void* row, int64_t n) {
  const Bits* bits = static_cast<const Bits*>(row);
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (bits[i] & kExponent) == kExponent;
  return bad == 0;
}

bool all_finite(const Tensor& latents, int64_t lane) {
  const int64_t n = latents.size(1);
  const void* row = row_start(latents, lane);
  switch (storage_of(latents)) {
    case kFloat32: return all_finite<uint32_t, 0x7f800000u>(row, n);
    case kBFloat16: return all_finite<uint16_t, 0x7f80u>(row, n);
    default: return all_finite<uint16_t, 0x7c00u>(row, n);
  }
}

// Rows of `to` from the lanes that source names; for the best samples also from older places, which only move down.
void take_rows(const Tensor& to, const Tensor& lanes, const int64_t* source, int64_t count, int64_t top,
               std::vector<RowCopy>& copies) {
  const int64_t bytes = to.size(1) * static_cast<int64_t>(to.element_size());
  const auto* from = static_cast<const char*>(lanes.const_data_ptr());
  auto* rows = static_cast<char*>(to.mutable_data_ptr());
  for (int64_t i = count - 1; i >= 0; --i) {
    if (source[i] >= 0) {
      copies.push_back({from + source[i] * bytes, rows + i * bytes});
    } else if (top > 1 && -1 - source[i] != i % top) {
      std::memcpy(rows + i * bytes, rows + (i - i % top - 1 - source[i]) * bytes, bytes);
    }
  }
}

void decide(const Tensor& rewards, double temperature, const std::optional<Tensor>& bias, const Tensor& chain,
            const Tensor& score, const Tensor& alive, const Tensor& slot, const Tensor& slot_real, const Tensor& given,
            const Tensor& quota_table, const Tensor& path_chain, const Tensor& path_candidate, const Tensor& top_reward,
            const Tensor& top_row, const Tensor& top_chain, const Tensor& top_candidate, const Tensor& accept,
            const Tensor& finished, const Tensor& time, const Tensor& linear_time, const Tensor& lane,
            const Tensor& lane_real, const Tensor& lane_live, const Tensor& live, const Tensor& x_lane,
            const Tensor& u_lane, const Tensor& x0_lane, const Tensor& x, const Tensor& u, const Tensor& top_x,
            const Tensor& top_x0, const Tensor& position, const Tensor& dense, const Tensor& status,
            const Tensor& advance, const Tensor& store_source, const Tensor& top_source, double margin, bool carry,
            int64_t passes, int64_t next_width) {
  Round r = round_of(kOp, chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live);
  const int64_t S = r.slots, B = r.batch(), K = r.lanes, T = r.transitions;
  if (top_reward.dim() != 2) fail(kOp, ": top_reward must have shape (slots, top), got ", shape_text(top_reward));
  r.top = top_reward.size(1);
  r.passes = passes;
  r.margin = static_cast<float>(margin);
  r.carry = carry;
  r.score = writable<float>(kOp, "score", score, ScalarType::Float, {kScoreRows, B});
  r.quota_table = readable<int64_t>(kOp, "quota_table", quota_table, ScalarType::Long, {B, T});
  r.path_chain = writable<int64_t>(kOp, "path_chain", path_chain, ScalarType::Long, {B, T});
  r.path_candidate = writable<int64_t>(kOp, "path_candidate", path_candidate, ScalarType::Long, {B, T});
  r.top_reward = writable<float>(kOp, "top_reward", top_reward, ScalarType::Float, {S, r.top});
  r.top_row = writable<int64_t>(kOp, "top_row", top_row, ScalarType::Long, {S, r.top});
  r.top_chain = writable<int64_t>(kOp, "top_chain", top_chain, ScalarType::Long, {S, r.top, T});
  r.top_candidate = writable<int64_t>(kOp, "top_candidate", top_candidate, ScalarType::Long, {S, r.top, T});
  r.accept = readable<bool>(kOp, "accept", accept, ScalarType::Bool, {T});
  r.finished = readable<bool>(kOp, "finished", finished, ScalarType::Bool, {T});
  r.position = writable<int64_t>(kOp, "position", position, ScalarType::Long, {B, K});
  r.dense = writable<float>(kOp, "dense", dense, ScalarType::Float, {B, K});
  r.status = writable<int64_t>(kOp, "status", status, ScalarType::Long, {B, K});
  r.advance = writable<int64_t>(kOp, "advance", advance, ScalarType::Long, {B});
  r.store_source = writable<int64_t>(kOp, "store_source", store_source, ScalarType::Long, {2 * B});
  r.top_source = writable<int64_t>(kOp, "top_source", top_source, ScalarType::Long, {S, r.top});
  check_latents(kOp, "x_lane", x_lane);
  const ScalarType dtype = x_lane.scalar_type();
  const int64_t n = x_lane.size(1);
  for (const auto& [name, latents, rows] : {std::tuple{"x_lane", &x_lane, r.widest}, {"u_lane", &u_lane, r.widest},
                                            {"x0_lane", &x0_lane, r.widest}, {"x", &x, 2 * B}, {"u", &u, 2 * B},
                                            {"top_x", &top_x, S * r.top}, {"top_x0", &top_x0, S * r.top}})
    check_operand(kOp, name, *latents, dtype, {rows, n});
  const int64_t seen = rewards.dim() == 1 ? rewards.size(0) : -1;
  if (seen < 0 || seen > r.widest) fail(kOp, ": rewards must have shape (N,), N up to ", r.widest, ", got ", shape_text(rewards));
  const float* reward = readable<float>(kOp, "rewards", rewards, ScalarType::Float, {seen});
  const float* offset = bias ? readable<float>(kOp, "bias", *bias, ScalarType::Float, {seen}) : nullptr;
  if (next_width < -1 || next_width > r.widest) fail(kOp, ": next_width must lie in -1..", r.widest, ", got ", next_width);

  const float none = -std::numeric_limits<float>::infinity();
  std::vector<float> scores(B * K, none);
  std::fill_n(r.dense, B * K, none);
  std::fill_n(r.position, B * K, 0);
  for (int64_t i = 0; i < seen && r.lane_live[i]; ++i) {
    const int64_t cell = r.of_lane(kCell, i), s = r.of_lane(kLaneSlot, i);
    if (cell < 0 || cell >= B * K || s < 0 || s >= S) fail(kOp, ": lane ", i, " names cell ", cell, " of slot ", s);
    r.position[cell] = i;
    // A reward may not see that the model broke (one that looks at 8-bit pictures): the posterior mean counts too.
    if (std::isnan(reward[i]) || !all_finite(x0_lane, i)) {
      ++r.of_slot(kNanRewards, s);
      continue;
    }
    r.dense[cell] = reward[i];
    scores[cell] = offset ? reward[i] / static_cast<float>(temperature) + offset[i] : reward[i];
  }
  for (int64_t i = 0; i < S * r.top; ++i) r.top_source[i] = -1 - i % r.top;
  for (int64_t b = 0; b < B; ++b) decide_chain(r, b, scores.data() + b * K);
  for (int64_t s = 0; s < S; ++s) stop_slot(r, s);

  std::vector<RowCopy> copies;
  take_rows(x, x_lane, r.store_source, 2 * B, 0, copies);
  take_rows(u, u_lane, r.store_source, 2 * B, 0, copies);
  take_rows(top_x, x_lane, r.top_source, S * r.top, r.top, copies);
  take_rows(top_x0, x0_lane, r.top_source, S * r.top, r.top, copies);
  copy_rows(copies, n * static_cast<int64_t>(x.element_size()));
  if (next_width >= 0) assign_lanes(r, next_width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("decide", TORCH_BOX(&decide)); }

}  // namespace flowfast
