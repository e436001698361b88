// AVX-512 (F, BW, DQ, VL): sixteen lanes.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace flowfast {
namespace {

struct Lanes {
  static constexpr int kWidth = 16;
  static constexpr int kHalves = 2;
  static constexpr bool kPairs = true;
  using Wide = __m512i;
  using Word = __m512i;
  using Float = __m512;

  static Wide wide(uint32_t value) { return _mm512_set1_epi64(value); }
  static Wide product(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
  static Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
  static Wide xor2(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
  static Wide xor3(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  template <int kStride>
  static Wide counters(uint32_t first) {
    constexpr int k = kStride;
    return _mm512_add_epi32(_mm512_set1_epi32(first),
                            _mm512_setr_epi32(0, 0, k, 0, 2 * k, 0, 3 * k, 0, 4 * k, 0, 5 * k, 0, 6 * k, 0, 7 * k, 0));
  }
  static Word low_words(Wide even, Wide odd) { return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA); }
  static Word high_words(Wide even, Wide odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }

  static Word word(uint32_t value) { return _mm512_set1_epi32(value); }
  static Float real(float value) { return _mm512_set1_ps(value); }
  static Word add(Word a, Word b) { return _mm512_add_epi32(a, b); }
  static Word subtract(Word a, Word b) { return _mm512_sub_epi32(a, b); }
  static Word both(Word a, Word b) { return _mm512_and_si512(a, b); }
  static Word larger(Word a, Word b) { return _mm512_max_epu32(a, b); }
  template <int kBits>
  static Word left(Word a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Word right(Word a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static Float to_float(Word a) { return _mm512_cvtepi32_ps(a); }
  static Word bits(Float a) { return _mm512_castps_si512(a); }
  static Float from_bits(Word a) { return _mm512_castsi512_ps(a); }
  static Float minus(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float square_root(Float a) { return _mm512_sqrt_ps(a); }
  static Float flip(Float r, Word a, Word b) {
    const Word sign = _mm512_ternarylogic_epi32(a, b, word(0x80000000u), 0x28);  // (a ^ b) & c
    return from_bits(_mm512_xor_si512(bits(r), sign));
  }

  static __m256i load16(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }
  static Word load(const uint32_t* data) { return _mm512_loadu_si512(data); }
  static Float load(const float* data) { return _mm512_loadu_ps(data); }
  static Float load(const BFloat16* data) { return from_bits(left<16>(_mm512_cvtepu16_epi32(load16(data)))); }
  static Float load(const Half* data) { return _mm512_cvtph_ps(load16(data)); }
  static void store16(void* data, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(data), value); }
  static void store(uint32_t* data, Word value) { _mm512_storeu_si512(data, value); }
  static void store(float* data, Float value) { _mm512_storeu_ps(data, value); }
  static void store(BFloat16* data, Float value) {
    // Any NaN becomes this one, every other class (of eight) stays.
    const Float sane = _mm512_fixupimm_ps(from_bits(word(0x7fc00000)), value, word(0x11111100), 0);
    const Word rounding = add(both(right<16>(bits(sane)), word(1)), word(0x7fff));
    const Word rounded = add(bits(sane), rounding);
    alignas(64) static constexpr uint16_t kUpper[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    store16(data, _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpper), rounded)));
  }
  static void load_pair(const BFloat16* data, Float (&pair)[2]) {  // even elements, odd elements
    const Word words = _mm512_loadu_si512(data);
    pair[0] = from_bits(left<16>(words));
    pair[1] = from_bits(both(words, word(0xffff0000u)));
  }
  static Word round16(Word a) {  // to the nearest multiple of 2^16, to even
    const __mmask16 odd = _mm512_test_epi32_mask(a, word(0x10000));
    return add(a, _mm512_mask_blend_epi32(odd, word(0x7fff), word(0x8000)));
  }
  static void store_pair(BFloat16* data, const Float (&pair)[2]) {  // no NaN
    const Word even = round16(bits(pair[0])), odd = round16(bits(pair[1]));
    _mm512_storeu_si512(data, _mm512_mask_blend_epi16(0xaaaaaaaau, right<16>(even), odd));
  }
  static bool all_finite(Float a) {
    return !_mm512_cmp_ps_mask(minus(a, a), real(0.0f), _CMP_NEQ_UQ);  // infinity - infinity is NaN
  }
  static void store(Half* data, Float value) { store16(data, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)); }
};

}  // namespace

const Kernels kAvx512Kernels = make_kernels<Lanes>("avx512");

}  // namespace flowfast
