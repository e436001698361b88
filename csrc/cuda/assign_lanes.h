// flowfast::assign_lanes by a block of threads (cuda/block.h): core/round.h, the chains side by side.
#pragma once

#include "core/round.h"
#include "cuda/tiles.h"

namespace flowfast {

template <class Block>
FF_HD inline void assign_lanes_block(Block& block, const Round& r, int64_t width, const Tile& tile) {
  const int64_t K = r.lanes;
  int64_t live = 0;
  scan_tiles(
      block, r.batch(), tile, [&](int64_t b) { return lanes_wanted(r, b); },
      [&](int64_t first, int64_t n, int64_t before, int64_t end) {
        block.each(n * K, [&](int64_t cell) {
          const int64_t c = cell / K, k = cell % K, i = (c > 0 ? tile.sum[c - 1] : before) + k;
          place_cell(r, first + c, k, i < tile.sum[c] && i < width ? i : -1);
        });
        live = end < width ? end : width;
      });
  block.each(r.widest - live, [&](int64_t i) { pad_lane(r, live + i); });
}

}  // namespace flowfast
