// The vector kernels against the scalar ones, to the last bit, on arrays with nothing behind their last element.
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
      kernels.posterior_mean[storage]({0, n, c, w, x.get(), u.get(), extra.get(), out.get(), x0.get()});
      kScalarKernels.posterior_mean[storage](
          {0, n, c, w, x.get(), u.get(), extra.get(), expected.get(), expected_x0.get()});
      CHECK(out.same_bits(expected) && x0.same_bits(expected_x0), "%s, n = %ld, guidance %g", kernels.name, n, w);
    }
    kernels.normal[storage]({address, 0, n, out.get()});
    kScalarKernels.normal[storage]({address, 0, n, expected.get()});
    CHECK(out.same_bits(expected), "%s, n = %ld", kernels.name, n);
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
  for (const Kernels* kernels : vector_kernels()) {
    for (int64_t n : {1, 7, 123, 1023, 4097}) {
      compare<float>(*kernels, n);
      compare<BFloat16>(*kernels, n);
      compare<Half>(*kernels, n);
      compare_uniforms(*kernels, n);
    }
  }
}

}  // namespace flowfast
