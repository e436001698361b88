// One round of rollover budget forcing for one chain; the maths of flowfast::rollover
// (Kim et al. 2025, arXiv 2503.19385, algorithm 1: accept the first candidate above the threshold, roll the rest over).
#pragma once

#include <cstdint>
#include <limits>

#include "common.h"

namespace flowfast {

enum Advance : int64_t { kStay = 0, kAccepted = 1, kSpent = 2, kDead = 3 };

struct ChainState {
  int64_t quota;     // candidates left for this step
  float threshold;   // r*; +inf: never accept
  float best_child;  // of this step, -inf: none yet
};

struct RoundResult {
  int64_t winner;   // lane of this round's new best child, -1: none
  int64_t advance;  // Advance
  int64_t used;     // candidates that counted
};

// rewards, live: the chain's K lanes; live lanes are a prefix. rewards: a pointer, or what has an operator[] like one.
// Updates the state in place.
template <class Rewards>
FF_HD inline RoundResult rollover_chain(const Rewards& rewards, const bool* live, int64_t lanes, int64_t next_quota,
                                        bool carry, ChainState& state) {
  RoundResult result{-1, kStay, 0};
  for (int64_t k = 0; k < lanes && live[k] && state.quota > 0 && result.advance == kStay; ++k) {
    ++result.used;
    --state.quota;
    const float reward = rewards[k];  // NaN loses both comparisons
    if (reward > state.best_child) {
      state.best_child = reward;
      result.winner = k;
    }
    if (reward > state.threshold) {
      state.threshold = reward;
      result.advance = kAccepted;
    } else if (state.quota == 0) {
      result.advance = kSpent;
    }
  }
  const float none = -std::numeric_limits<float>::infinity();
  if (result.advance == kSpent && state.best_child == none) result.advance = kDead;
  if (result.advance == kAccepted || result.advance == kSpent) {
    state.quota = (carry ? state.quota : 0) + next_quota;
    state.best_child = none;
  }
  return result;
}

}  // namespace flowfast
