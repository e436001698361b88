// flowfast::assign_lanes by a block of threads (cuda/block.h): core/round.h, the chains side by side.
#pragma once

#include "core/round.h"
#include "cuda/tiles.h"

namespace flowfast {

// The chains whose children are scored, or the others: their lanes stand behind the first `before`, at most `width` in
// all. Returns how many there are then.
template <class Block>
FF_HD inline int64_t assign_lanes_of(Block& block, const Round& r, bool scored, int64_t before, int64_t width,
                                     const Tile& tile) {
  const int64_t K = r.lanes;
  int64_t taken = before;
  scan_tiles(
      block, r.batch(), tile, [&](int64_t b) { return is_scored(r, b) == scored ? lanes_wanted(r, b) : 0; },
      [&](int64_t first, int64_t n, int64_t sum_before, int64_t sum_end) {
        block.each(n * K, [&](int64_t cell) {
          const int64_t c = cell / K, k = cell % K;
          if (is_scored(r, first + c) != scored) return;
          const int64_t i = before + (c > 0 ? tile.sum[c - 1] : sum_before) + k;
          place_cell(r, first + c, k, i < before + tile.sum[c] && i < width ? i : -1);
        });
        taken = before + sum_end;
      });
  return taken;
}

// Names the lanes that take the null pass, of those that are live.
template <class Block>
FF_HD inline void list_null_lanes(Block& block, const Round& r, int64_t live, const Tile& tile) {
  const auto guided = [&](int64_t i) { return is_guided(r, r.of_lane(kLaneTransition, i)); };
  int64_t count = 0;
  scan_tiles(
      block, live, tile, [&](int64_t i) { return guided(i) ? 1 : 0; },
      [&](int64_t first, int64_t n, int64_t, int64_t sum_end) {
        block.each(n, [&](int64_t c) {
          if (guided(first + c)) r.null_lane[tile.sum[c] - 1] = first + c;
        });
        count = sum_end;
      });
  block.each(r.widest - count, [&](int64_t i) { r.null_lane[count + i] = -1; });
}

template <class Block>
FF_HD inline void assign_lanes_block(Block& block, const Round& r, int64_t width, const Tile& tile) {
  const int64_t scored = assign_lanes_of(block, r, true, 0, width, tile);
  const int64_t wanted = assign_lanes_of(block, r, false, scored, width, tile);
  const int64_t live = wanted < width ? wanted : width;
  list_null_lanes(block, r, live, tile);
  block.each(r.widest - live, [&](int64_t i) { pad_lane(r, live + i); });
}

}  // namespace flowfast
