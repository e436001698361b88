// Running sums over any number of elements in a little shared memory: a tile of them at a time.
#pragma once

#include "cuda/layout.h"

namespace flowfast {

struct Tile {
  int64_t* sum;
  int64_t size;
};

// Calls f(first, n, before, end) for the n elements from `first` on of each tile: tile.sum[i] is value(0) + ... +
// value(first + i), before and end are the sums before the tile and at its end. f ends at a barrier.
template <class Block, class Value, class F>
FF_HD inline void scan_tiles(Block& block, int64_t count, const Tile& tile, const Value& value, const F& f) {
  int64_t before = 0;
  for (int64_t first = 0; first < count; first += tile.size) {
    const int64_t n = count - first < tile.size ? count - first : tile.size;
    block.each(n, [&](int64_t i) { tile.sum[i] = value(first + i) + (i == 0 ? before : 0); });
    block.scan(tile.sum, n, [](int64_t a, int64_t b) { return a + b; });
    const int64_t end = tile.sum[n - 1];
    f(first, n, before, end);
    before = end;
  }
}

}  // namespace flowfast
