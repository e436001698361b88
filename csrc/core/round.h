// The bookkeeping of one round of a search; the maths of flowfast::assign_lanes and flowfast::decide. It comes in
// pieces that do not touch each other's numbers: one thread walks through them here, the threads of a block share them
// in csrc/cuda.
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
  // what the lanes of the round are worth
  int64_t seen;                 // lanes that came back
  const float *rewards, *bias;  // (seen); bias may be null
  float temperature;
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
  int64_t* position;  // (B, K) lane of a live cell, else 0
  bool* broken;       // (widest) posterior means that are not finite
  // what a round leaves
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
  // Transition that chain b stands at; a chain that is over stands behind the last one.
  FF_HD int64_t transition(int64_t b) const {
    const int64_t row = of_chain(kRow, b);
    return row < 0 ? 0 : row < transitions ? row : transitions - 1;
  }
};

// A round and the latents that it moves: rows of `bytes` bytes.
struct Decision {
  Round round;
  int64_t bytes;
  const void *x_lane, *u_lane, *x0_lane;  // (widest)
  void *x, *u;                            // (2 B)
  void *top_x, *top_x0;                   // (S top)
  int64_t next_width;                     // of assign_lanes, -1: none
  int32_t* ticket;                        // blocks of a grid that are done, 0 between rounds
};

// Which child each lane evaluates next.

// Lanes that chain b wants. Lowers its quota to what it may spend: every later transition keeps one evaluation back.
FF_HD inline int64_t lanes_wanted(const Round& r, int64_t b) {
  int64_t& quota = r.of_chain(kQuota, b);
  const int64_t available = r.of_chain(kLeft, b) - (r.transitions - 1 - r.of_chain(kRow, b));
  if (available < quota) quota = available;
  if (!r.alive[b] || quota < 0) return 0;
  return quota < r.lanes ? quota : r.lanes;
}

// Child k of chain b goes to lane i, below 0 to none.
FF_HD inline void place_cell(const Round& r, int64_t b, int64_t k, int64_t i) {
  const int64_t cell = b * r.lanes + k;
  r.live[cell] = i >= 0;
  r.position[cell] = i >= 0 ? i : 0;
  if (i < 0) return;
  const int64_t s = b / r.chains, row = r.transition(b);
  r.of_lane(kCell, i) = cell;
  r.of_lane(kLaneSlot, i) = s;
  r.of_lane(kLaneTransition, i) = row;
  r.of_lane(kCandidate, i) = r.of_chain(kTried, b) + k;
  r.of_lane(kLaneChain, i) = b % r.chains;
  r.of_lane(kLaneKey, i) = r.of_slot(kKey, s);
  r.of_lane(kKernelRow, i) = row == 0 && r.given[s] ? r.transitions : row;
  r.of_lane(kParent, i) = 2 * b + r.of_chain(kActive, b);
  r.lane_real[kTime * r.widest + i] = r.time[row];
  r.lane_real[kLinearTime * r.widest + i] = r.linear_time[row];
  r.lane_real[kLaneGuidance * r.widest + i] = r.slot_real[kGuidance * r.slots + s];
  r.lane_live[i] = true;
}

FF_HD inline void pad_lane(const Round& r, int64_t i) {
  for (int what = 0; what < kLaneRows; ++what) r.of_lane(static_cast<LaneRow>(what), i) = 0;
  r.of_lane(kKernelRow, i) = r.of_lane(kParent, i) = -1;
  r.lane_real[kTime * r.widest + i] = r.time[0];
  r.lane_real[kLinearTime * r.widest + i] = r.linear_time[0];
  r.lane_real[kLaneGuidance * r.widest + i] = 1.0f;
  r.lane_live[i] = false;
}

// Live lanes first, chain by chain, at most `width` of them; the rest is padding.
inline void assign_lanes(const Round& r, int64_t width) {
  int64_t i = 0;
  for (int64_t b = 0; b < r.batch(); ++b) {
    const int64_t wanted = lanes_wanted(r, b);
    for (int64_t k = 0; k < r.lanes; ++k) place_cell(r, b, k, k < wanted && i < width ? i++ : -1);
  }
  for (; i < r.widest; ++i) pad_lane(r, i);
}

