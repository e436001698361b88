// flowfast::resample for one slot by a block of threads (cuda/block.h): the integers of core/resample.h, each step for
// all particles at once, so the ancestors are the same as one thread's.
#pragma once

#include "core/resample.h"
#include "cuda/layout.h"

namespace flowfast {

template <class scalar>
struct Resample {
  const scalar* weights;  // (slots, n)
  const int64_t *key, *row;
  const bool* enabled;
  int64_t scheme, slots, n;
  int64_t* ancestors;  // (slots, n); holds what is between the steps, too
};

// What a slot needs beside its ancestors, 12 bytes a particle.
struct ResampleScratch {
  int64_t* cumulative;
  int32_t* counts;
};

// Word of one element of the slot's stream.
FF_HD inline uint32_t resampling_word(int64_t key, int64_t row, int64_t element) {
  const Address address{static_cast<uint32_t>(key), static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32), 0,
                        row_word(row, kResampling), 0};
  const int64_t block = element / kBlock, plane = element % kBlock / kCounters;
  uint64_t c[4] = {static_cast<uint32_t>(block * kCounters + element % kCounters), address.candidate, address.row,
                   address.chain};
  philox<ScalarLanes>(address, c);
  // Not c[plane]: registers have no index.
  return static_cast<uint32_t>(plane < 2 ? (plane == 0 ? c[0] : c[1]) : (plane == 2 ? c[2] : c[3]));
}

// What the open particle of the Srinivasan process holds before it meets particle j, and the remainder of j.
struct SspMeeting {
  int64_t held, rest;

  FF_HD SspMeeting(const int64_t* cumulative, int64_t total, int64_t j)
      : held(cumulative[j - 1] % total), rest(cumulative[j] - cumulative[j - 1]) {}
};

// Offspring counts into scratch.counts; false where the weights are no distribution. See count_offspring.
template <class scalar, class Block>
FF_HD inline bool count_offspring_block(Block& block, const Resample<scalar>& task, const scalar* weights, int64_t key,
                                        int64_t row, int64_t* marks, const ResampleScratch& scratch) {
  const int64_t n = task.n, scheme = task.scheme;
  int64_t* cumulative = scratch.cumulative;
  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t wrong =
      block.reduce(n, int64_t{0}, [&](int64_t i) { return int64_t{quantize_weight(weights[i]) < 0}; }, plus);
  if (wrong > 0) return false;
  block.each(n, [&](int64_t i) { cumulative[i] = quantize_weight(weights[i]); });
  block.scan(cumulative, n, plus);
  const int64_t total = cumulative[n - 1];
  block.barrier();  // before cumulative is written again
  if (total < kWeightOne / 2 || total > 2 * kWeightOne) return false;

  int64_t draws = n, range = total;
  if (scheme == kResidual || scheme == kSsp) {
    block.each(n, [&](int64_t i) {
      const int64_t share = n * quantize_weight(weights[i]);
      scratch.counts[i] = static_cast<int32_t>(share / total);
      cumulative[i] = share % total;
    });
    block.scan(cumulative, n, plus);
    range = cumulative[n - 1];
    draws = range / total;  // copies that are missing
  } else {
    block.each(n, [&](int64_t i) { scratch.counts[i] = 0; });
  }

  if (scheme == kSsp) {
    // marks[j]: the particle that is open after meeting j.
    block.each(n, [&](int64_t j) {
      marks[j] = 0;
      if (j == 0) return;
      const SspMeeting meeting(cumulative, total, j);
      if (ssp_takes_over(meeting.held, meeting.rest, total, resampling_word(key, row, j))) marks[j] = j;
    });
    block.scan(marks, n, larger);
    block.each(n, [&](int64_t j) {
      if (j == 0) return;
      const SspMeeting meeting(cumulative, total, j);
      if (meeting.held + meeting.rest >= total) block.increment(scratch.counts + (marks[j] == j ? marks[j - 1] : j));
    });
    return true;
  }
  block.each(draws, [&](int64_t i) {
    const int64_t offset = scale_by_word(resampling_word(key, row, scheme == kSystematic ? 0 : i), range);
    const bool spread = scheme == kStratified || scheme == kSystematic;
    block.increment(scratch.counts + find_target(cumulative, n, spread ? (i * total + offset) / n : offset));
  });
  return true;
}

template <class scalar, class Block>
FF_HD inline void resample_block(Block& block, const Resample<scalar>& task, int64_t slot,
                                 const ResampleScratch& scratch) {
  const int64_t n = task.n;
  int64_t* ancestors = task.ancestors + row_offset(slot, n);
  const scalar* weights = task.weights + row_offset(slot, n);
  if (!task.enabled[slot] ||
      !count_offspring_block(block, task, weights, task.key[slot], task.row[slot], ancestors, scratch)) {
    block.each(n, [&](int64_t i) { ancestors[i] = i; });
    return;
  }
  // The further copies, in order of index, go to the slots without offspring, in order of index: the dead slot with d
  // dead ones before it takes the first j whose running sum of further copies is above d.
  int64_t* further = scratch.cumulative;
  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  block.each(n, [&](int64_t i) {
    const int64_t count = scratch.counts[i];
    further[i] = count > 0 ? count - 1 : 0;
    ancestors[i] = count == 0;
  });
  block.scan(further, n, plus);
  block.scan(ancestors, n, plus);
  block.each(n,
             [&](int64_t i) { ancestors[i] = scratch.counts[i] > 0 ? i : find_target(further, n, ancestors[i] - 1); });
}

}  // namespace flowfast
