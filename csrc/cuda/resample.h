// flowfast::resample for one slot by a block of threads (cuda/block.h): the integers of core/resample.h, each step for
// all particles of a tile at once, so the ancestors are the same as one thread's. What is between the steps lies in
// shared memory and in the ancestors. A slot of several tiles goes through all draws for each.
#pragma once

#include "core/resample.h"
#include "cuda/tiles.h"

namespace flowfast {

template <class scalar>
struct Resample {
  const scalar* weights;  // (slots, n)
  const int64_t *key, *row;
  const bool* enabled;
  int64_t scheme, slots, n;
  int64_t* ancestors;  // (slots, n)
};

// Word of one element of the slot's stream.
FF_HD inline uint32_t resampling_word(int64_t key, int64_t row, int64_t element) {
  const Address address{static_cast<uint32_t>(key), static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32), 0,
                        row_word(row, kResampling), 0};
  const int64_t block = element / kBlock, plane = element % kBlock / kCounters;
  const FourWords c = philox(address, static_cast<uint32_t>(block * kCounters + element % kCounters));
  // Not word[plane]: registers have no index.
  return plane < 2 ? (plane == 0 ? c.word[0] : c.word[1]) : (plane == 2 ? c.word[2] : c.word[3]);
}

struct WeightTotal {
  int64_t sum, wrong;  // wrong: how many are no weights
};

// Offspring counts; false where the weights are no distribution. marks: as many numbers as a tile. See count_offspring.
template <class scalar, class Block>
FF_HD inline bool count_offspring_block(Block& block, const Resample<scalar>& task, int64_t slot, int64_t* counts,
                                        const Tile& tile, int64_t* marks) {
  const int64_t n = task.n, scheme = task.scheme, key = task.key[slot], row = task.row[slot];
  const scalar* weights = task.weights + row_offset(slot, n);
  const WeightTotal all = block.reduce(
      n, WeightTotal{0, 0},
      [&](int64_t i) {
        const int64_t weight = quantize_weight(weights[i]);
        return WeightTotal{weight, weight < 0};
      },
      [](WeightTotal a, WeightTotal b) { return WeightTotal{a.sum + b.sum, a.wrong + b.wrong}; });
  const int64_t total = all.sum;
  if (all.wrong > 0 || total < kWeightOne / 2 || total > 2 * kWeightOne) return false;

  // The whole copies are settled; what remains, in units of 1 / total, takes the place of the weights.
  const bool has_whole = scheme == kResidual || scheme == kSsp;
  const auto part = [&](int64_t i) {
    const int64_t weight = quantize_weight(weights[i]);
    return has_whole ? n * weight % total : weight;
  };
  block.each(n, [&](int64_t i) { counts[i] = has_whole ? n * quantize_weight(weights[i]) / total : 0; });
  const int64_t range = has_whole ? block.reduce(n, int64_t{0}, part, [](int64_t a, int64_t b) { return a + b; })
                                  : total;
  const int64_t draws = has_whole ? range / total : n;

  int64_t open = 0;  // particle of the Srinivasan process that is open before the tile
  scan_tiles(block, n, tile, part, [&](int64_t first, int64_t size, int64_t before, int64_t end) {
    if (scheme == kSsp) {
      const auto held = [&](int64_t i) { return (i > 0 ? tile.sum[i - 1] : before) % total; };
      const auto rest = [&](int64_t i) { return tile.sum[i] - (i > 0 ? tile.sum[i - 1] : before); };
      // marks[i]: the particle that is open after meeting particle first + i.
      block.each(size, [&](int64_t i) {
        const int64_t j = first + i;
        marks[i] = j > 0 && ssp_takes_over(held(i), rest(i), total, resampling_word(key, row, j)) ? j : open;
      });
      block.scan(marks, size, [](int64_t a, int64_t b) { return a > b ? a : b; });
      const int64_t last = marks[size - 1];
      block.each(size, [&](int64_t i) {
        const int64_t j = first + i;
        if (j == 0 || held(i) + rest(i) < total) return;
        block.add(counts[marks[i] != j ? j : i > 0 ? marks[i - 1] : open], 1);
      });
      open = last;
      return;
    }
    block.each(draws, [&](int64_t i) {
      const int64_t offset = scale_by_word(resampling_word(key, row, scheme == kSystematic ? 0 : i), range);
      const bool spread = scheme == kStratified || scheme == kSystematic;
      const int64_t target = spread ? (i * total + offset) / n : offset;
      if (target >= before && target < end) block.add(counts[first + find_target(tile.sum, size, target)], 1);
    });
  });
  return true;
}

template <class scalar, class Block>
FF_HD inline void resample_block(Block& block, const Resample<scalar>& task, int64_t slot, const Tile& tile,
                                 int64_t* marks) {
  const int64_t n = task.n;
  int64_t* ancestors = task.ancestors + row_offset(slot, n);
  if (!task.enabled[slot] || !count_offspring_block(block, task, slot, ancestors, tile, marks)) {
    block.each(n, [&](int64_t i) { ancestors[i] = i; });
    return;
  }
  // The further copies, in order of index, go to the slots without offspring, in order of index: the d-th dead slot
  // takes the first j whose running sum of further copies reaches d. It is told by a number below 0: first -d, then
  // -n - 1 - j.
  scan_tiles(
      block, n, tile, [&](int64_t i) { return int64_t{ancestors[i] == 0}; },
      [&](int64_t first, int64_t size, int64_t, int64_t) {
        block.each(size, [&](int64_t i) {
          if (ancestors[first + i] == 0) ancestors[first + i] = -tile.sum[i];
        });
      });
  scan_tiles(
      block, n, tile, [&](int64_t i) { return ancestors[i] > 0 ? ancestors[i] - 1 : 0; },
      [&](int64_t first, int64_t size, int64_t before, int64_t end) {
        block.each(n, [&](int64_t i) {
          const int64_t d = -ancestors[i];
          if (d > before && d <= end) ancestors[i] = -n - 1 - (first + find_target(tile.sum, size, d - 1));
        });
      });
  block.each(n, [&](int64_t i) { ancestors[i] = ancestors[i] < 0 ? -n - 1 - ancestors[i] : i; });
}

}  // namespace flowfast