// What the rewards decide.

FF_HD inline bool was_seen(const Round& r, int64_t cell) {
  return r.live[cell] && r.position[cell] >= 0 && r.position[cell] < r.seen;
}

// A reward may not see that the model broke (one that looks at 8-bit pictures): the posterior mean counts too.
FF_HD inline bool is_unsound(const Round& r, int64_t i) { return r.rewards[i] != r.rewards[i] || r.broken[i]; }

// Reward of a cell, -inf where there is none.
FF_HD inline float reward_of(const Round& r, int64_t cell) {
  if (!was_seen(r, cell) || is_unsound(r, r.position[cell])) return -std::numeric_limits<float>::infinity();
  return r.rewards[r.position[cell]];
}

// What the children of chain b compete with.
struct Scores {
  const Round& r;
  int64_t b;

  FF_HD float operator[](int64_t k) const {
    const int64_t cell = b * r.lanes + k;
    const float reward = reward_of(r, cell);
    const bool is_none = reward == -std::numeric_limits<float>::infinity();
    return is_none || !r.bias ? reward : reward / r.temperature + r.bias[r.position[cell]];
  }
};

struct Verdict {
  RoundResult result;
  ChainState state;  // afterwards
};

// A child that was alone goes on whatever its reward, for there was nothing to decide; but not where the model broke.
FF_HD inline bool goes_on_alone(const Round& r, int64_t b, const RoundResult& result) {
  const int64_t cell = b * r.lanes;
  return result.advance == kDead && r.of_chain(kTried, b) + result.used == 1 && was_seen(r, cell) &&
         !r.broken[r.position[cell]];
}

// The children of chain b by the rules of core/rollover.h. Changes nothing.
FF_HD inline Verdict judge_chain(const Round& r, int64_t b) {
  const int64_t at = r.transition(b), next = at < r.transitions - 1 ? at + 1 : at;
  const float bar = r.accept[at] ? r.of_score(kThreshold, b) + r.margin : std::numeric_limits<float>::infinity();
  const int64_t next_quota = r.quota_table[b * r.transitions + next];
  Verdict verdict{{}, {r.of_chain(kQuota, b), bar, r.of_score(kBestChild, b)}};
  verdict.result = rollover_chain(Scores{r, b}, r.live + b * r.lanes, r.lanes, next_quota, r.carry, verdict.state);
  if (goes_on_alone(r, b, verdict.result)) {
    verdict.result.winner = 0, verdict.result.advance = kSpent;
    verdict.state.quota = next_quota;
  }
  return verdict;
}

// Row of the store that chain b's new best child goes to: the one that its parent does not stand in.
FF_HD inline int64_t spare_row(const Round& r, int64_t b) { return 2 * b + 1 - r.of_chain(kActive, b); }

// Keeps the best child, rolls quota over, takes the step. add(sum, value): counts for the slot, which chains share;
// evaluations count whether they were used or not.
template <class Add>
FF_HD inline void settle_chain(const Round& r, int64_t b, const Verdict& verdict, const Add& add) {
  const int64_t T = r.transitions, K = r.lanes, s = b / r.chains, at = r.transition(b);
  const RoundResult& result = verdict.result;
  int64_t& tried = r.of_chain(kTried, b);
  int64_t& row = r.of_chain(kRow, b);
  float& threshold = r.of_score(kThreshold, b);
  float& child_reward = r.of_score(kChildReward, b);
  int64_t spent = 0, unsound = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t cell = b * K + k;
    r.dense[cell] = reward_of(r, cell);
    r.status[cell] = k == result.winner ? (result.advance == kAccepted ? kTaken : kBest)
                     : r.live[cell] && k >= result.used ? kDiscarded : kSeen;
    spent += r.live[cell];
    unsound += was_seen(r, cell) && is_unsound(r, r.position[cell]);
  }
  r.of_chain(kQuota, b) = verdict.state.quota;
  r.of_score(kBestChild, b) = verdict.state.best_child;
  r.advance[b] = result.advance;
  r.store_source[2 * b] = r.store_source[2 * b + 1] = -1;
  if (result.winner >= 0) {
    r.of_chain(kChild, b) = tried + result.winner;
    child_reward = r.dense[b * K + result.winner];
    r.store_source[spare_row(r, b)] = r.position[b * K + result.winner];
  }
  r.of_chain(kLeft, b) -= spent;
  tried += result.used;
  if (result.advance == kAccepted || result.advance == kSpent) {
    r.path_chain[b * T + at] = b % r.chains;
    r.path_candidate[b * T + at] = r.of_chain(kChild, b);
    r.of_score(kReward, b) = child_reward;
    if (child_reward > threshold) threshold = child_reward;
    child_reward = -std::numeric_limits<float>::infinity();
    r.of_chain(kActive, b) = 1 - r.of_chain(kActive, b);
    tried = 0;
    ++row;
  }
  r.alive[b] = r.alive[b] && result.advance != kDead && row < T;
  add(r.of_slot(kNfe, s), spent * r.passes);
  add(r.of_slot(kNfeSpeculative, s), (spent - result.used) * r.passes);
  add(r.of_slot(kRewardCalls, s), spent);
  add(r.of_slot(kNanRewards, s), unsound);
}

