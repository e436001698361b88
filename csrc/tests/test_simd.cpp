// The vector kernels against the scalar ones, to the last bit, on arrays with nothing behind their last element.
#include <cmath>

#include "tests/problem.h"

namespace flowfast {
namespace {

std::vector<const Kernels*> vector_kernels() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(&kAvx512Kernels);
#endif
  return sets;
}

template <class T>
void compare(const Kernels& kernels, int64_t n) {
  const Storage storage = kStorageOf<T>;
  const Exact<float> table = problem_table();
  Exact<T> x(n), u(n), extra(n), out(n), x0(n), expected(n), expected_x0(n);
  fill(x, 1);
  fill(u, 2);
  fill(extra, 3);
  for (int64_t row = 0; row < 6; ++row) {
    const Address address = problem_address(n, row);
    const float* c = table.get() + row * kColumns;
    for (const T* grad : {static_cast<const T*>(nullptr), static_cast<const T*>(extra.get())}) {
      kernels.branch_step[storage]({address, 0, n, c, x.get(), u.get(), grad, out.get(), x0.get()});
      kScalarKernels.branch_step[storage](
          {address, 0, n, c, x.get(), u.get(), grad, expected.get(), expected_x0.get()});
      CHECK(out.same_bits(expected) && x0.same_bits(expected_x0), "%s, n = %ld, row %ld", kernels.name, n, row);
    }
    for (float w : {0.0f, 1.0f, 3.5f}) {
      const T* uncond = w == 1.0f ? nullptr : extra.get();  // not read
      CHECK(kernels.posterior_mean[storage]({0, n, c, w, x.get(), u.get(), uncond, out.get(), x0.get()}));
      CHECK(kScalarKernels.posterior_mean[storage](
          {0, n, c, w, x.get(), u.get(), uncond, expected.get(), expected_x0.get()}));
      CHECK(w != 1.0f || out.same_bits(u), "%s, n = %ld, guidance 1 is u", kernels.name, n);
      CHECK(out.same_bits(expected) && x0.same_bits(expected_x0), "%s, n = %ld, guidance %g", kernels.name, n, w);
    }
    kernels.normal[storage]({address, 0, n, out.get()});
    kScalarKernels.normal[storage]({address, 0, n, expected.get()});
    CHECK(out.same_bits(expected), "%s, n = %ld", kernels.name, n);
  }
}

// bfloat16 of any bits, and coefficients whose sums often lie in the middle between two numbers that it holds;
// NaN everywhere, in one block of three, or nowhere; beside x and in its place; now and then a coefficient of x0 that makes
// NaN of a zero.
void compare_all_bits(const Kernels& kernels) {
  constexpr int64_t n = 3 * kBlock + 37;
  Exact<float> table = problem_table();
  for (int column : {kA, kB, kDFrom, kEFrom})
    table[kColumns + column] = column == kB || column == kEFrom ? -0.9f : 1.0f;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    Random random(seed);
    table[kColumns + kEFrom] = seed % 7 == 6 ? INFINITY : -0.9f;
    Exact<BFloat16> x(n), u(n), out(n), x0(n), expected(n), expected_x0(n);
    fill(x, seed + 40);
    fill(u, seed + 80);
    const int64_t wild_begin = seed % 3 ? kBlock : 0, wild_end = seed % 3 == 2 ? kBlock : seed % 3 ? 2 * kBlock : n;
    for (int64_t i = wild_begin; i < wild_end; ++i) {
      x[i].bits = static_cast<uint16_t>(random.bits());
      if (i % 3 == 0) u[i].bits = static_cast<uint16_t>(random.bits());
    }
    u[n / 2].bits = 0;
    const Address address = problem_address(seed, 1);
    const float* c = table.get() + kColumns;
    for (bool mean : {true, false}) {
      kernels.branch_step[kBFloat16](
          {address, 0, n, c, x.get(), u.get(), nullptr, out.get(), mean ? x0.get() : nullptr});
      kScalarKernels.branch_step[kBFloat16](
          {address, 0, n, c, x.get(), u.get(), nullptr, expected.get(), mean ? expected_x0.get() : nullptr});
      CHECK(out.same_bits(expected) && x0.same_bits(expected_x0), "%s, seed %lu", kernels.name, seed);
    }
    kernels.branch_step[kBFloat16]({address, 0, n, c, x.get(), u.get(), nullptr, x.get(), x0.get()});
    CHECK(x.same_bits(expected) && x0.same_bits(expected_x0), "%s in place, seed %lu", kernels.name, seed);
  }
}

// Is x0 finite, with and without u_out; the scalar kernels are checked, too.
template <class T>
void compare_finiteness(const Kernels& kernels, int64_t n) {
  const Exact<float> table = sum_of_x_and_u();
  for (const NotFinite<T>& value : not_finite<T>()) {
    for (int64_t place : {int64_t{0}, n / 3, n / 2, n - 1}) {
      Exact<T> x(n), u(n), out(n), x0(n);
      fill(x, 1);
      x[place] = value.x;
      u[place] = value.u;
      for (T* u_out : {static_cast<T*>(nullptr), out.get()})
        CHECK(kernels.posterior_mean[kStorageOf<T>](
                  {0, n, table.get(), 1.0f, x.get(), u.get(), nullptr, u_out, x0.get()}) == value.stays_finite,
              "%s, %s at %ld of %ld", kernels.name, value.name, place, n);
      CHECK(out.same_bits(u) && std::isfinite(widen(x0[place])) == value.stays_finite, "%s, %s", kernels.name,
            value.name);
      if (place > 0)
        CHECK(kernels.posterior_mean[kStorageOf<T>](
            {0, place, table.get(), 1.0f, x.get(), u.get(), nullptr, nullptr, x0.get()}));
    }
  }
}

void compare_uniforms(const Kernels& kernels, int64_t n) {
  Exact<float> out(n), expected(n);
  kernels.uniform({problem_address(n, 1), 0, n, out.get()});
  kScalarKernels.uniform({problem_address(n, 1), 0, n, expected.get()});
  CHECK(out.same_bits(expected), "%s, n = %ld", kernels.name, n);
}

}  // namespace

void test_simd() {
  for (int64_t n : {1, 7, 123}) {
    compare_finiteness<float>(kScalarKernels, n);
    compare_finiteness<BFloat16>(kScalarKernels, n);
    compare_finiteness<Half>(kScalarKernels, n);
  }
  for (const Kernels* kernels : vector_kernels()) {
    for (int64_t n : {1, 7, 123, 1023, 4097}) {
      compare<float>(*kernels, n);
      compare<BFloat16>(*kernels, n);
      compare<Half>(*kernels, n);
      compare_finiteness<float>(*kernels, n);
      compare_finiteness<BFloat16>(*kernels, n);
      compare_finiteness<Half>(*kernels, n);
      compare_uniforms(*kernels, n);
    }
    compare_all_bits(*kernels);
  }
}

}  // namespace flowfast
