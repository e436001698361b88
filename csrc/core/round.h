// The bookkeeping of one round of a search; the maths of flowfast::assign_lanes and flowfast::decide.
//
// S slots of C chains, B = S C; a chain proposes up to K lanes a round; T transitions. A *cell* is b K + k. Matrices of
// state are laid out one quantity a row, so that a quantity of all chains is contiguous.
#pragma once

#include <cstdint>
#include <limits>

#include "rollover.h"

namespace flowfast {

enum ChainRow { kActive, kRow, kQuota, kLeft, kTried, kChild, kChainRows };
enum ScoreRow { kThreshold, kBestChild, kChildReward, kReward, kScoreRows };
enum SlotRow { kKey, kNfe, kNfeSpeculative, kRewardCalls, kNanRewards, kSlotRows };
enum SlotRealRow { kGuidance, kUntil, kSlotRealRows };
enum LaneRow { kCell, kLaneSlot, kLaneTransition, kCandidate, kLaneChain, kLaneKey, kKernelRow, kParent, kLaneRows };
enum LaneRealRow { kTime, kLinearTime, kLaneGuidance, kLaneRealRows };
enum Status : int64_t { kSeen = 0, kBest = 1, kTaken = 2, kDiscarded = 3 };

struct Round {
  int64_t slots, chains, lanes, transitions, widest, top, passes;
  float margin;
  bool carry;
  // state
  int64_t* chain;       // (kChainRows, B)
  float* score;         // (kScoreRows, B)
  bool* alive;          // (B)
  int64_t* slot;        // (kSlotRows, S)
  const float* slot_real;  // (kSlotRealRows, S)
  const bool* given;    // (S)
  const int64_t* quota_table;                   // (B, T)
  int64_t *path_chain, *path_candidate;         // (B, T)
  float* top_reward;                            // (S, top)
  int64_t *top_row, *top_chain, *top_candidate; // (S, top), (S, top, T) twice
  // constants
  const bool *accept, *finished;     // (T)
  const float *time, *linear_time;   // (T + 1)
  // the lanes of a round
  int64_t* lane;      // (kLaneRows, widest)
  float* lane_real;   // (kLaneRealRows, widest)
  bool* lane_live;    // (widest)
  bool* live;         // (B, K)
  // what a round leaves
  int64_t* position;      // (B, K) lane of a live cell
  float* dense;           // (B, K) rewards by cell, -inf where there is none
  int64_t* status;        // (B, K) Status
  int64_t* advance;       // (B) Advance
  int64_t* store_source;  // (2 B) lane that goes into a row of the store, or -1
  int64_t* top_source;    // (S, top) lane, or -1 - j: the sample that stood at j

