// flowfast::normalize_log_weights for one slot by a block of threads (cuda/block.h): core/log_weights.h, whose sums are
// sums of integers and so do not depend on how they are split.
#pragma once

#include "core/log_weights.h"
#include "cuda/layout.h"

namespace flowfast {

template <class scalar>
struct NormalizeLogWeights {
  const scalar* log_weights;  // (slots, n)
  int64_t slots, n;
  scalar *weights, *ess, *log_normalizer;
};

struct WeightSums {
  int64_t sum, sum_of_squares;
};

template <class scalar, class Block>
FF_HD inline void normalize_log_weights_block(Block& block, const NormalizeLogWeights<scalar>& task, int64_t slot) {
  const int64_t n = task.n;
  const scalar* log_weights = task.log_weights + row_offset(slot, n);
  scalar* weights = task.weights + row_offset(slot, n);
  const double least = -std::numeric_limits<double>::infinity();
  const double largest = block.reduce(
      n, least,
      [&](int64_t i) { return log_weights[i] > least ? static_cast<double>(log_weights[i]) : least; },  // NaN: least
      [](double a, double b) { return a > b ? a : b; });
  if (largest == least) {
    block.each(n, [&](int64_t i) { weights[i] = std::numeric_limits<scalar>::quiet_NaN(); });
    block.once([&] {
      task.ess[slot] = 0;
      task.log_normalizer[slot] = -std::numeric_limits<scalar>::infinity();
    });
    return;
  }
  const WeightSums sums = block.reduce(
      n, WeightSums{0, 0},
      [&](int64_t i) {
        const double term = relative_weight(log_weights[i], largest);
        return WeightSums{to_fixed(term), to_fixed(term * term)};
      },
      [](WeightSums a, WeightSums b) { return WeightSums{a.sum + b.sum, a.sum_of_squares + b.sum_of_squares}; });
  const double sum = from_fixed(sums.sum);
  block.each(n, [&](int64_t i) { weights[i] = static_cast<scalar>(relative_weight(log_weights[i], largest) / sum); });
  block.once([&] {
    task.ess[slot] = static_cast<scalar>(sum * sum / from_fixed(sums.sum_of_squares));
    task.log_normalizer[slot] = static_cast<scalar>(largest + log_positive(sum / static_cast<double>(n)));
  });
}

}  // namespace flowfast
