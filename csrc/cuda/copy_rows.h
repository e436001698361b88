// One thread of a row copy, as gather_ancestors_ and decide make them: kCopies accesses of kBytes, loaded
// before any is stored so that they are under way together.
#pragma once

#include "cuda/layout.h"
#include "cuda/vectors.h"

namespace flowfast {

constexpr int kCopies = 4;

template <int kBytes>
using CopyElement = std::conditional_t<kBytes == 2, BFloat16, float>;

// bytes: of a row, a multiple of kBytes. Neighbouring threads of a block take neighbouring accesses.
template <int kBytes, int kBlockSize = kThreads>
FF_HD inline void copy_row_thread(const void* from, void* to, int64_t bytes, int64_t block, int64_t thread) {
  using T = CopyElement<kBytes>;
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  using Vector = Packed<T, kElements>;
  const int64_t accesses = bytes / kBytes, first = block * kBlockSize * kCopies + thread;
  Vector vectors[kCopies];
  FF_UNROLL
  for (int k = 0; k < kCopies; ++k)
    if (first + k * kBlockSize < accesses)
      vectors[k] = Vector::load(static_cast<const T*>(from) + (first + k * kBlockSize) * kElements);
  FF_UNROLL
  for (int k = 0; k < kCopies; ++k)
    if (first + k * kBlockSize < accesses) vectors[k].store(static_cast<T*>(to) + (first + k * kBlockSize) * kElements);
}

// Blocks that copy a row.
FF_HD constexpr int64_t copy_blocks(int64_t bytes, int access, int threads = kThreads) {
  return ceil_div(ceil_div(bytes, access), int64_t{threads} * kCopies);
}

}  // namespace flowfast
