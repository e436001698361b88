// Operands of the elementwise ops as exactly sized arrays, for the SIMD kernels and the CUDA thread bodies.
#pragma once

#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"
#include "tests/check.h"

namespace flowfast {

template <class T>
constexpr Storage kStorageOf = std::is_same_v<T, float>  ? kFloat32
                               : std::is_same_v<T, Half> ? kFloat16
                                                         : kBFloat16;

template <class T>
void fill(Exact<T>& latents, uint64_t seed) {
  Random random(seed);
  for (int64_t i = 0; i < latents.size(); ++i) narrow(random.normalish(), latents[i]);
}

// Rows of the table: the initial noise, all terms, and each kind of zero.
inline Exact<float> problem_table() {
  Exact<float> table(6 * kColumns);
  Random random(1);
  for (int64_t i = 0; i < table.size(); ++i) table[i] = random.normalish() + 0.01f;
  const int zeros[][2] = {{0, kA},     {0, kB}, {0, kG}, {0, kDFrom}, {0, kEFrom}, {2, kC}, {3, kA},
                          {3, kDFrom}, {4, kB}, {4, kE}, {4, kG},     {5, kD},     {5, kA}, {5, kEFrom}};
  for (const auto& [row, column] : zeros) table[row * kColumns + column] = 0.0f;
  return table;
}

// A table whose only row gives x0 = x + u.
inline Exact<float> sum_of_x_and_u() {
  Exact<float> table(kColumns);
  table[kD] = table[kE] = 1.0f;
  return table;
}

template <class T>
struct NotFinite {
  const char* name;
  T x, u;
  bool stays_finite;
};

// Sums that are not finite, or not once they are stored, and one that just stays so.
template <class T>
std::vector<NotFinite<T>> not_finite() {
  // The largest number and half the unit of its last place, as float32: their sum rounds to infinity.
  const float largest = std::is_same_v<T, float> ? 0x1.fffffep127f : std::is_same_v<T, Half> ? 65504.0f : 0x1.fep127f;
  const float half_unit = std::is_same_v<T, float> ? 0x1p103f : std::is_same_v<T, Half> ? 16.0f : 0x1p119f;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const auto with = [](const char* name, float x, float u, bool stays_finite) {
    NotFinite<T> value{name, {}, {}, stays_finite};
    narrow(x, value.x);
    narrow(u, value.u);
    return value;
  };
  return {with("infinity", inf, 1.0f, false),
          with("-infinity", 1.0f, -inf, false),
          with("NaN", nan, 1.0f, false),
          with("infinity - infinity", inf, -inf, false),
          with("overflow", largest, half_unit, false),
          with("-overflow", -largest, -half_unit, false),
          with("largest", largest, half_unit / 2, true)};
}

inline Address problem_address(uint64_t seed, int64_t row) {
  Random random(seed);
  const uint64_t key = random.bits();
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(random.bits()),
          row_word(row, row == kInitialRow ? kInitialNoise : kTransition), static_cast<uint32_t>(random.bits())};
}

}  // namespace flowfast
