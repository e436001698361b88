// Operands of the elementwise ops as exactly sized arrays, for the SIMD kernels and the CUDA thread bodies.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "tests/check.h"

namespace flowfast {

template <class T>
constexpr Storage kStorageOf = std::is_same_v<T, float> ? kFloat32 : std::is_same_v<T, Half> ? kFloat16 : kBFloat16;

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

inline Address problem_address(uint64_t seed, int64_t row) {
  Random random(seed);
  const uint64_t key = random.bits();
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(random.bits()),
          row_word(row, row == kInitialRow ? kInitialNoise : kTransition), static_cast<uint32_t>(random.bits())};
}

}  // namespace flowfast
