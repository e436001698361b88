// One thread of flowfast::normal_ and flowfast::uniform_; the words of branch_step come from here, too.
#pragma once

#include "cuda/layout.h"
#include "cuda/vectors.h"

namespace flowfast {

// The columns key, row, candidate, chain of a batch of lanes, on the device: a captured graph reads them anew.
struct AddressColumns {
  const int64_t *key, *row, *candidate, *chain;

  FF_HD Address at(int64_t lane, uint32_t purpose) const {
    const auto bits = static_cast<uint64_t>(key[lane]);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(candidate[lane]),
            row_word(row[lane], purpose), static_cast<uint32_t>(chain[lane])};
  }
};

// The words of kWidth neighbouring counters, four each.
template <int kWidth>
using Words = ThreadLanes::Wide[kWidth][4];

template <int kWidth>
FF_HD inline void thread_words(const Address& address, int64_t counter, Words<kWidth>& words) {
  FF_UNROLL
  for (int i = 0; i < kWidth; ++i) words[i][0] = ThreadLanes::wide(static_cast<uint32_t>(counter) + i);
  philox<ThreadLanes, kWidth>(address, words);
}

// The words of plane w at pair i (or the only one).
template <int kWidth>
FF_HD inline typename LanesOf<kWidth>::Word plane_word(const Words<kWidth>& words, int w, int i) {
  if constexpr (kWidth == 1)
    return words[i][w].low;
  else
    return {words[2 * i][w].low, words[2 * i + 1][w].low};
}

struct NoiseFill {
  AddressColumns address;
  uint32_t purpose;
  int64_t lanes, n;
  void* out;
};

// kUniform: T is float.
template <class T, int kWidth, bool kUniform>
FF_HD inline void noise_thread(const NoiseFill& task, int64_t lane, int64_t thread) {
  using V = LanesOf<kWidth>;
  const int64_t counter = first_counter<kWidth>(thread);
  if (element_of(counter, 0) >= task.n || task.address.row[lane] < 0) return;
  Words<kWidth> words;
  thread_words<kWidth>(task.address.at(lane, task.purpose), counter, words);
  T* out = static_cast<T*>(task.out) + row_offset(lane, task.n);
  FF_UNROLL
  for (int half = 0; half < 4; half += 2) {
    Packed<T, kWidth> first, second;
    FF_UNROLL
    for (int i = 0; i < kWidth / V::kWidth; ++i) {
      const auto a = plane_word<kWidth>(words, half, i), b = plane_word<kWidth>(words, half + 1, i);
      typename V::Float z[2];
      if constexpr (kUniform) {
        z[0] = uniform<V>(a);
        z[1] = uniform<V>(b);
      } else {
        box_muller<V>(a, b, z[0], z[1]);
      }
      pack<T, kWidth>(z[0], first, i);
      pack<T, kWidth>(z[1], second, i);
    }
    const int64_t element = element_of(counter, half);
    if (element < task.n) first.store(out + element);
    if (element + kCounters < task.n) second.store(out + element + kCounters);
  }
}

}  // namespace flowfast