// The best finished samples of a slot, `to` and `from` counted over all slots. Column t < T: the path; T: the rest.
FF_HD inline void move_best(const Round& r, int64_t to, int64_t from, int64_t t) {
  const int64_t T = r.transitions;
  if (t == T) {
    r.top_reward[to] = r.top_reward[from];
    r.top_row[to] = r.top_row[from];
  } else {
    r.top_chain[to * T + t] = r.top_chain[from * T + t];
    r.top_candidate[to * T + t] = r.top_candidate[from * T + t];
  }
}

// The sample of a cell takes place `to`, before its chain is settled.
FF_HD inline void enter_best(const Round& r, int64_t to, int64_t cell, int64_t t) {
  const int64_t T = r.transitions, b = cell / r.lanes, row = r.of_chain(kRow, b);
  if (t == T) {
    r.top_reward[to] = reward_of(r, cell);
    r.top_row[to] = row;
  } else {
    r.top_chain[to * T + t] = t == row ? b % r.chains : r.path_chain[b * T + t];
    r.top_candidate[to * T + t] = t == row ? r.of_chain(kTried, b) + cell % r.lanes : r.path_candidate[b * T + t];
  }
}

// A finished sample joins the best of its slot, behind equals.
inline void keep_finished(const Round& r, int64_t cell) {
  const int64_t first = cell / r.lanes / r.chains * r.top;
  const float reward = reward_of(r, cell);
  int64_t to = first + r.top - 1;
  if (!(reward > r.top_reward[to])) return;
  for (; to > first && reward > r.top_reward[to - 1]; --to) {
    r.top_source[to] = r.top_source[to - 1];
    for (int64_t t = 0; t <= r.transitions; ++t) move_best(r, to, to - 1, t);
  }
  r.top_source[to] = r.position[cell];
  for (int64_t t = 0; t <= r.transitions; ++t) enter_best(r, to, cell, t);
}

// A slot's chains stop as soon as a finished sample has the reward that was asked for.
FF_HD inline void stop_chain(const Round& r, int64_t b) {
  const int64_t s = b / r.chains;
  if (!(r.top_reward[s * r.top] < r.slot_real[kUntil * r.slots + s])) r.alive[b] = false;
}

// All of it but the latents and the next lanes.
inline void decide_round(const Round& r) {
  for (int64_t i = 0; i < r.slots * r.top; ++i) r.top_source[i] = -1 - i % r.top;
  for (int64_t b = 0; b < r.batch(); ++b) {
    const Verdict verdict = judge_chain(r, b);
    if (r.finished[r.transition(b)])
      for (int64_t k = 0; k < verdict.result.used; ++k) keep_finished(r, b * r.lanes + k);
    settle_chain(r, b, verdict, [](int64_t& sum, int64_t value) { sum += value; });
  }
  for (int64_t b = 0; b < r.batch(); ++b) stop_chain(r, b);
  for (int64_t i = 0; i < r.widest; ++i) r.broken[i] = false;
}

}  // namespace flowfast
