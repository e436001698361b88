// Resampling of one slot; the maths of flowfast::resample. Part of stream version 1.
//
// All of it is integer arithmetic, so the counts do not depend on the order of a sum, on the thread count or on the
// backend, and the bounds of each scheme (counts in floor..ceil of N W, no offspring for a zero weight) hold exactly.
//
//   q_i = round-half-even(2^40 w_i),  Q = sum q_i,  W_i = q_i / Q        N <= 2^20
//   word_i = the 32-bit Philox word of element i of the slot's purpose-3 stream;  u_i = word_i / 2^32 in [0, 1)
//   a target T in 0..Q-1 chooses the one j with q_0 + .. + q_(j-1) <= T < q_0 + .. + q_j, hence never a j with q_j = 0
//
//   multinomial  T_i = floor(u_i Q)                                                          elements 0..N-1
//   stratified   T_i = floor((i Q + floor(u_i Q)) / N)                                       elements 0..N-1
//   systematic   T_i = floor((i Q + floor(u_0 Q)) / N)                                       element 0
//   residual     floor(N q_j / Q) copies of j; the R that are missing are multinomial in      elements 0..R-1
//                r_j = N q_j mod Q:  T_i = floor(u_i R Q) among the cumulative sums of r
//   ssp          floor(N q_j / Q) copies of j, then the Srinivasan sampling process on r_j     elements 1..N-1
//                (Gerber, Chopin, Whiteley 2019, Annals of Statistics 47), see ssp_takes_over
//
// A slot whose weights are not a distribution (NaN, negative, sum outside [1/2, 2]) keeps its particles: identity.
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"
#include "philox.h"

namespace flowfast {

enum Scheme : int64_t { kMultinomial = 0, kStratified = 1, kSystematic = 2, kResidual = 3, kSsp = 4, kSchemes = 5 };

constexpr int64_t kWeightOne = int64_t{1} << 40;

// Words of elements 0..n-1 of the slot's stream.
FF_HD inline void resampling_words(int64_t key, int64_t row, int64_t n, uint32_t* words) {
  const Address address{static_cast<uint32_t>(key), static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32), 0,
                        row_word(row, kResampling), 0};
  for (int64_t block = 0; block * kBlock < n; ++block) {
    for (int64_t q = 0; q < kCounters && block * kBlock + q < n; ++q) {
      const FourWords four = philox(address, static_cast<uint32_t>(block * kCounters + q));
      for (int w = 0; w < 4; ++w) {
        const int64_t element = block * kBlock + w * kCounters + q;
        if (element < n) words[element] = four.word[w];
      }
    }
  }
}

// The weight in units of 2^-40, or -1 where it is no weight.
FF_HD inline int64_t quantize_weight(double weight) {
  if (!(weight >= 0.0 && weight <= 2.0)) return -1;
  return static_cast<int64_t>(rint(weight * static_cast<double>(kWeightOne)));
}

// floor(word * total / 2^32) for 0 <= total <= 2^61, in two halves so that nothing leaves 63 bits.
FF_HD inline int64_t scale_by_word(uint32_t word, int64_t total) {
  const int64_t w = word;
  return (w * (total >> 31) + (w * (total & 0x7fffffff) >> 31)) >> 1;
}

// First j with cumulative[j] > target.
FF_HD inline int64_t find_target(const int64_t* cumulative, int64_t n, int64_t target) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cumulative[middle] > target)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Srinivasan sampling process, one meeting: the open particle (remainder `held`) meets particle j (remainder `rest`),
// both in 0..Q-1. Below Q together, one of them ends at 0 and the other holds the sum; from Q on, one becomes a copy
// and the other holds the sum - Q. True: j is the one that holds what is left. The odds keep both expectations. What is
// held after particle j is the sum of the remainders up to j, mod Q, whoever holds it: so all meetings can be decided
// in parallel.
FF_HD inline bool ssp_takes_over(int64_t held, int64_t rest, int64_t total, uint32_t word) {
  if (held + rest < total) return scale_by_word(word, held + rest) < rest;
  return scale_by_word(word, 2 * total - held - rest) < total - rest;
}

// Offspring counts of one slot; false, with nothing written to counts, where the weights are no distribution.
// words: elements 0..n-1 (systematic reads the first only); cumulative: n numbers of scratch.
template <typename scalar>
FF_HD inline bool count_offspring(const scalar* weights, int64_t n, int64_t scheme, const uint32_t* words,
                                  int64_t* cumulative, int64_t* counts) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t quantized = quantize_weight(weights[i]);
    if (quantized < 0) return false;
    total += quantized;
    cumulative[i] = total;
  }
  if (total < kWeightOne / 2 || total > 2 * kWeightOne) return false;

  int64_t draws = n, range = total;
  if (scheme == kResidual || scheme == kSsp) {
    // floor(N W) copies each; what remains, in units of 1 / Q, takes the place of the weights.
    int64_t before = 0, remainders = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t share = n * (cumulative[i] - before);
      before = cumulative[i];
      counts[i] = share / total;
      draws -= counts[i];
      remainders += share % total;
      cumulative[i] = remainders;
    }
    range = remainders;  // = draws * total
  } else {
    for (int64_t i = 0; i < n; ++i) counts[i] = 0;
  }

  if (scheme == kSsp) {
    int64_t open = 0;
    for (int64_t j = 1; j < n; ++j) {
      const int64_t held = cumulative[j - 1] % total;
      const int64_t rest = cumulative[j] - cumulative[j - 1];
      const bool takes_over = ssp_takes_over(held, rest, total, words[j]);
      if (held + rest >= total) ++counts[takes_over ? open : j];
      if (takes_over) open = j;
    }
    return true;
  }
  if (scheme == kStratified || scheme == kSystematic) {
    int64_t j = 0;  // the targets rise
    for (int64_t i = 0; i < n; ++i) {
      const int64_t target = (i * total + scale_by_word(words[scheme == kSystematic ? 0 : i], total)) / n;
      while (cumulative[j] <= target) ++j;
      ++counts[j];
    }
    return true;
  }
  for (int64_t i = 0; i < draws; ++i) ++counts[find_target(cumulative, n, scale_by_word(words[i], range))];
  return true;
}

// Ancestors with a[i] = i wherever counts[i] > 0 (Murray, Lee, Jacob, arXiv 1301.4019): the further copies, in order of
// index, go to the slots without offspring, in order of index.
FF_HD inline void ancestors_from_counts(const int64_t* counts, int64_t n, int64_t* ancestors) {
  int64_t parent = 0, left = counts[0] - 1;  // further copies of `parent` that have no slot yet
  for (int64_t i = 0; i < n; ++i) {
    if (counts[i] > 0) {
      ancestors[i] = i;
      continue;
    }
    while (left <= 0) left = counts[++parent] - 1;
    ancestors[i] = parent;
    --left;
  }
}

}  // namespace flowfast
