// The bookkeeping of one round of a search; the maths of flowfast::assign_lanes and flowfast::decide. It comes in
// pieces that do not touch each other's numbers: one thread walks through them here, the threads of a block share them
// in csrc/cuda.
//
// S slots of C chains, B = S C; a chain proposes up to K lanes a round; T transitions. A *cell* is b K + k. Matrices of
// state are laid out one quantity a row, so that a quantity of all chains is contiguous.
#pragma once

#include <cstdint>
#include <limits>

#include "common.h"
#include "layout.h"

namespace flowfast {

enum Advance : int64_t { kStay = 0, kAccepted = 1, kSpent = 2, kDead = 3 };
enum Status : int64_t { kSeen = 0, kBest = 1, kTaken = 2, kDiscarded = 3 };

struct Round : Sizes, Fields {
  float margin;
  bool carry;
  // what the lanes of the round are worth
  int64_t seen;  // lanes that came back: the first ones
  const float *rewards, *bias;  // (seen); bias may be null
  float temperature;

  FF_HD int64_t batch() const { return slots * chains; }
  FF_HD int64_t& of_chain(ChainRow what, int64_t b) const { return chain[what * batch() + b]; }
  FF_HD float& of_score(ScoreRow what, int64_t b) const { return score[what * batch() + b]; }
  FF_HD int64_t& of_slot(SlotRow what, int64_t s) const { return slot[what * slots + s]; }
  FF_HD int64_t& of_lane(LaneRow what, int64_t i) const { return lane[what * widest + i]; }
  // Transition that chain b stands at; a chain that is over stands behind the last one.
  FF_HD int64_t transition(int64_t b) const {
    const int64_t at = of_chain(kChainTransition, b);
    return at < 0 ? 0 : at < transitions ? at : transitions - 1;
  }
};

// A round and the latents that it moves: rows of `bytes` bytes.
struct Decision {
  Round round;
  int64_t bytes;
  const void *x_lane, *u_lane, *x0_lane;  // (widest)
  void *x, *u;  // (2 B)
  void *top_x, *top_x0;  // (S top)
  int64_t next_width;  // of assign_lanes, -1: none
};

// Which child each lane evaluates next.

// Lanes that chain b wants. Lowers its quota to what it may spend: what the later transitions cost is kept back.
FF_HD inline int64_t lanes_wanted(const Round& r, int64_t b) {
  int64_t& quota = r.of_chain(kQuota, b);
  const int64_t at = r.transition(b), spare = r.of_chain(kLeft, b) - r.to_end[at + 1];
  const int64_t may_try = spare > 0 ? spare / r.passes[at] : 0;
  if (may_try < quota) quota = may_try;
  if (!r.alive[b] || quota < 0) return 0;
  return quota < r.lanes ? quota : r.lanes;
}

// Does an evaluation at transition `at` take the null pass, too?
FF_HD inline bool is_guided(const Round& r, int64_t at) { return r.passes[at] == 2; }

// Child k of chain b goes to lane i, below 0 to none.
FF_HD inline void place_cell(const Round& r, int64_t b, int64_t k, int64_t i) {
  const int64_t cell = b * r.lanes + k;
  r.live[cell] = i >= 0;
  r.position[cell] = i >= 0 ? i : 0;
  if (i < 0) return;
  const int64_t s = b / r.chains, at = r.transition(b);
  r.of_lane(kCell, i) = cell;
  r.of_lane(kLaneSlot, i) = s;
  r.of_lane(kLaneTransition, i) = at;
  r.of_lane(kCandidate, i) = r.of_chain(kTried, b) + k;
  r.of_lane(kLaneChain, i) = r.of_slot(kFirstChain, s) + b % r.chains;
  r.of_lane(kLaneKey, i) = r.of_slot(kKey, s);
  r.of_lane(kTableRow, i) = at == 0 && r.given[s] ? r.transitions : at;
  r.of_lane(kParent, i) = 2 * b + r.of_chain(kActive, b);
  r.lane_real[kTime * r.widest + i] = r.time[at];
  r.lane_real[kLinearTime * r.widest + i] = r.linear_time[at];
  r.lane_real[kLaneGuidance * r.widest + i] = is_guided(r, at) ? r.slot_real[kGuidance * r.slots + s] : 1.0f;
  r.lane_live[i] = true;
}

FF_HD inline void pad_lane(const Round& r, int64_t i) {
  for (int what = 0; what < kLaneRows; ++what) r.of_lane(static_cast<LaneRow>(what), i) = 0;
  r.of_lane(kTableRow, i) = r.of_lane(kParent, i) = -1;
  r.lane_real[kTime * r.widest + i] = r.time[0];
  r.lane_real[kLinearTime * r.widest + i] = r.linear_time[0];
  r.lane_real[kLaneGuidance * r.widest + i] = 1.0f;
  r.lane_live[i] = false;
}

// Is the score of chain b's children read, where it stands?
FF_HD inline bool is_scored(const Round& r, int64_t b) { return r.scored[r.transition(b)]; }

// Live lanes first, those that are scored before the others, chain by chain, at most `width` of them; the rest is
// padding. null_lane names those that take the null pass.
inline void assign_lanes(const Round& r, int64_t width) {
  int64_t i = 0;
  for (int others = 0; others < 2; ++others)
    for (int64_t b = 0; b < r.batch(); ++b) {
      if (is_scored(r, b) == others) continue;
      const int64_t wanted = lanes_wanted(r, b);
      for (int64_t k = 0; k < r.lanes; ++k) place_cell(r, b, k, k < wanted && i < width ? i++ : -1);
    }
  int64_t guided = 0;
  for (int64_t lane = 0; lane < i; ++lane)
    if (is_guided(r, r.of_lane(kLaneTransition, lane))) r.null_lane[guided++] = lane;
  for (; guided < r.widest; ++guided) r.null_lane[guided] = -1;
  for (; i < r.widest; ++i) pad_lane(r, i);
}

// What the rewards decide.

constexpr float kNone = -std::numeric_limits<float>::infinity();

FF_HD inline bool is_finite(float value) { return value - value == 0.0f; }

FF_HD inline bool has_lane(const Round& r, int64_t cell) {
  return r.live[cell] && r.position[cell] >= 0 && r.position[cell] < r.widest;
}

// Did a reward come for this cell?
FF_HD inline bool was_seen(const Round& r, int64_t cell) {
  return is_scored(r, cell / r.lanes) && has_lane(r, cell) && r.position[cell] < r.seen;
}

// A reward may not see that the model broke, or that a picture is not finite: in 8 bits NaN is black.
FF_HD inline bool is_unsound(const Round& r, int64_t i) {
  return r.rewards[i] != r.rewards[i] || r.broken[i] || !is_finite(r.image_sum[i]);
}

// Reward of a cell, kNone where there is none. Whose score nobody reads stands with 0, unless the model broke.
FF_HD inline float reward_of(const Round& r, int64_t cell) {
  if (!is_scored(r, cell / r.lanes)) return has_lane(r, cell) && !r.broken[r.position[cell]] ? 0.0f : kNone;
  return was_seen(r, cell) && !is_unsound(r, r.position[cell]) ? r.rewards[r.position[cell]] : kNone;
}

// What the children of chain b compete with.
struct Scores {
  const Round& r;
  int64_t b;

