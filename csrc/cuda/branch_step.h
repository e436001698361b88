// One thread of flowfast::branch_step: kWidth neighbours in each of the four planes of a block of the noise stream.
#pragma once

#include <limits>

#include "cuda/noise.h"

namespace flowfast {

struct BranchStep {
  AddressColumns address;
  const int64_t* parent;
  const float* table;  // rows of kColumns
  int64_t parents, rows, lanes, n;
  const void *x, *u, *grad;  // grad may be null
  void *out, *x0_out;        // out may be x, x0_out may be null
};

// On the CPU an index out of range is an error; here nobody may wait for one, so the lane shows it: all NaN.
template <class T, int kWidth>
FF_HD inline void fill_nan(T* out, int64_t counter, int64_t n) {
  using V = LanesOf<kWidth>;
  Packed<T, kWidth> nan;
  FF_UNROLL
  for (int i = 0; i < kWidth / V::kWidth; ++i)
    pack<T, kWidth>(V::real(std::numeric_limits<float>::quiet_NaN()), nan, i);
  for (int w = 0; w < 4; ++w)
    if (element_of(counter, w) < n) nan.store(out + element_of(counter, w));
}

// A term of a sum; kPlain: no coefficient is 0, so nothing has to be looked at.
template <bool kPlain, class V, class Read>
FF_HD inline typename V::Float term(float coefficient, Read read, typename V::Float sum) {
  if constexpr (kPlain)
    return V::fma(V::real(coefficient), read(), sum);
  else
    return add_term<V>(coefficient, read, sum);
}

// The elements of one thread once lane, rows and coefficients are known. kPlain: noise, no grad, no zero coefficient.
template <class T, int kWidth, bool kPlain>
FF_HD inline void step_elements(const Address& address, const float (&c)[kColumns], int64_t counter, int64_t n,
                                const T* x, const T* u, const T* grad, T* out, T* x0_out) {
  using V = LanesOf<kWidth>;
  using Vector = Packed<T, kWidth>;
  const int64_t begin = element_of(counter, 0);
  // All reads come before the first write: out may be x.
  Vector xs[4] = {}, us[4] = {}, grads[4] = {};
  const bool needs_x = kPlain || c[kA] != 0.0f || c[kDFrom] != 0.0f;
  const bool needs_u = kPlain || c[kB] != 0.0f || c[kEFrom] != 0.0f;
  FF_UNROLL
  for (int w = 0; w < 4; ++w) {
    const int64_t element = begin + w * kCounters;
    if (element >= n) continue;
    if (needs_x) xs[w] = Vector::load(x + element);
    if (needs_u) us[w] = Vector::load(u + element);
    if (!kPlain && c[kG] != 0.0f) grads[w] = Vector::load(grad + element);
  }
  Words<kWidth> words = {};
  if (kPlain || c[kC] != 0.0f) thread_words<kWidth>(address, counter, words);

  FF_UNROLL
  for (int half = 0; half < 4; half += 2) {
    Vector children[2], means[2];
    FF_UNROLL
    for (int i = 0; i < kWidth / V::kWidth; ++i) {
      typename V::Float z[2];
      box_muller<V>(plane_word<kWidth>(words, half, i), plane_word<kWidth>(words, half + 1, i), z[0], z[1]);
      FF_UNROLL
      for (int k = 0; k < 2; ++k) {
        const auto read_x = [&] { return unpack<T, kWidth>(xs[half + k], i); };
        const auto read_u = [&] { return unpack<T, kWidth>(us[half + k], i); };
        auto sum = term<kPlain, V>(c[kA], read_x, V::real(0.0f));
        sum = term<kPlain, V>(c[kB], read_u, sum);
        sum = term<kPlain, V>(c[kC], [&] { return z[k]; }, sum);
        if (!kPlain) sum = add_term<V>(c[kG], [&] { return unpack<T, kWidth>(grads[half + k], i); }, sum);
        pack<T, kWidth>(sum, children[k], i);
        const auto x0 = term<kPlain, V>(c[kDFrom], read_x, V::real(0.0f));
        pack<T, kWidth>(term<kPlain, V>(c[kEFrom], read_u, x0), means[k], i);
      }
    }
    FF_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int64_t element = begin + (half + k) * kCounters;
      if (element >= n) continue;
      children[k].store(out + element);
      if (x0_out) means[k].store(x0_out + element);
    }
  }
}

template <class T, int kWidth>
FF_HD inline void branch_step_thread(const BranchStep& task, int64_t lane, int64_t thread) {
  const int64_t counter = first_counter<kWidth>(thread), n = task.n;
  if (element_of(counter, 0) >= n) return;
  const int64_t parent = task.parent[lane], row = task.address.row[lane];
  if (parent < 0 || row < 0) return;  // padding
  T* out = static_cast<T*>(task.out) + row_offset(lane, n);
  T* x0_out = task.x0_out ? static_cast<T*>(task.x0_out) + row_offset(lane, n) : nullptr;
  if (parent >= task.parents || row >= task.rows) {
    fill_nan<T, kWidth>(out, counter, n);
    if (x0_out) fill_nan<T, kWidth>(x0_out, counter, n);
    return;
  }
  float c[kColumns];
  FF_UNROLL
  for (int i = 0; i < kColumns; ++i) c[i] = task.table[row * kColumns + i];
  const bool has_grad = task.grad && c[kG] != 0.0f;
  const bool has_zero = c[kA] == 0.0f || c[kB] == 0.0f || c[kC] == 0.0f ||
                        (x0_out && (c[kDFrom] == 0.0f || c[kEFrom] == 0.0f));
  const Address address = task.address.at(lane, row == kInitialRow ? kInitialNoise : kTransition);
  const T* x = static_cast<const T*>(task.x) + row_offset(parent, n);
  const T* u = static_cast<const T*>(task.u) + row_offset(parent, n);
  const T* grad = static_cast<const T*>(task.grad) + row_offset(lane, n);
  if (!has_grad && !has_zero) return step_elements<T, kWidth, true>(address, c, counter, n, x, u, grad, out, x0_out);
  if (!x0_out) c[kDFrom] = c[kEFrom] = 0.0f;
  if (!task.grad) c[kG] = 0.0f;
  step_elements<T, kWidth, false>(address, c, counter, n, x, u, grad, out, x0_out);
}

}  // namespace flowfast
