// One thread of flowfast::posterior_mean: kWidth neighbouring elements.
#pragma once

#include <limits>

#include "cuda/layout.h"
#include "cuda/vectors.h"

namespace flowfast {

struct PosteriorMean {
  const int64_t* row;
  const float *table, *guidance;  // guidance: a scale for each lane, read only beside u_uncond
  int64_t rows, lanes, n;
  const void *x, *u, *u_uncond;  // u_uncond may be null
  void *u_out, *x0_out;          // may be u and x; u_out may be null
  bool* broken;                  // may be null
};

FF_HD inline uint32_t largest(uint32_t word) { return word; }
FF_HD inline uint32_t largest(WordPair words) { return ThreadLanes::larger(words.a, words.b); }

template <class T, int kWidth>
FF_HD inline void posterior_mean_thread(const PosteriorMean& task, int64_t lane, int64_t thread) {
  using V = LanesOf<kWidth>;
  using Vector = Packed<T, kWidth>;
  if (thread * kWidth >= task.n) return;
  const int64_t row = task.row[lane], begin = row_offset(lane, task.n) + thread * kWidth;
  if (row < 0) return;  // padding
  // On the CPU a row out of range is an error; here nobody may wait for one, so the lane shows it: all NaN.
  const bool in_table = row < task.rows;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float d = in_table ? task.table[row * kColumns + kD] : nan,
              e = in_table ? task.table[row * kColumns + kE] : nan;
  const float w = task.u_uncond ? (in_table ? task.guidance[lane] : nan) : 1.0f;

  // All reads come before the first write: the outputs may be u and x.
  Vector x = {}, u = {}, uncond = {};
  if (d != 0.0f) x = Vector::load(static_cast<const T*>(task.x) + begin);
  if (w != 0.0f) u = Vector::load(static_cast<const T*>(task.u) + begin);
  if (w != 1.0f) uncond = Vector::load(static_cast<const T*>(task.u_uncond) + begin);
  Vector guided, mean;
  auto worst = V::word(0);  // largest magnitude, as bits: a NaN is above infinity
  FF_UNROLL
  for (int i = 0; i < kWidth / V::kWidth; ++i) {
    auto u_of = guide<V>(w, [&] { return unpack<T, kWidth>(u, i); }, [&] { return unpack<T, kWidth>(uncond, i); });
    if (!in_table) u_of = V::real(nan);
    auto x0 = add_term<V>(d, [&] { return unpack<T, kWidth>(x, i); }, V::real(0.0f));
    x0 = add_term<V>(e, [&] { return u_of; }, x0);
    pack<T, kWidth>(u_of, guided, i);
    pack<T, kWidth>(x0, mean, i);
    worst = V::larger(worst, V::both(V::bits(x0), V::word(0x7fffffffu)));
  }
  if (task.u_out) guided.store(static_cast<T*>(task.u_out) + begin);
  mean.store(static_cast<T*>(task.x0_out) + begin);
  // Several threads may say so: all of them the same.
  if (task.broken && largest(worst) >= first_infinite(T{})) task.broken[lane] = true;
}

}  // namespace flowfast
