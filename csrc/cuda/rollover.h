// One thread of flowfast::rollover: one chain.
#pragma once

#include "core/rollover.h"

namespace flowfast {

struct Rollover {
  const float* rewards;  // (chains, lanes)
  const bool* live;
  const int64_t* next_quota;
  bool carry;
  int64_t chains, lanes;
  int64_t* quota;
  float *threshold, *best_child;
  int64_t *winner, *advance, *used;
};

FF_HD inline void rollover_thread(const Rollover& task, int64_t b) {
  if (b >= task.chains) return;
  ChainState state{task.quota[b], task.threshold[b], task.best_child[b]};
  const RoundResult result = rollover_chain(task.rewards + b * task.lanes, task.live + b * task.lanes, task.lanes,
                                            task.next_quota[b], task.carry, state);
  task.quota[b] = state.quota;
  task.threshold[b] = state.threshold;
  task.best_child[b] = state.best_child;
  task.winner[b] = result.winner;
  task.advance[b] = result.advance;
  task.used[b] = result.used;
}

}  // namespace flowfast