  FF_HD float operator[](int64_t k) const {
    const int64_t cell = b * r.lanes + k;
    const float reward = reward_of(r, cell);
    if (reward == kNone || !is_scored(r, b)) return reward;
    const float centred = reward - r.centre[r.transition(b)];
    return r.bias ? centred / r.temperature + r.bias[r.position[cell]] : centred;
  }
};

struct Verdict {
  int64_t winner;  // lane of this round's new best child, -1: none
  int64_t advance;  // Advance
  int64_t used;  // candidates that counted
  int64_t quota;  // of the chain, afterwards
  float best_child;
};

// The rule of rollover budget forcing (Kim et al. 2025, arXiv 2503.19385, algorithm 1) for the children of chain b, a
// prefix of its lanes: the first one above `bar` is taken at once, and what is left of the quota rolls over. NaN loses
// every comparison; so do ties.
template <class Rewards>
FF_HD inline Verdict choose(const Rewards& rewards, const bool* live, int64_t lanes, int64_t next_quota, bool carry,
                            float bar, int64_t quota, float best_child) {
  Verdict verdict{-1, kStay, 0, quota, best_child};
  for (int64_t k = 0; k < lanes && live[k] && verdict.quota > 0 && verdict.advance == kStay; ++k) {
    ++verdict.used;
    --verdict.quota;
    const float reward = rewards[k];
    if (reward > verdict.best_child) {
      verdict.best_child = reward;
      verdict.winner = k;
    }
    if (reward > bar)
      verdict.advance = kAccepted;
    else if (verdict.quota == 0)
      verdict.advance = kSpent;
  }
  if (verdict.advance == kSpent && verdict.best_child == kNone) verdict.advance = kDead;
  if (verdict.advance == kAccepted || verdict.advance == kSpent) {
    verdict.quota = (carry ? verdict.quota : 0) + next_quota;
    verdict.best_child = kNone;
  }
  return verdict;
}

// A child that was alone goes on whatever its reward, for there was nothing to decide; but not where the model broke.
FF_HD inline bool goes_on_alone(const Round& r, int64_t b, const Verdict& verdict) {
  const int64_t cell = b * r.lanes;
  return verdict.advance == kDead && r.of_chain(kTried, b) + verdict.used == 1 && was_seen(r, cell) &&
         !r.broken[r.position[cell]];
}

// What becomes of chain b. Changes nothing.
FF_HD inline Verdict judge_chain(const Round& r, int64_t b) {
  const int64_t at = r.transition(b), next = at < r.transitions - 1 ? at + 1 : at;
  const bool greedy = r.accept[at] && r.scored[at];
  const float bar = greedy ? r.of_score(kThreshold, b) + r.margin : std::numeric_limits<float>::infinity();
  const int64_t next_quota = r.quota_table[b * r.transitions + next];
  Verdict verdict = choose(Scores{r, b}, r.live + b * r.lanes, r.lanes, next_quota, r.carry, bar, r.of_chain(kQuota, b),
                           r.of_score(kBestChild, b));
  if (goes_on_alone(r, b, verdict)) {
    verdict.winner = 0, verdict.advance = kSpent;
    verdict.quota = next_quota;
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
  const bool scored = is_scored(r, b);
  int64_t& tried = r.of_chain(kTried, b);
  float& threshold = r.of_score(kThreshold, b);
  float& child_reward = r.of_score(kChildReward, b);
  int64_t spent = 0, unsound = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t cell = b * K + k;
    // What nobody scored has no value: NaN, which no score is.
    r.dense[cell] = !scored && r.live[cell] ? std::numeric_limits<float>::quiet_NaN() : reward_of(r, cell);
    r.status[cell] = k == verdict.winner                 ? (verdict.advance == kAccepted ? kTaken : kBest)
                     : r.live[cell] && k >= verdict.used ? kDiscarded
                                                         : kSeen;
    spent += r.live[cell];
    unsound += was_seen(r, cell) && is_unsound(r, r.position[cell]);
  }
  r.of_chain(kQuota, b) = verdict.quota;
  r.of_score(kBestChild, b) = verdict.best_child;
  r.advance[b] = verdict.advance;
  r.store_source[2 * b] = r.store_source[2 * b + 1] = -1;
  if (verdict.winner >= 0) {
    r.of_chain(kChild, b) = tried + verdict.winner;
    if (scored) child_reward = r.dense[b * K + verdict.winner];
    r.store_source[spare_row(r, b)] = r.position[b * K + verdict.winner];
  }
  r.of_chain(kLeft, b) -= spent * r.passes[at];
  tried += verdict.used;
  if (verdict.advance == kAccepted || verdict.advance == kSpent) {
    r.path_chain[b * T + at] = b % r.chains;
    r.path_candidate[b * T + at] = r.of_chain(kChild, b);
    if (scored) {
      r.of_score(kReward, b) = child_reward;
      if (child_reward - r.centre[at] > threshold) threshold = child_reward - r.centre[at];
      child_reward = kNone;
    }
    r.of_chain(kActive, b) = 1 - r.of_chain(kActive, b);
    tried = 0;
    ++r.of_chain(kChainTransition, b);
  }
  r.alive[b] = r.alive[b] && verdict.advance != kDead && r.of_chain(kChainTransition, b) < T;
  add(r.of_slot(kNfe, s), spent * r.passes[at]);
  add(r.of_slot(kNfeSpeculative, s), (spent - verdict.used) * r.passes[at]);
  add(r.of_slot(kRewardCalls, s), scored ? spent : 0);
  add(r.of_slot(kNanRewards, s), unsound);
  add(r.of_slot(kEvaluations, s), spent);
}

// The best finished samples of a slot, `to` and `from` counted over all slots. Column t < T: the path; T: the rest.
FF_HD inline void move_best(const Round& r, int64_t to, int64_t from, int64_t t) {
  const int64_t T = r.transitions;
  if (t == T) {
    r.top_reward[to] = r.top_reward[from];
    r.top_transition[to] = r.top_transition[from];
  } else {
    r.top_chain[to * T + t] = r.top_chain[from * T + t];
    r.top_candidate[to * T + t] = r.top_candidate[from * T + t];
  }
}

// The sample of a cell takes place `to`, before its chain is settled.
FF_HD inline void enter_best(const Round& r, int64_t to, int64_t cell, int64_t t) {
  const int64_t T = r.transitions, b = cell / r.lanes, at = r.of_chain(kChainTransition, b);
  if (t == T) {
    r.top_reward[to] = reward_of(r, cell);
    r.top_transition[to] = at;
  } else {
    r.top_chain[to * T + t] = t == at ? b % r.chains : r.path_chain[b * T + t];
    r.top_candidate[to * T + t] = t == at ? r.of_chain(kTried, b) + cell % r.lanes : r.path_candidate[b * T + t];
  }
}

// Are the children of chain b finished samples with a score?
FF_HD inline bool joins_samples(const Round& r, int64_t b) { return r.finished[r.transition(b)] && is_scored(r, b); }

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
    if (joins_samples(r, b))
      for (int64_t k = 0; k < verdict.used; ++k) keep_finished(r, b * r.lanes + k);
    settle_chain(r, b, verdict, [](int64_t& sum, int64_t value) { sum += value; });
  }
  for (int64_t b = 0; b < r.batch(); ++b) stop_chain(r, b);
  for (int64_t i = 0; i < r.widest; ++i) r.broken[i] = false;
}

}  // namespace flowfast
