// Elements in registers: kWidth neighbours of a latent, moved with one access of up to 128 bits, as pairs of float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/step.h"
#include "cuda/lanes.h"

namespace flowfast {

// Neighbours that make one access of 128 bits.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// The lanes for kWidth neighbours.
template <int kWidth>
using LanesOf = std::conditional_t<kWidth == 1, ThreadLanes, PairLanes>;

template <int kBytes>
struct alignas(kBytes) Access {
  uint32_t word[kBytes / 4];
};
template <>
struct Access<2> {
  uint16_t word[1];
};

// kWidth elements as they lie in memory.
template <class T, int kWidth>
struct Packed {
  using Bytes = Access<static_cast<int>(kWidth * sizeof(T))>;
  Bytes bytes;

  FF_HD static Packed load(const T* from) {
    Packed packed;
#if defined(__CUDA_ARCH__)
    packed.bytes = move<Bytes>(from);
#else
    std::memcpy(&packed.bytes, from, sizeof(Bytes));
#endif
    return packed;
  }
  FF_HD void store(T* to) const {
#if defined(__CUDA_ARCH__)
    // Written out: left to itself nvcc splits a store whose four words it can make one by one.
    if constexpr (sizeof(Bytes) == 16)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bytes.word[0]),
                   "r"(bytes.word[1]), "r"(bytes.word[2]), "r"(bytes.word[3])
                   : "memory");
    else
      *reinterpret_cast<Bytes*>(to) = bytes;
#else
    std::memcpy(to, &bytes, sizeof(Bytes));
#endif
  }

#if defined(__CUDA_ARCH__)
  template <class B>
  __device__ static B move(const T* from) {
    if constexpr (sizeof(B) == 16) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      return {{four.x, four.y, four.z, four.w}};
    } else {
      return *reinterpret_cast<const B*>(from);
    }
  }
#endif
};

namespace detail {

FF_HD inline float widen_half(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return widen(Half{bits});
#endif
}

// Two elements in one word, the first one in the low half. Round to nearest even; the device's NaN is 0x7fff.
template <class T>
FF_HD inline uint32_t narrow_pair(FloatPair pair) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.b), "f"(pair.a));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.b), "f"(pair.a));
  return word;
#else
  T low, high;
  narrow(pair.a, low);
  narrow(pair.b, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
#endif
}

}  // namespace detail

// Pair i of a packed vector, or its only element.
template <class T, int kWidth>
FF_HD inline typename LanesOf<kWidth>::Float unpack(const Packed<T, kWidth>& packed, int i) {
  const auto& word = packed.bytes.word;
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (kWidth == 1)
      return detail::float_of(word[i]);
    else
      return {detail::float_of(word[2 * i]), detail::float_of(word[2 * i + 1])};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (kWidth == 1)
      return widen(BFloat16{word[i]});
    else
      return {detail::float_of(word[i] << 16), detail::float_of(word[i] & 0xffff0000u)};
  } else {
    if constexpr (kWidth == 1)
      return detail::widen_half(word[i]);
    else
      return {detail::widen_half(static_cast<uint16_t>(word[i])),
              detail::widen_half(static_cast<uint16_t>(word[i] >> 16))};
  }
}

template <class T, int kWidth>
FF_HD inline void pack(typename LanesOf<kWidth>::Float value, Packed<T, kWidth>& packed, int i) {
  auto& word = packed.bytes.word;
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (kWidth == 1) {
      word[i] = detail::bits_of(value);
    } else {
      word[2 * i] = detail::bits_of(value.a);
      word[2 * i + 1] = detail::bits_of(value.b);
    }
  } else {
    if constexpr (kWidth == 1)
      word[i] = static_cast<uint16_t>(detail::narrow_pair<T>({value, 0.0f}));
    else
      word[i] = detail::narrow_pair<T>(value);
  }
}

}  // namespace flowfast
