// The lanes of a GPU thread for the maths of core/philox.h and core/step.h: one element (ThreadLanes) or a pair of
// neighbours (PairLanes). Host and device: csrc/tests runs the same code on the CPU.
//
// sm_100 does two float32 operations of a pair in one instruction (fma.rn.f32x2, mul.rn.f32x2), each rounded as the
// single ones are, so the bits are the same on every architecture.
#pragma once

#include <cstdint>

#include "core/philox.h"
#include "core/step.h"

namespace flowfast {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define FF_PAIR_INSTRUCTIONS
#endif

// One Newton step from y ~ 1 / sqrt(a): instruction for instruction the fast path of nvcc's own sqrt.rn.f32, hence
// correctly rounded, without its test for numbers that cannot come here. csrc/tests/test_cuda_threads.cpp holds it
// against the exact root for every one of the 2^24 numbers that `radius` takes the root of.
template <class Fma>
FF_HD inline float root_from_reciprocal(float a, float y, Fma fma) {
  const float root = a * y;
  return fma(fma(-root, root, a), 0.5f * y, root);
}

// Keeps 1 / sqrt(0) finite; the smallest positive number that `radius` takes the root of is 1.2e-7.
constexpr float kTinyRoot = 0x1p-60f;

struct ThreadLanes : ScalarLanes {
  // In halves: with 64-bit numbers nvcc adds a zero to the high half of every product, 4 instructions an element.
  struct Wide {
    uint32_t low, high;
  };

  FF_HD static Wide wide(uint32_t value) { return {value, 0}; }
  FF_HD static Wide product(Wide a, Wide b) {
    const uint64_t ab = static_cast<uint64_t>(a.low) * b.low;
    return {static_cast<uint32_t>(ab), static_cast<uint32_t>(ab >> 32)};
  }
  FF_HD static Wide high(Wide a) { return {a.high, 0}; }
  FF_HD static Wide xor2(Wide a, Wide b) { return {a.low ^ b.low, 0}; }
  FF_HD static Wide xor3(Wide a, Wide b, Wide c) { return {a.low ^ b.low ^ c.low, 0}; }

  FF_HD static Float square_root(Float a) {
#if defined(__CUDA_ARCH__)
    return root_from_reciprocal(a, reciprocal_root(a), fma);
#else
    return std::sqrt(a);
#endif
  }
#if defined(__CUDA_ARCH__)
  __device__ static float reciprocal_root(float a) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(a, kTinyRoot)));
    return y;
  }
#endif
};

struct FloatPair {
  float a, b;
};
struct WordPair {
  uint32_t a, b;
};

struct PairLanes {
  static constexpr int kWidth = 2;
  using Word = WordPair;
  using Float = FloatPair;
  using One = ThreadLanes;

  FF_HD static Word word(uint32_t value) { return {value, value}; }
  FF_HD static Float real(float value) { return {value, value}; }
  FF_HD static Word add(Word a, Word b) { return {a.a + b.a, a.b + b.b}; }
  FF_HD static Word subtract(Word a, Word b) { return {a.a - b.a, a.b - b.b}; }
  FF_HD static Word both(Word a, Word b) { return {a.a & b.a, a.b & b.b}; }
  FF_HD static Word larger(Word a, Word b) { return {One::larger(a.a, b.a), One::larger(a.b, b.b)}; }
  template <int kBits>
  FF_HD static Word left(Word a) {
    return {a.a << kBits, a.b << kBits};
  }
  template <int kBits>
  FF_HD static Word right(Word a) {
    return {a.a >> kBits, a.b >> kBits};
  }
  FF_HD static Float to_float(Word a) { return {One::to_float(a.a), One::to_float(a.b)}; }
  FF_HD static Word bits(Float a) { return {One::bits(a.a), One::bits(a.b)}; }
  FF_HD static Float from_bits(Word a) { return {One::from_bits(a.a), One::from_bits(a.b)}; }
  FF_HD static Float minus(Float a, Float b) { return {a.a - b.a, a.b - b.b}; }
  FF_HD static Float flip(Float r, Word a, Word b) { return {One::flip(r.a, a.a, b.a), One::flip(r.b, a.b, b.b)}; }
#if defined(FF_PAIR_INSTRUCTIONS)
  __device__ static Float multiply(Float a, Float b) {
    Float r;
    asm("{\n\t.reg .b64 x, y;\n\tmov.b64 x, {%2, %3};\n\tmov.b64 y, {%4, %5};\n\tmul.rn.f32x2 x, x, y;\n\t"
        "mov.b64 {%0, %1}, x;\n\t}"
        : "=f"(r.a), "=f"(r.b)
        : "f"(a.a), "f"(a.b), "f"(b.a), "f"(b.b));
    return r;
  }
  __device__ static Float fma(Float a, Float b, Float c) {
    Float r;
    asm("{\n\t.reg .b64 x, y, z;\n\tmov.b64 x, {%2, %3};\n\tmov.b64 y, {%4, %5};\n\tmov.b64 z, {%6, %7};\n\t"
        "fma.rn.f32x2 z, x, y, z;\n\tmov.b64 {%0, %1}, z;\n\t}"
        : "=f"(r.a), "=f"(r.b)
        : "f"(a.a), "f"(a.b), "f"(b.a), "f"(b.b), "f"(c.a), "f"(c.b));
    return r;
  }
  __device__ static Float square_root(Float a) {
    const Float y = {One::reciprocal_root(a.a), One::reciprocal_root(a.b)};
    const Float root = multiply(a, y);
    const Float error = fma({-root.a, -root.b}, root, a);
    return fma(error, multiply(y, real(0.5f)), root);
  }
#else
  FF_HD static Float multiply(Float a, Float b) { return {a.a * b.a, a.b * b.b}; }
  FF_HD static Float fma(Float a, Float b, Float c) { return {One::fma(a.a, b.a, c.a), One::fma(a.b, b.b, c.b)}; }
  FF_HD static Float square_root(Float a) { return {One::square_root(a.a), One::square_root(a.b)}; }
#endif
};

}  // namespace flowfast
