// The loops behind csrc/cpu/simd.h, over a type V of vector lanes. Included by simd_<set>.cpp only, each with a V of its own
// in an unnamed namespace: nothing here may become a symbol shared between files compiled for different processors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

namespace flowfast {
namespace {

// Counters that go through Philox together: enough independent products to hide their latency.
template <class V>
constexpr int kGroups = V::kWidth < 4 ? 1 : V::kWidth / 4;

// The words of one block in element order; kSplit: in each two vectors first the even elements, then the odd ones, which
// is the order in which 16-bit storage is widened fastest. V::kHalves wide vectors (the even and the odd lanes of it) make
// one vector of words. The last of the ten rounds does so, for one half is where it belongs already.
template <class V, bool kSplit = false>
void block_words(const Address& address, int64_t begin, uint32_t* words) {
  constexpr int kStreams = kGroups<V> * V::kHalves;
  const uint32_t first = static_cast<uint32_t>(begin / kBlock * kCounters);
  const auto k0 = V::word(address.key_low + 9 * kKeyStep0), k1 = V::word(address.key_high + 9 * kKeyStep1);
  for (int q = 0; q < kCounters; q += kGroups<V> * V::kWidth) {
    typename V::Wide c[kStreams][4];
    FF_UNROLL
    for (int i = 0; i < kStreams; ++i) {
      const int vector = i / V::kHalves, half = i % V::kHalves;
      c[i][0] = kSplit ? V::template counters<4>(first + q + vector / 2 * 2 * V::kWidth + vector % 2 + 2 * half)
                       : V::template counters<2>(first + q + vector * V::kWidth + half);
    }
    philox<V, kStreams, 9>(address, c);
    FF_UNROLL
    for (int i = 0; i < kStreams; i += V::kHalves) {
      const auto &even = c[i], &odd = c[i + V::kHalves - 1];
      const auto m0 = V::wide(kMultiplier0), m1 = V::wide(kMultiplier1);
      const auto p0_even = V::product(even[0], m0), p0_odd = V::product(odd[0], m0);
      const auto p1_even = V::product(even[2], m1), p1_odd = V::product(odd[2], m1);
      uint32_t* out = words + q + i / V::kHalves * V::kWidth;
      V::store(out, V::xor3(V::high_words(p1_even, p1_odd), V::low_words(even[1], odd[1]), k0));
      V::store(out + kCounters, V::low_words(p1_even, p1_odd));
      V::store(out + 2 * kCounters, V::xor3(V::high_words(p0_even, p0_odd), V::low_words(even[3], odd[3]), k1));
      V::store(out + 3 * kCounters, V::low_words(p0_even, p0_odd));
    }
  }
}

template <class V>
void words_to_normals(const uint32_t* words, float* z) {
  for (int pair = 0; pair < kBlock; pair += 2 * kCounters) {
    for (int q = pair; q < pair + kCounters; q += V::kWidth) {
      typename V::Float first, second;
      box_muller<V>(V::load(words + q), V::load(words + kCounters + q), first, second);
      V::store(z + q, first);
      V::store(z + kCounters + q, second);
    }
  }
}

// Two loops with the words between them in cache: in one loop the compiler runs out of registers, 0.99 against 0.84 ns a
// normal (AVX2, Zen 4).
template <class V, bool kSplit = false>
void block_normals(const Address& address, int64_t begin, float* z) {
  alignas(64) uint32_t words[kBlock];
  block_words<V, kSplit>(address, begin, words);
  words_to_normals<V>(words, z);
}

// The last vector of a row may be short: it goes through a buffer, so that the arithmetic is the same.
template <class V, class T>
typename V::Float load(const T* data, int64_t count) {
  if (count >= V::kWidth) return V::load(data);
  T buffer[V::kWidth] = {};
  memcpy(buffer, data, count * sizeof(T));
  return V::load(buffer);
}

template <class V, class T>
void store(T* data, typename V::Float value, int64_t count) {
  if (count >= V::kWidth) return V::store(data, value);
  T buffer[V::kWidth];
  V::store(buffer, value);
  memcpy(data, buffer, count * sizeof(T));
}

// Asks for the line `ahead` elements on, read or written; it may lie behind the end. Processors look ahead on their own,
// too, but not beyond the end of a page.
template <class V, class T>
void will_read(const T* data, int64_t ahead) {
  if constexpr (V::kWidth > 1)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(data) + ahead * sizeof(T)), 0);
}
template <class V, class T>
void will_write(const T* data, int64_t ahead) {
  if constexpr (V::kWidth > 1)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(data) + ahead * sizeof(T)), 1);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V>
