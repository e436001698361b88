// Log-weights of one slot -> weights, effective sample size, log normaliser; flowfast::normalize_log_weights.
//
// Every sum is a sum of integers (fixed point, 2^-42 of the largest term), so any order of summation, on any backend,
// gives the same bits. exp and log are written out with plain multiplications and additions, so they round the same
// everywhere (no libm); compile with -ffp-contract=off (nvcc: -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"

namespace flowfast {

constexpr int64_t kMaxParticles = int64_t{1} << 20;  // what the integer sums here and in resample.h can hold
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2High = 6.93147180369123816490e-01;  // 32 significant bits: its product with an exponent is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kExpCutoff = -708.0;  // e^-708 is the last normal double

FF_HD inline double double_from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FF_HD inline uint64_t bits_of_double(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// e^x for x <= 0; exactly 0 below kExpCutoff. 2^k times the Taylor polynomial of degree 13 on |r| <= ln(2) / 2.
FF_HD inline double exp_nonpositive(double x) {
  if (!(x >= kExpCutoff)) return 0.0;
  const double k = rint(x * kLog2e);
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double factorial = 6227020800.0;  // 13!
  double sum = 1.0 / factorial;
  for (int i = 13; i >= 1; --i) {
    factorial /= i;
    sum = sum * r + 1.0 / factorial;
  }
  return sum * double_from_bits(static_cast<uint64_t>(static_cast<int64_t>(k) + 1023) << 52);
}

// ln(x) for a positive normal x: exponent * ln(2) + 2 atanh((m - 1) / (m + 1)) with m in [1 / sqrt(2), sqrt(2)].
FF_HD inline double log_positive(double x) {
  const uint64_t bits = bits_of_double(x);
  double exponent = static_cast<double>(static_cast<int64_t>(bits >> 52) - 1023);
  double m = double_from_bits((bits & 0xfffffffffffffULL) | 0x3ff0000000000000ULL);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent += 1.0;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double s2 = s * s;
  double sum = 1.0 / 21.0;
  for (int i = 19; i >= 1; i -= 2) sum = sum * s2 + 1.0 / i;
  return exponent * kLn2High + (exponent * kLn2Low + 2.0 * s * sum);
}

// A term of a sum, 0 <= term <= 1, in units of 2^-42. kMaxParticles of them stay below 2^63.
FF_HD inline int64_t to_fixed(double term) { return static_cast<int64_t>(rint(term * 0x1p42)); }
FF_HD inline double from_fixed(int64_t sum) { return static_cast<double>(sum) * 0x1p-42; }

// e^(log_weight - largest); `largest` itself gives 1 also when it is +inf. NaN counts as -inf.
FF_HD inline double relative_weight(double log_weight, double largest) {
  return log_weight == largest ? 1.0 : exp_nonpositive(log_weight - largest);
}

// One slot of n log-weights. scalar: float or double.
template <typename scalar>
FF_HD inline void normalize_log_weights_slot(const scalar* log_weights, int64_t n, scalar* weights, scalar* ess,
                                             scalar* log_normalizer) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i)
    if (log_weights[i] > largest) largest = log_weights[i];  // false for NaN
  if (largest == -std::numeric_limits<double>::infinity()) {
    for (int64_t i = 0; i < n; ++i) weights[i] = std::numeric_limits<scalar>::quiet_NaN();
    *ess = 0;
    *log_normalizer = -std::numeric_limits<scalar>::infinity();
    return;
  }
  int64_t fixed_sum = 0, fixed_sum_of_squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double term = relative_weight(log_weights[i], largest);
    fixed_sum += to_fixed(term);
    fixed_sum_of_squares += to_fixed(term * term);
  }
  const double sum = from_fixed(fixed_sum);
  for (int64_t i = 0; i < n; ++i) weights[i] = static_cast<scalar>(relative_weight(log_weights[i], largest) / sum);
  *ess = static_cast<scalar>(sum * sum / from_fixed(fixed_sum_of_squares));
  *log_normalizer = static_cast<scalar>(largest + log_positive(sum / static_cast<double>(n)));
}

}  // namespace flowfast