  FF_HD int64_t batch() const { return slots * chains; }
  FF_HD int64_t& of_chain(ChainRow what, int64_t b) const { return chain[what * batch() + b]; }
  FF_HD float& of_score(ScoreRow what, int64_t b) const { return score[what * batch() + b]; }
  FF_HD int64_t& of_slot(SlotRow what, int64_t s) const { return slot[what * slots + s]; }
  FF_HD int64_t& of_lane(LaneRow what, int64_t i) const { return lane[what * widest + i]; }
};

// Which child each lane evaluates next: live lanes first, chain by chain, at most `width` of them; the rest is padding.
FF_HD inline void assign_lanes(const Round& r, int64_t width) {
  const int64_t T = r.transitions, K = r.lanes;
  int64_t i = 0;
  for (int64_t b = 0; b < r.batch(); ++b) {
    const int64_t s = b / r.chains, row = r.of_chain(kRow, b);
    int64_t& quota = r.of_chain(kQuota, b);
    const int64_t available = r.of_chain(kLeft, b) - (T - 1 - row);  // every later transition keeps one back
    if (available < quota) quota = available;
    for (int64_t k = 0; k < K; ++k) {
      const bool live = r.alive[b] && k < quota && i < width;
      r.live[b * K + k] = live;
      if (!live) continue;
      r.of_lane(kCell, i) = b * K + k;
      r.of_lane(kLaneSlot, i) = s;
      r.of_lane(kLaneTransition, i) = row;
      r.of_lane(kCandidate, i) = r.of_chain(kTried, b) + k;
      r.of_lane(kLaneChain, i) = b % r.chains;
      r.of_lane(kLaneKey, i) = r.of_slot(kKey, s);
      r.of_lane(kKernelRow, i) = row == 0 && r.given[s] ? T : row;
      r.of_lane(kParent, i) = 2 * b + r.of_chain(kActive, b);
      r.lane_real[kTime * r.widest + i] = r.time[row];
      r.lane_real[kLinearTime * r.widest + i] = r.linear_time[row];
      r.lane_real[kLaneGuidance * r.widest + i] = r.slot_real[kGuidance * r.slots + s];
      r.lane_live[i++] = true;
    }
  }
  for (; i < r.widest; ++i) {
    for (int what = 0; what < kLaneRows; ++what) r.of_lane(static_cast<LaneRow>(what), i) = 0;
    r.of_lane(kKernelRow, i) = r.of_lane(kParent, i) = -1;
    r.lane_real[kTime * r.widest + i] = r.time[0];
    r.lane_real[kLinearTime * r.widest + i] = r.linear_time[0];
    r.lane_real[kLaneGuidance * r.widest + i] = 1.0f;
    r.lane_live[i] = false;
  }
}

// A finished sample joins the best of its slot, behind equals.
FF_HD inline void keep_finished(const Round& r, int64_t s, int64_t b, int64_t k) {
  const int64_t T = r.transitions, cell = b * r.lanes + k;
  const float reward = r.dense[cell];
  float* best = r.top_reward + s * r.top;
  if (!(reward > best[r.top - 1])) return;
  int64_t place = r.top - 1;
  for (; place > 0 && reward > best[place - 1]; --place) {
    const int64_t to = s * r.top + place;
    r.top_reward[to] = r.top_reward[to - 1];
    r.top_row[to] = r.top_row[to - 1];
    r.top_source[to] = r.top_source[to - 1];
    for (int64_t t = 0; t < T; ++t) {
      r.top_chain[to * T + t] = r.top_chain[(to - 1) * T + t];
      r.top_candidate[to * T + t] = r.top_candidate[(to - 1) * T + t];
    }
  }
  const int64_t to = s * r.top + place, row = r.of_chain(kRow, b);
  r.top_reward[to] = reward;
  r.top_row[to] = row;
  r.top_source[to] = r.position[cell];
  for (int64_t t = 0; t < T; ++t) {
    r.top_chain[to * T + t] = t == row ? b % r.chains : r.path_chain[b * T + t];
    r.top_candidate[to * T + t] = t == row ? r.of_chain(kTried, b) + k : r.path_candidate[b * T + t];
  }
}

// The rewards of a chain's children decide: accept, keep the best child, roll quota over, take the step.
// scores (K): what the children compete with. Returns evaluations that were spent; they count whether used or not.
FF_HD inline int64_t decide_chain(const Round& r, int64_t b, const float* scores) {
  const int64_t T = r.transitions, K = r.lanes, s = b / r.chains, c = b % r.chains;
  const float infinity = std::numeric_limits<float>::infinity();
  int64_t& row = r.of_chain(kRow, b);
  int64_t& tried = r.of_chain(kTried, b);
  const int64_t at = row < T - 1 ? row : T - 1, next = row < T - 1 ? row + 1 : T - 1;
  float& threshold = r.of_score(kThreshold, b);
  float& child_reward = r.of_score(kChildReward, b);
  ChainState state{r.of_chain(kQuota, b), r.accept[at] ? threshold + r.margin : infinity, r.of_score(kBestChild, b)};
  const bool* live = r.live + b * K;
  const RoundResult result = rollover_chain(scores, live, K, r.quota_table[b * T + next], r.carry, state);
  r.of_chain(kQuota, b) = state.quota;
  r.of_score(kBestChild, b) = state.best_child;
  r.advance[b] = result.advance;

  int64_t& active = r.of_chain(kActive, b);
  r.store_source[2 * b] = r.store_source[2 * b + 1] = -1;
  if (result.winner >= 0) {
    r.of_chain(kChild, b) = tried + result.winner;
    child_reward = r.dense[b * K + result.winner];
    r.store_source[2 * b + 1 - active] = r.position[b * K + result.winner];
  }
  int64_t spent = 0;
  for (int64_t k = 0; k < K; ++k) {
    const bool counted = live[k] && k < result.used;
    if (counted && r.finished[at]) keep_finished(r, s, b, k);
    r.status[b * K + k] = k == result.winner ? (result.advance == kAccepted ? kTaken : kBest)
                          : live[k] && !counted ? kDiscarded : kSeen;
    spent += live[k];
  }
  r.of_chain(kLeft, b) -= spent;
  tried += result.used;
  if (result.advance == kAccepted || result.advance == kSpent) {
    r.path_chain[b * T + at] = c;
    r.path_candidate[b * T + at] = r.of_chain(kChild, b);
    r.of_score(kReward, b) = child_reward;
    if (child_reward > threshold) threshold = child_reward;
    child_reward = -infinity;
    active = 1 - active;
    tried = 0;
    ++row;
  }
  r.alive[b] = r.alive[b] && result.advance != kDead && row < T;
  r.of_slot(kNfe, s) += spent * r.passes;
  r.of_slot(kNfeSpeculative, s) += (spent - result.used) * r.passes;
  r.of_slot(kRewardCalls, s) += spent;
  return spent;
}

// A slot stops as soon as a finished sample has the reward that was asked for.
FF_HD inline void stop_slot(const Round& r, int64_t s) {
  if (r.top_reward[s * r.top] < r.slot_real[kUntil * r.slots + s]) return;
  for (int64_t b = s * r.chains; b < (s + 1) * r.chains; ++b) r.alive[b] = false;
}

}  // namespace flowfast
