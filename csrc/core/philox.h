// Addressed noise, stream version 1: the one definition of which number stands where. Every backend gives the same bits.
//
//   words    Philox4x32-10 (Salmon et al. 2011): key = the 64-bit key, low word first;
//            counter = (g, candidate, row | purpose << 28, chain), g the counter of the element
//   planar   a row of elements is cut into blocks of 4 Q = 256; word w of counter g = block * Q + q is element
//            block * 4 Q + w * Q + q. So vector lanes hold neighbouring counters and no result has to be shuffled.
//   normal   Box-Muller on words (0, 1) and (2, 3):  u = ((a >> 8) + 1) 2^-24,  r = sqrt(-2 ln u),
//            first = r cos(2 pi b / 2^32), second = r sin(2 pi b / 2^32);  |z| <= 5.77
//   uniform  ((word >> 9) + 1/2) 2^-23: in (0, 1), exact in float32
//
// g has 32 bits: a row holds at most 2^34 elements. Polynomials and the order of operations are part of the version:
// std::fma where written, a rounded operation everywhere else (-ffp-contract=off), correctly rounded square root. Against
// exact arithmetic a normal is off by 8e-8 in the root mean square and by 1.5e-6, three units of its last place, at most.
//
// The maths is written once over a type `V` of lanes: ScalarLanes below (host and device), the vector ones in
// csrc/cpu/simd_*.cpp. V::Wide holds one 64-bit number a lane, of which the low 32 bits are a Philox word and the rest is ignored
// (so that products need no masking); V::Word and V::Float are 32 bits a lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

#if defined(__CUDACC__)
#define FF_UNROLL _Pragma("unroll")
#else
#define FF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace flowfast {

constexpr int kStreamVersion = 1;
constexpr int kCounters = 64;  // Q
constexpr int kBlock = 4 * kCounters;  // elements of a block
constexpr int64_t kMaxElements = int64_t{kBlock} << 26;  // 2^34 = kBlock * 2^32 / kCounters

enum Purpose : uint32_t {
  kInitialNoise = 0,
  kTransition = 1,
  kProposalMove = 2,
  kResampling = 3,
  kSelection = 4,
  kPurposes = 16,
};
constexpr uint32_t kRowLimit = uint32_t{1} << 28;  // rows (transitions) below the bits of the purpose

FF_HD inline uint32_t row_word(int64_t row, uint32_t purpose) { return static_cast<uint32_t>(row) | purpose << 28; }

// Everything of the counter and the key but the counter of the element.
struct Address {
  uint32_t key_low, key_high, candidate, row, chain;  // row as given by row_word
};

struct ScalarLanes {
  static constexpr int kWidth = 1;
  using Wide = uint64_t;
  using Word = uint32_t;
  using Float = float;