void uniform_range(const NoiseTask& task) {
  alignas(64) uint32_t words[kBlock];
  for (int64_t begin = task.begin; begin < task.end; begin += kBlock) {
    block_words<V>(task.address, begin, words);
    const int64_t count = smaller(kBlock, task.end - begin);
    float* out = static_cast<float*>(task.out) + begin;
    for (int64_t i = 0; i < count; i += V::kWidth) store<V>(out + i, uniform<V>(V::load(words + i)), count - i);
  }
}

template <class V, class T>
void normal_range(const NoiseTask& task) {
  alignas(64) float z[kBlock];
  for (int64_t begin = task.begin; begin < task.end; begin += kBlock) {
    block_normals<V>(task.address, begin, z);
    const int64_t count = smaller(kBlock, task.end - begin);
    T* out = static_cast<T*>(task.out) + begin;
    for (int64_t i = 0; i < count; i += V::kWidth) store<V>(out + i, V::load(z + i), count - i);
  }
}

// kPlain: no coefficient is 0 and there is no gradient, so that no term has to be asked for. kMean: there is an x0_out.
template <class V, class T, bool kPlain, bool kMean>
void branch_step_blocks(const StepTask& task) {
  float c[kColumns];
  std::copy_n(task.row, kColumns, c);  // out might alias the table
  const T* x = static_cast<const T*>(task.x);
  const T* u = static_cast<const T*>(task.u);
  const T* grad = static_cast<const T*>(task.grad);
  T* out = static_cast<T*>(task.out);
  T* x0_out = static_cast<T*>(task.x0_out);
  const float g = grad ? c[kG] : 0.0f;
  const auto add = [](float coefficient, auto read, typename V::Float sum) {
    return kPlain ? V::fma(V::real(coefficient), read(), sum) : add_term<V>(coefficient, read, sum);
  };
  alignas(64) float z[kBlock];
  for (int64_t begin = task.begin; begin < task.end; begin += kBlock) {
    if (kPlain || c[kC] != 0.0f) block_normals<V>(task.address, begin, z);
    const int64_t end = smaller(begin + kBlock, task.end);
    for (int64_t i = begin; i < end; i += V::kWidth) {
      const int64_t count = end - i;
      if constexpr (kPlain) {  // else x or u may be of no account
        will_read<V>(x + i, kBlock);
        will_read<V>(u + i, kBlock);
      }
      // Both sums are complete before the first store: out may be x.
      const auto read_x = [&] { return load<V>(x + i, count); };
      const auto read_u = [&] { return load<V>(u + i, count); };
      auto sum = add(c[kA], read_x, V::real(0.0f));
      sum = add(c[kB], read_u, sum);
      sum = add(c[kC], [&] { return V::load(z + (i - begin)); }, sum);
      if (!kPlain) sum = add_term<V>(g, [&] { return load<V>(grad + i, count); }, sum);
      if constexpr (kMean) {
        const auto x0 = add(c[kEFrom], read_u, add(c[kDFrom], read_x, V::real(0.0f)));
        store<V>(x0_out + i, x0, count);
      }
      store<V>(out + i, sum, count);
    }
  }
}

// One whole block in bfloat16 with no coefficient 0, in pairs of vectors: the even elements and the odd ones. Returns
// false where a result may be NaN, which is rounded wrongly here: out must not be x, so that the block can be done again.
template <class V, bool kMean>
bool bfloat16_block(const StepTask& task, const float* c, int64_t begin) {
  const BFloat16* x = static_cast<const BFloat16*>(task.x) + begin;
  const BFloat16* u = static_cast<const BFloat16*>(task.u) + begin;
  BFloat16* out = static_cast<BFloat16*>(task.out) + begin;
  BFloat16* x0_out = kMean ? static_cast<BFloat16*>(task.x0_out) + begin : nullptr;
  alignas(64) float z[kBlock];
  block_normals<V, true>(task.address, begin, z);
  // Infinite or NaN from the first x' that is so. Where x' is finite x and u are, and x0_hat is no NaN.
  auto sound = V::real(0.0f);
  for (int64_t i = 0; i < kBlock; i += 2 * V::kWidth) {
    typename V::Float xs[2], us[2], sum[2], x0[2];
    will_read<V>(x + i, kBlock);
    will_read<V>(u + i, kBlock);
    will_write<V>(out + i, kBlock);  // pays in 16 bits only
    if constexpr (kMean) will_write<V>(x0_out + i, kBlock);
    V::load_pair(x + i, xs);
    V::load_pair(u + i, us);
    FF_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      sum[odd] = V::fma(V::real(c[kA]), xs[odd], V::real(0.0f));
      sum[odd] = V::fma(V::real(c[kB]), us[odd], sum[odd]);
      sum[odd] = V::fma(V::real(c[kC]), V::load(z + i + odd * V::kWidth), sum[odd]);
      if constexpr (kMean)
        x0[odd] = V::fma(V::real(c[kEFrom]), us[odd], V::fma(V::real(c[kDFrom]), xs[odd], V::real(0.0f)));
    }
    sound = V::fma(sum[0], sum[1], sound);
    V::store_pair(out + i, sum);
    if constexpr (kMean) V::store_pair(x0_out + i, x0);
  }
  return V::all_finite(sound);
}

