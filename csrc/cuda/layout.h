// Which elements a GPU thread works on. All index arithmetic is 64 bits wide: a row may hold 2^34 elements.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace flowfast {

constexpr int kThreads = 128;       // of a block
constexpr int kBlockThreads = 256;  // of one that works together (cuda/block.h)

FF_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Element that word w of a counter gives (the planar map of core/philox.h).
FF_HD constexpr int64_t element_of(int64_t counter, int w) {
  const auto c = static_cast<uint64_t>(counter);
  return static_cast<int64_t>(c / kCounters * kBlock + c % kCounters) + w * kCounters;
}

// A thread takes kWidth neighbouring counters, hence kWidth neighbouring elements in each of the four planes:
// neighbouring threads touch neighbouring memory. kWidth divides kCounters, so a thread stays within one block of the
// stream.
template <int kWidth>
FF_HD constexpr int64_t first_counter(int64_t thread) {
  static_assert(kCounters % kWidth == 0);
  return thread * kWidth;
}

// Threads that cover a row of n elements.
FF_HD constexpr int64_t planar_threads(int64_t n, int width) { return ceil_div(n, kBlock) * (kCounters / width); }

// Start of a row in a (rows, n) matrix.
FF_HD constexpr int64_t row_offset(int64_t row, int64_t n) { return row * n; }

}  // namespace flowfast
