// What noise, branch_step and posterior_mean share: storage types, lane addresses, and the loop over rows and blocks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>

#include "cpu/checks.h"
#include "cpu/simd.h"

namespace flowfast {

inline Storage storage_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float ? kFloat32 : dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat16;
}

// Start of a row of a (rows, n) tensor.
inline const void* row_start(const Tensor& tensor, int64_t row) {
  return static_cast<const std::byte*>(tensor.const_data_ptr()) + row * tensor.size(1) * tensor.element_size();
}
inline void* row_start_mutable(const Tensor& tensor, int64_t row) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr()) + row * tensor.size(1) * tensor.element_size();
}

inline void check_row_length(const char* op, int64_t n) {
  if (n > kMaxElements) fail(op, ": a row may have at most 2^34 elements (the noise counter has 32 bits), got ", n);
}

// The columns key, row, candidate, chain of a batch of lanes.
struct Addresses {
  const int64_t *key, *row, *candidate, *chain;

  Addresses(const char* op, const Tensor& key, const Tensor& row, const Tensor& candidate, const Tensor& chain,
            int64_t lanes)
      : key(column(op, "key", key, lanes)),
        row(column(op, "row", row, lanes)),
        candidate(column(op, "candidate", candidate, lanes)),
        chain(column(op, "chain", chain, lanes)) {}

  static const int64_t* column(const char* op, const char* name, const Tensor& tensor, int64_t lanes) {
    check_operand(op, name, tensor, ScalarType::Long, {lanes});
    return tensor.const_data_ptr<int64_t>();
  }

  // Only for lanes that are not padding. A number that does not fit its word would name another lane's noise.
  void check_lane(const char* op, int64_t lane) const {
    check_word(op, "row", row[lane], kRowLimit, "2^28");
    check_word(op, "candidate", candidate[lane], int64_t{1} << 32, "2^32");
    check_word(op, "chain", chain[lane], int64_t{1} << 32, "2^32");
  }

  static void check_word(const char* op, const char* name, int64_t value, int64_t limit, const char* limit_text) {
    if (value < 0 || value >= limit) fail(op, ": ", name, " must lie in 0..", limit_text, " - 1, got ", value);
  }

  Address at(int64_t lane, uint32_t purpose) const {
    const uint64_t bits = static_cast<uint64_t>(key[lane]);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(candidate[lane]),
            row_word(row[lane], purpose), static_cast<uint32_t>(chain[lane])};
  }
};

// Calls f(row, begin, end) over pieces of a (rows, n) matrix from torch's threads. Pieces start at block boundaries and no
// result depends on how they fall.
template <class F>
void for_pieces(int64_t rows, int64_t n, const F& f) {
  constexpr int64_t kPiece = 16 * kBlock;
  constexpr int64_t kGrain = 32768;  // elements that are worth a thread, about 30 microseconds
  if (rows == 0 || n == 0) return;
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(n, kPiece));
  torch::stable::parallel_for(0, rows * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last;) {
      const int64_t row = i / pieces, piece = i % pieces;
      const int64_t pieces_here = std::min(last - i, pieces - piece);
      f(row, piece * kPiece, std::min(n, (piece + pieces_here) * kPiece));
      i += pieces_here;
    }
  });
}

}  // namespace flowfast
