// AVX2 + FMA + F16C: eight lanes.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace flowfast {
namespace {

struct Lanes {
  static constexpr int kWidth = 8;
  static constexpr int kHalves = 2;
  static constexpr bool kPairs = true;
  using Wide = __m256i;
  using Word = __m256i;
  using Float = __m256;

  static Wide wide(uint32_t value) { return _mm256_set1_epi64x(value); }
  static Wide product(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
  static Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
  static Wide xor2(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
  static Wide xor3(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  template <int kStride>
  static Wide counters(uint32_t first) {
    constexpr int k = kStride;
    return _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 0, k, 0, 2 * k, 0, 3 * k, 0));
  }
  static Word low_words(Wide even, Wide odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa); }
  static Word high_words(Wide even, Wide odd) { return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa); }

  static Word word(uint32_t value) { return _mm256_set1_epi32(value); }
  static Float real(float value) { return _mm256_set1_ps(value); }
  static Word add(Word a, Word b) { return _mm256_add_epi32(a, b); }
  static Word subtract(Word a, Word b) { return _mm256_sub_epi32(a, b); }
  static Word both(Word a, Word b) { return _mm256_and_si256(a, b); }
  static Word larger(Word a, Word b) { return _mm256_max_epu32(a, b); }
  template <int kBits>
  static Word left(Word a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Word right(Word a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static Float to_float(Word a) { return _mm256_cvtepi32_ps(a); }
  static Word bits(Float a) { return _mm256_castps_si256(a); }
  static Float from_bits(Word a) { return _mm256_castsi256_ps(a); }
  static Float minus(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float square_root(Float a) { return _mm256_sqrt_ps(a); }
  static Float flip(Float r, Word a, Word b) {
    return from_bits(_mm256_xor_si256(bits(r), both(_mm256_xor_si256(a, b), word(0x80000000u))));
  }

  static __m128i load16(const void* data) { return _mm_loadu_si128(static_cast<const __m128i*>(data)); }
  static Word load(const uint32_t* data) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)); }
  static Float load(const float* data) { return _mm256_loadu_ps(data); }
  static Float load(const BFloat16* data) { return from_bits(left<16>(_mm256_cvtepu16_epi32(load16(data)))); }
  static Float load(const Half* data) { return _mm256_cvtph_ps(load16(data)); }
  static void store16(void* data, __m128i value) { _mm_storeu_si128(static_cast<__m128i*>(data), value); }
  static void store(uint32_t* data, Word value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), value); }
  static void store(float* data, Float value) { _mm256_storeu_ps(data, value); }
  static void store(BFloat16* data, Float value) {
    const Word rounding = add(both(right<16>(bits(value)), word(1)), word(0x7fff));
    const Word is_nan = bits(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const Word rounded = _mm256_blendv_epi8(add(bits(value), rounding), word(0x7fc00000), is_nan);
    const Word upper = _mm256_shuffle_epi8(
        rounded, _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15)));
    const Word packed = _mm256_permute4x64_epi64(upper, 0x08);
    store16(data, _mm256_castsi256_si128(packed));
  }
  static void load_pair(const BFloat16* data, Float (&pair)[2]) {  // even elements, odd elements
    const Word words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    pair[0] = from_bits(left<16>(words));
    pair[1] = from_bits(both(words, word(0xffff0000u)));
  }
  static Word round16(Word a) {  // to the nearest multiple of 2^16, to even
    return add(a, add(both(right<16>(a), word(1)), word(0x7fff)));
  }
  static void store_pair(BFloat16* data, const Float (&pair)[2]) {  // no NaN
    const Word even = round16(bits(pair[0])), odd = round16(bits(pair[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), _mm256_blend_epi16(right<16>(even), odd, 0xaa));
  }
  static bool all_finite(Float a) {
    return !_mm256_movemask_ps(_mm256_cmp_ps(minus(a, a), real(0.0f), _CMP_NEQ_UQ));  // infinity - infinity is NaN
  }
  static void store(Half* data, Float value) { store16(data, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)); }
};

}  // namespace

const Kernels kAvx2Kernels = make_kernels<Lanes>("avx2");

}  // namespace flowfast