template <class V, bool kMean>
void branch_step_bfloat16(const StepTask& task) {
  float c[kColumns];
  std::copy_n(task.row, kColumns, c);
  for (int64_t begin = task.begin; begin < task.end; begin += kBlock) {
    StepTask block = task;
    block.begin = begin;
    block.end = smaller(begin + kBlock, task.end);
    if (block.end - begin < kBlock || !bfloat16_block<V, kMean>(task, c, begin))
      branch_step_blocks<V, BFloat16, true, kMean>(block);
  }
}

template <class V, class T>
void branch_step_range(const StepTask& task) {
  const float* c = task.row;
  const bool plain = c[kA] != 0.0f && c[kB] != 0.0f && c[kC] != 0.0f && !task.grad;
  if constexpr (V::kPairs && std::is_same_v<T, BFloat16>) {
    const auto usual = [](float coefficient) { return coefficient != 0.0f && std::isfinite(coefficient); };
    const bool all = plain && (!task.x0_out || (usual(c[kDFrom]) && usual(c[kEFrom])));
    if (all && task.out != task.x)
      return task.x0_out ? branch_step_bfloat16<V, true>(task) : branch_step_bfloat16<V, false>(task);
  }
  if (task.x0_out) {
    const bool all = plain && c[kDFrom] != 0.0f && c[kEFrom] != 0.0f;
    return all ? branch_step_blocks<V, T, true, true>(task) : branch_step_blocks<V, T, false, true>(task);
  }
  return plain ? branch_step_blocks<V, T, true, false>(task) : branch_step_blocks<V, T, false, false>(task);
}

// kPlain: neither D nor E is 0, and no guidance. kWrite: there is a u_out.
template <class V, class T, bool kPlain, bool kWrite>
bool posterior_mean_elements(const MeanTask& task) {
  const T* x = static_cast<const T*>(task.x);
  const T* u = static_cast<const T*>(task.u);
  const T* u_uncond = static_cast<const T*>(task.u_uncond);
  T* u_out = static_cast<T*>(task.u_out);
  T* x0_out = static_cast<T*>(task.x0_out);
  const float d = task.row[kD], e = task.row[kE], w = task.guidance;
  auto worst = V::word(0);  // largest magnitude, as bits: a NaN is above infinity
  for (int64_t i = task.begin, end = task.end; i < end; i += V::kWidth) {
    const int64_t count = end - i;
    will_read<V>(x + i, 4 * kBlock);  // there is no generator to wait for
    will_read<V>(u + i, 4 * kBlock);
    const auto read_x = [&] { return load<V>(x + i, count); };
    const auto read_u = [&] { return load<V>(u + i, count); };
    typename V::Float guided, x0 = V::real(0.0f);
    if constexpr (kPlain) {
      guided = read_u();
      x0 = V::fma(V::real(e), guided, V::fma(V::real(d), read_x(), x0));
    } else {
      guided = guide<V>(w, read_u, [&] { return load<V>(u_uncond + i, count); });
      x0 = add_term<V>(e, [&] { return guided; }, add_term<V>(d, read_x, x0));
    }
    if constexpr (kWrite) store<V>(u_out + i, guided, count);
    store<V>(x0_out + i, x0, count);
    worst = V::larger(worst, V::both(V::bits(x0), V::word(0x7fffffffu)));
  }
  alignas(64) uint32_t found[V::kWidth];
  V::store(found, worst);
  return *std::max_element(found, found + V::kWidth) < first_infinite(T{});
}

template <class V, class T>
bool posterior_mean_range(const MeanTask& task) {
  const bool plain = task.guidance == 1.0f && task.row[kD] != 0.0f && task.row[kE] != 0.0f;
  if (!task.u_out) {
    return plain ? posterior_mean_elements<V, T, true, false>(task) : posterior_mean_elements<V, T, false, false>(task);
  }
  return plain ? posterior_mean_elements<V, T, true, true>(task) : posterior_mean_elements<V, T, false, true>(task);
}

template <class V>
constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      block_words<V>,
      words_to_normals<V>,
      uniform_range<V>,
      {normal_range<V, float>, normal_range<V, BFloat16>, normal_range<V, Half>},
      {branch_step_range<V, float>, branch_step_range<V, BFloat16>, branch_step_range<V, Half>},
      {posterior_mean_range<V, float>, posterior_mean_range<V, BFloat16>, posterior_mean_range<V, Half>},
  };
}

}  // namespace
}  // namespace flowfast
