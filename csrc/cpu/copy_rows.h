// Copies rows between latents, several threads at a time; shared by gather_ancestors_ and decide.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace flowfast {

struct RowCopy {
  const char* from;
  char* to;
};

// No row is written that is read or written by another copy, so any split among threads gives the same result.
inline void copy_rows(const std::vector<RowCopy>& copies, int64_t bytes) {
  if (copies.empty() || bytes == 0) return;
  constexpr int64_t kPiece = 1 << 18;  // of a row: few long rows keep all threads busy as well
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kPiece / bytes);
  torch::stable::parallel_for(0, static_cast<int64_t>(copies.size()) * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowCopy& copy = copies[i / pieces];
      const int64_t offset = i % pieces * kPiece;
      std::memcpy(copy.to + offset, copy.from + offset, std::min(kPiece, bytes - offset));
    }
  });
}

}  // namespace flowfast