  FF_HD static Wide wide(uint32_t value) { return value; }
  FF_HD static Wide product(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
  FF_HD static Wide high(Wide a) { return a >> 32; }
  FF_HD static Wide xor2(Wide a, Wide b) { return a ^ b; }
  FF_HD static Wide xor3(Wide a, Wide b, Wide c) { return a ^ b ^ c; }

  FF_HD static Word word(uint32_t value) { return value; }
  FF_HD static Float real(float value) { return value; }
  FF_HD static Word add(Word a, Word b) { return a + b; }
  FF_HD static Word subtract(Word a, Word b) { return a - b; }
  FF_HD static Word both(Word a, Word b) { return a & b; }
  FF_HD static Word larger(Word a, Word b) { return a > b ? a : b; }
  template <int kBits>
  FF_HD static Word left(Word a) {
    return a << kBits;
  }
  template <int kBits>
  FF_HD static Word right(Word a) {
    return a >> kBits;
  }
  FF_HD static Float to_float(Word a) { return static_cast<float>(static_cast<int32_t>(a)); }
  FF_HD static Word bits(Float a) {
    Word word;
    memcpy(&word, &a, sizeof(word));
    return word;
  }
  FF_HD static Float from_bits(Word a) {
    Float value;
    memcpy(&value, &a, sizeof(value));
    return value;
  }
  FF_HD static Float minus(Float a, Float b) { return a - b; }
  FF_HD static Float multiply(Float a, Float b) { return a * b; }
  FF_HD static Float fma(Float a, Float b, Float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  FF_HD static Float square_root(Float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
  }
  // r with its sign flipped where the top bit of a ^ b is set.
  FF_HD static Float flip(Float r, Word a, Word b) { return from_bits(bits(r) ^ ((a ^ b) & 0x80000000u)); }
};

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;  // from the key of a round to that of the next

// Philox on kStreams counters at once: c[i][0] is the counter of an element; afterwards c[i] is its four words. Several
// independent counters keep the multipliers busy. The other words of the counter are the address's, the same in all
// streams, and so is what follows from them alone: half of the first round and a third of the second.
template <class V, int kStreams, int kRounds = 10>
FF_HD inline void philox(const Address& address, typename V::Wide (&c)[kStreams][4]) {
  static_assert(kRounds > 2);
  uint32_t k0 = address.key_low + kKeyStep0, k1 = address.key_high + kKeyStep1;  // of the second round
  const uint64_t row = uint64_t{kMultiplier1} * address.row;
  const uint64_t next = uint64_t{kMultiplier0} *
                        (static_cast<uint32_t>(row >> 32) ^ address.candidate ^ address.key_low);
  FF_UNROLL
  for (int i = 0; i < kStreams; ++i) {
    const auto p0 = V::product(c[i][0], V::wide(kMultiplier0));
    const auto word2 = V::xor2(V::high(p0), V::wide(address.chain ^ address.key_high));
    const auto p1 = V::product(word2, V::wide(kMultiplier1));
    c[i][0] = V::xor2(V::high(p1), V::wide(static_cast<uint32_t>(row) ^ k0));
    c[i][1] = p1;
    c[i][2] = V::xor2(p0, V::wide(static_cast<uint32_t>(next >> 32) ^ k1));
    c[i][3] = V::wide(static_cast<uint32_t>(next));
  }
  FF_UNROLL
  for (int round = 2; round < kRounds; ++round) {
    k0 += kKeyStep0;
    k1 += kKeyStep1;
    FF_UNROLL
    for (int i = 0; i < kStreams; ++i) {
      const auto p0 = V::product(c[i][0], V::wide(kMultiplier0));
      const auto p1 = V::product(c[i][2], V::wide(kMultiplier1));
      c[i][0] = V::xor3(V::high(p1), c[i][1], V::wide(k0));
      c[i][1] = p1;
      c[i][2] = V::xor3(V::high(p0), c[i][3], V::wide(k1));
      c[i][3] = p0;
    }
  }
}

// The four words of one counter.
struct FourWords {
  uint32_t word[4];
};
FF_HD inline FourWords philox(const Address& address, uint32_t counter) {
  ScalarLanes::Wide c[1][4] = {{counter}};
  philox<ScalarLanes, 1>(address, c);
  return {{static_cast<uint32_t>(c[0][0]), static_cast<uint32_t>(c[0][1]), static_cast<uint32_t>(c[0][2]),
           static_cast<uint32_t>(c[0][3])}};
}

// A word as a number in (0, 1).
template <class V>
FF_HD inline typename V::Float uniform(typename V::Word word) {
  return V::fma(V::to_float(V::template right<9>(word)), V::real(0x1p-23f), V::real(0x1p-24f));
}

// sqrt(-2 ln u), u = ((a >> 8) + 1) 2^-24 = 2^e m with m in [2/3, 4/3): -2 ln u = -2 ln 2 e - 2 ln(1 + f), f = m - 1.
template <class V>
FF_HD inline typename V::Float radius(typename V::Word a) {
  const auto count = V::bits(V::to_float(V::add(V::template right<8>(a), V::word(1))));  // u 2^24, exact
  // e << 23: what the exponent field of count is above that of 2/3 2^24 (an arithmetic shift in disguise).
  const auto exponent = V::both(V::subtract(count, V::word(0x4b2aaaabu)), V::word(0xff800000u));
  const auto f = V::fma(V::from_bits(V::subtract(count, exponent)), V::real(0x1p-24f), V::real(-1.0f));
  auto p = V::real(0x1.4d817ap-2f);  // minimax on f for the error of r; 4.4e-8 at worst
  p = V::fma(p, f, V::real(-0x1.61ef32p-2f));
  p = V::fma(p, f, V::real(0x1.4c1aa8p-2f));
  p = V::fma(p, f, V::real(-0x1.94cb36p-2f));
  p = V::fma(p, f, V::real(0x1.003882p-1f));
  p = V::fma(p, f, V::real(-0x1.5564f8p-1f));
  p = V::fma(p, f, V::real(0x1.ffff1ap-1f));
  p = V::fma(p, f, V::real(-0x1.fffff8p+0f));
  const auto whole = V::multiply(V::to_float(exponent), V::real(-0x1.62e43p-23f));  // -2 ln 2 e
  return V::square_root(V::fma(f, p, whole));
}

// Two normals from two words. The turn b / 2^32 is halved: s = the fraction of a half turn nearest to zero, and the
// point is on the other half of the circle where the top bits of b and 2 b differ.
template <class V>
FF_HD inline void box_muller(typename V::Word a, typename V::Word b, typename V::Float& first,
                             typename V::Float& second) {
  const auto doubled = V::template left<1>(b);
  const auto r = V::flip(radius<V>(a), b, doubled);
  const auto s = V::multiply(V::to_float(doubled), V::real(0x1p-32f));  // [-1/2, 1/2]
  const auto s2 = V::multiply(s, s);
  auto cosine = V::real(0x1.c2939ap-3f);  // cos(pi s), 5.4e-8 at worst
  cosine = V::fma(cosine, s2, V::real(-0x1.55020cp+0f));
  cosine = V::fma(cosine, s2, V::real(0x1.03bd9ap+2f));
  cosine = V::fma(cosine, s2, V::real(-0x1.3bd3bp+2f));
  cosine = V::fma(cosine, s2, V::real(1.0f));
  auto sine = V::real(0x1.3912a8p-4f);  // sin(pi s) / s, 7.6e-9 at worst
  sine = V::fma(sine, s2, V::real(-0x1.31fbf4p-1f));
  sine = V::fma(sine, s2, V::real(0x1.466504p+1f));
  sine = V::fma(sine, s2, V::real(-0x1.4abba2p+2f));
  sine = V::fma(sine, s2, V::real(0x1.921fb4p+1f));
  first = V::multiply(r, cosine);
  second = V::multiply(V::multiply(r, s), sine);
}

}  // namespace flowfast
