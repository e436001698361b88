// One affine step of one element (shared/design: x' = A x + B u + C z + G grad, x0_hat = D x + E u), and the storage types.
//
// A coefficient that is exactly 0 means that its operand is not read at all, so a NaN or an unset buffer cannot leak in.
// Terms are added in the order x, u, z, grad, each with one fma, starting from 0: the same bits in every backend.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace flowfast {

// Columns of the schedule's table, (T, 8) float32.
enum Column { kA = 0, kB, kC, kG, kD, kE, kDFrom, kEFrom, kColumns };

// The row of the table that is the initial noise; every other row is a transition.
constexpr int64_t kInitialRow = 0;

// coefficient * operand + sum, where `read` is called only if the coefficient is not 0.
template <class V, class Read>
FF_HD inline typename V::Float add_term(float coefficient, Read read, typename V::Float sum) {
  return coefficient != 0.0f ? V::fma(V::real(coefficient), read(), sum) : sum;
}

// Classifier-free guidance: u_uncond + w (u - u_uncond), exactly u at w = 1 and exactly u_uncond at w = 0.
template <class V, class ReadU, class ReadUncond>
FF_HD inline typename V::Float guide(float w, ReadU read_u, ReadUncond read_uncond) {
  if (w == 1.0f) return read_u();
  const typename V::Float uncond = read_uncond();
  return w == 0.0f ? uncond : V::fma(V::real(w), V::minus(read_u(), uncond), uncond);
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Bits of the smallest magnitude that the storage type does not hold as a finite number.
FF_HD constexpr uint32_t first_infinite(float) { return 0x7f800000u; }
FF_HD constexpr uint32_t first_infinite(BFloat16) { return 0x7f7f8000u; }
FF_HD constexpr uint32_t first_infinite(Half) { return 0x477ff000u; }

namespace detail {
FF_HD inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
FF_HD inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
}  // namespace detail

FF_HD inline float widen(float value) { return value; }
FF_HD inline float widen(BFloat16 value) { return detail::float_of(static_cast<uint32_t>(value.bits) << 16); }
FF_HD inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return detail::float_of(sign | 0x70000000u | magnitude);  // infinity, NaN
  // 2^112 moves the exponent's bias from 15 to 127 and is exact for subnormals too.
  return detail::float_of(sign | detail::bits_of(detail::float_of(magnitude) * 0x1p112f));
}

// Round to nearest even, like torch.
FF_HD inline void narrow(float value, float& out) { out = value; }
FF_HD inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = detail::bits_of(value);
  out.bits = value != value ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FF_HD inline void narrow(float value, Half& out) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: 0.5 has the unit of the last place of a subnormal half
    half = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace flowfast
