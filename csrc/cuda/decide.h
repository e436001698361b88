// flowfast::decide by the blocks of a grid (cuda/block.h), in one launch: core/round.h.
//
// Blocks of row b < B move the new best child of chain b, those of row B + s the best finished samples of slot s, each
// its columns, by what the state was before the round. Whichever block is done last then has the state to itself: it
// keeps the books and lays the lanes of the next round. Nobody waits for anybody.
//
// On the CPU a position out of range is an error; here nobody may wait for one, so its child has no reward.
#pragma once

#include <limits>

#include "cuda/assign_lanes.h"
#include "cuda/copy_rows.h"

namespace flowfast {

// Blocks of a row; one where there are no columns, for the books.
template <int kBytes>
FF_HD constexpr int64_t decide_chunks(const Decision& task) {
  return task.bytes > 0 ? copy_blocks(task.bytes, kBytes, kBlockThreads) : 1;
}

// One block's columns of a row, by one of its threads.
template <int kBytes>
FF_HD inline void move_row(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t bytes, int64_t chunk,
                           int64_t thread) {
  copy_row_thread<kBytes, kBlockThreads>(static_cast<const char*>(from) + row_offset(from_row, bytes),
                                         static_cast<char*>(to) + row_offset(to_row, bytes), bytes, chunk, thread);
}

template <int kBytes, class Block>
FF_HD inline void move_child(Block& block, const Decision& task, int64_t b, int64_t chunk) {
  const Round& r = task.round;
  const int64_t winner = judge_chain(r, b).winner;
  if (winner < 0) return;
  const int64_t from = r.position[b * r.lanes + winner], to = spare_row(r, b);
  block.each(kBlockThreads, [&](int64_t thread) {
    move_row<kBytes>(task.x_lane, from, task.x, to, task.bytes, chunk, thread);
    move_row<kBytes>(task.u_lane, from, task.u, to, task.bytes, chunk, thread);
  });
}

// A finished sample of this round. They are ranked by reward, equals by cell.
struct FreshSample {
  float reward;
  int64_t cell;

  FF_HD bool ranks_before(FreshSample other) const {
    return reward > other.reward || (reward == other.reward && cell < other.cell);
  }
};

// The first one of slot s that ranks behind `last`; reward -inf: there is none.
template <class Block>
FF_HD inline FreshSample next_sample(Block& block, const Round& r, int64_t s, FreshSample last) {
  const FreshSample none{kNone, std::numeric_limits<int64_t>::max()};
  const auto first = [](FreshSample a, FreshSample b) { return b.ranks_before(a) ? b : a; };
  const auto of_chain = [&](int64_t c) {
    const int64_t b = s * r.chains + c;
    FreshSample best = none;
    const int64_t used = joins_samples(r, b) ? judge_chain(r, b).used : 0;
    for (int64_t cell = b * r.lanes; cell < b * r.lanes + used; ++cell) {
      const FreshSample sample{reward_of(r, cell), cell};
      if (last.ranks_before(sample)) best = first(best, sample);
    }
    return best;
  };
  return block.reduce(r.chains, none, of_chain, first);
}

// Writes top_source of slot s; false: its best samples are those it had. Every block of the slot writes the same.
template <class Block>
FF_HD inline bool choose_best(Block& block, const Round& r, int64_t s) {
  const float* reward = r.top_reward + s * r.top;
  int64_t* source = r.top_source + s * r.top;
  FreshSample fresh = next_sample(block, r, s, {std::numeric_limits<float>::infinity(), -1});
  if (!(fresh.reward > reward[r.top - 1])) {
    block.each(r.top, [&](int64_t j) { source[j] = -1 - j; });
    return false;
  }
  int64_t kept = 0;
  for (int64_t j = 0; j < r.top; ++j) {
    const bool is_new = fresh.reward > reward[kept];  // behind equals
    block.once([&] { source[j] = is_new ? r.position[fresh.cell] : -1 - kept; });
    if (is_new)
      fresh = next_sample(block, r, s, fresh);
    else
      ++kept;
  }
  return true;
}

// Calls f(to, lane, from) from the last place of slot s up: what comes from another place comes from one further up, so
// it is read before it is written. lane is -1 where `from` is meant.
template <class F>
FF_HD inline void for_new_places(const Round& r, int64_t s, const F& f) {
  for (int64_t j = r.top - 1; j >= 0; --j) {
    const int64_t to = s * r.top + j, source = r.top_source[to];
    if (source == -1 - j) return;  // nothing is new before a sample that keeps its place
    f(to, source < 0 ? -1 : source, source < 0 ? s * r.top - 1 - source : -1);
  }
}

template <int kBytes, class Block>
FF_HD inline void move_samples(Block& block, const Decision& task, int64_t s, int64_t chunk) {
  if (!choose_best(block, task.round, s)) return;
  block.each(kBlockThreads, [&](int64_t thread) {
    for_new_places(task.round, s, [&](int64_t to, int64_t lane, int64_t from) {
      const bool is_new = lane >= 0;
      const int64_t row = is_new ? lane : from;
      move_row<kBytes>(is_new ? task.x_lane : task.top_x, row, task.top_x, to, task.bytes, chunk, thread);
      move_row<kBytes>(is_new ? task.x0_lane : task.top_x0, row, task.top_x0, to, task.bytes, chunk, thread);
    });
  });
}

// What decide_round does after the moves, and the next lanes.
template <class Block>
FF_HD inline void keep_books(Block& block, const Decision& task, const Tile& tile) {
  const Round& r = task.round;
  const int64_t columns = r.transitions + 1;
  block.each(r.slots * columns, [&](int64_t i) {
    for_new_places(r, i / columns, [&](int64_t to, int64_t lane, int64_t from) {
      if (lane >= 0)
        enter_best(r, to, r.of_lane(kCell, lane), i % columns);
      else
        move_best(r, to, from, i % columns);
    });
  });
  block.each(r.batch(), [&](int64_t b) {
    settle_chain(r, b, judge_chain(r, b), [](int64_t& sum, int64_t value) { Block::add(sum, value); });
    stop_chain(r, b);
  });
  block.each(r.widest, [&](int64_t i) { r.broken[i] = false; });
  if (task.next_width >= 0) assign_lanes_block(block, r, task.next_width, tile);
  block.once([&] { *r.ticket = 0; });
}

// Block `chunk` of a row; rows from B + S on have nothing to move. blocks: of the grid.
template <int kBytes, class Block>
FF_HD inline void decide_block(Block& block, const Decision& task, int64_t row, int64_t chunk, int64_t blocks,
                               const Tile& tile) {
  const int64_t B = task.round.batch();
  if (row < B)
    move_child<kBytes>(block, task, row, chunk);
  else if (row < B + task.round.slots)
    move_samples<kBytes>(block, task, row - B, chunk);
  if (block.take_ticket(task.round.ticket) == blocks - 1) keep_books(block, task, tile);
}

}  // namespace flowfast
