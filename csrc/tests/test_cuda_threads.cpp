// What a GPU thread runs (csrc/cuda/<op>.h), run on the CPU thread by thread: against the scalar kernels and csrc/core
// to the last bit, on arrays with nothing behind their last element. Left out are only the launch and the few functions
// that have a `__CUDA_ARCH__` branch: conversions, 128-bit moves, fma, and the square root, which is checked here as
// arithmetic.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>

#include "core/log_weights.h"
#include "cuda/branch_step.h"
#include "cuda/gather_ancestors.h"
#include "cuda/normalize_log_weights.h"
#include "cuda/posterior_mean.h"
#include "cuda/resample.h"
#include "tests/problem.h"
#include "tests/serial_block.h"

namespace flowfast {
namespace {

constexpr int64_t kLanes = 6, kParents = 3;

// All threads of a grid, the last ones first and some more than there is work for.
template <class F>
void for_threads(int64_t threads, const F& f) {
  for (int64_t thread = ceil_div(threads, kThreads) * kThreads - 1; thread >= 0; --thread) f(thread);
}

void index_arithmetic() {
  // Every element of the blocks around 2^31 and at the end of the longest row stands for one counter and word.
  for (int64_t begin : {int64_t{0}, (int64_t{1} << 31) - kBlock, int64_t{1} << 31, (int64_t{1} << 32) - kBlock,
                        int64_t{3} << 32, kMaxElements - 2 * kBlock}) {
    std::vector<int> seen(2 * kBlock);
    for (int64_t counter = begin / 4; counter < begin / 4 + 2 * kCounters; ++counter)
      for (int w = 0; w < 4; ++w) {
        const int64_t element = element_of(counter, w);
        const bool inside = element >= begin && element < begin + 2 * kBlock;
        CHECK(inside, "counter %ld gives element %ld", counter, element);
        if (inside) ++seen[element - begin];
      }
    for (int count : seen) CHECK(count == 1);
  }
  CHECK(element_of(0xffffffff, 3) == kMaxElements - 1);
  CHECK(first_counter<8>(planar_threads(kMaxElements, 8)) == int64_t{1} << 32);
  CHECK(planar_threads(1, 8) == 8 && planar_threads(256, 8) == 8 && planar_threads(257, 1) == 128);
  CHECK(row_offset(5, int64_t{1} << 33) == int64_t{5} << 33);
  CHECK(copy_blocks(int64_t{1} << 34, 16) == int64_t{1} << 21);
}

void words_beyond_32_bits_of_elements() {
  const Address address = problem_address(5, 1);
  for (int64_t begin : {int64_t{1} << 31, kMaxElements - kBlock}) {
    Exact<uint32_t> expected(kBlock);
    kScalarKernels.block_words(address, begin, expected.get());
    for (int64_t counter = begin / 4; counter < begin / 4 + kCounters; counter += 8) {
      Words<8> words;
      thread_words<8>(address, counter, words);
      for (int i = 0; i < 8; ++i)
        for (int w = 0; w < 4; ++w) CHECK(words[i][w].low == expected[element_of(counter + i, w) - begin]);
    }
  }
}

// The root of a GPU thread. Its reciprocal root is off by 2^-22.9 at most (PTX ISA, rsqrt.approx.f32), so every float
// within 2^-23.1 is tried, and the root must be the correctly rounded one. In the rest of the band one single pair of
// number and reciprocal would fail; the GPU does not give that one, as its own sqrt.rn.f32 is these same instructions.
struct RootProbe : ScalarLanes {
  static inline float argument;
  static float square_root(float a) { return argument = a; }
};

void roots_are_correctly_rounded() {
  const double band = std::exp2(-23.1);
  float smallest = 1.0f;
  const auto fma = [](float a, float b, float c) { return std::fma(a, b, c); };
  for (uint32_t count = 0; count < 1u << 24; ++count) {
    radius<RootProbe>(count << 8);
    const float a = RootProbe::argument;
    if (a != 0.0f && a < smallest) smallest = a;
    const float guarded = a > kTinyRoot ? a : kTinyRoot;
    const double exact = 1.0 / std::sqrt(static_cast<double>(guarded));
    const uint32_t nearest = detail::bits_of(static_cast<float>(exact));
    for (uint32_t bits = nearest - 2; bits <= nearest + 2; ++bits) {
      const float y = detail::float_of(bits);
      if (std::fabs(y - exact) > band * exact) continue;
      CHECK(detail::bits_of(root_from_reciprocal(a, y, fma)) == detail::bits_of(std::sqrt(a)), "root of %a from %a", a,
            y);
    }
  }
  CHECK(smallest > 1e-7f && smallest > kTinyRoot);
}

template <class T, int kWidth>
void step_and_noise(int64_t n) {
  const Storage storage = kStorageOf<T>;
  const Exact<float> table = problem_table();
  Exact<T> x(kParents * n), u(kParents * n), grad(kLanes * n);
  fill(x, 1);
  fill(u, 2);
  fill(grad, 3);
  // Lanes 3 and 4 are padding.
  const int64_t parent[] = {0, 2, 1, -1, 0, 2}, row[] = {1, 0, 2, 1, -1, 5};
  int64_t key[kLanes], candidate[kLanes], chain[kLanes];
  Random random(n);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    key[lane] = static_cast<int64_t>(random.bits());
    candidate[lane] = static_cast<int64_t>(random.bits() >> 32);
    chain[lane] = static_cast<int64_t>(random.bits() >> 32);
  }
  const AddressColumns columns{key, row, candidate, chain};
  // Row numbers of the table of each lane are turned by `turn`, so that every kind of row meets every lane.
  for (int turn = 0; turn < 6; ++turn) {
    int64_t rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) rows[lane] = row[lane] < 0 ? -1 : (row[lane] + turn) % 6;
    const AddressColumns turned{key, rows, candidate, chain};
    for (const bool with_grad : {false, true}) {
      for (const bool with_x0 : {false, true}) {
        Exact<T> out(kLanes * n), x0(kLanes * n), expected(kLanes * n), expected_x0(kLanes * n);
        BranchStep task{turned, parent,  table.get(), kParents, 6,         kLanes,
                        n,      x.get(), u.get(),     nullptr,  out.get(), nullptr};
        if (with_grad) task.grad = grad.get();
        if (with_x0) task.x0_out = x0.get();
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          for_threads(planar_threads(n, kWidth),
                      [&](int64_t thread) { branch_step_thread<T, kWidth>(task, lane, thread); });
          if (parent[lane] < 0 || rows[lane] < 0) continue;
          const Address address = turned.at(lane, rows[lane] == kInitialRow ? kInitialNoise : kTransition);
          kScalarKernels.branch_step[storage]({address, 0, n, table.get() + rows[lane] * kColumns,
                                               x.get() + parent[lane] * n, u.get() + parent[lane] * n,
                                               with_grad ? grad.get() + lane * n : nullptr, expected.get() + lane * n,
                                               with_x0 ? expected_x0.get() + lane * n : nullptr});
        }
        CHECK(out.same_bits(expected) && x0.same_bits(expected_x0), "width %d, n = %ld, turn %d", kWidth, n, turn);
      }
    }
  }

  Exact<T> noise(kLanes * n), expected(kLanes * n);
  const NoiseFill fill_task{columns, kProposalMove, kLanes, n, noise.get()};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for_threads(planar_threads(n, kWidth),
                [&](int64_t thread) { noise_thread<T, kWidth, false>(fill_task, lane, thread); });
    if (row[lane] >= 0)
      kScalarKernels.normal[storage]({columns.at(lane, kProposalMove), 0, n, expected.get() + lane * n});
  }
  CHECK(noise.same_bits(expected), "width %d, n = %ld", kWidth, n);
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for_threads(planar_threads(n, kWidth),
                  [&](int64_t thread) { noise_thread<T, kWidth, true>(fill_task, lane, thread); });
      if (row[lane] >= 0) kScalarKernels.uniform({columns.at(lane, kProposalMove), 0, n, expected.get() + lane * n});
    }
    CHECK(noise.same_bits(expected), "uniforms, width %d, n = %ld", kWidth, n);
  }
}

template <class T, int kWidth>
void step_in_place_and_out_of_range(int64_t n) {
  const Exact<float> table = problem_table();
  const int64_t key[] = {5, 6}, row[] = {1, 1}, candidate[] = {7, 8}, chain[] = {9, 10}, own[] = {0, 1};
  Exact<T> x(2 * n), u(2 * n), out(2 * n), x0(2 * n);
  fill(x, 4);
  fill(u, 5);
  BranchStep task{
      {key, row, candidate, chain}, own, table.get(), 2, 6, 2, n, x.get(), u.get(), nullptr, out.get(), x0.get()};
  const auto run = [&] {
    for (int64_t lane = 0; lane < 2; ++lane)
      for_threads(planar_threads(n, kWidth),
                  [&](int64_t thread) { branch_step_thread<T, kWidth>(task, lane, thread); });
  };
  run();
  task.out = x.get();
  run();
  CHECK(x.same_bits(out));

  const int64_t bad_parent[] = {2, 1}, bad_row[] = {1, 6};
  for (const bool parent_is_bad : {true, false}) {
    task.out = out.get();
    task.parent = parent_is_bad ? bad_parent : own;
    task.address.row = parent_is_bad ? row : bad_row;
    run();
    const int64_t bad_lane = parent_is_bad ? 0 : 1;
    for (int64_t lane = 0; lane < 2; ++lane)
      for (int64_t i = 0; i < n; ++i) {
        const float value = widen(out[lane * n + i]), mean = widen(x0[lane * n + i]);
        CHECK((value != value) == (lane == bad_lane) && (mean != mean) == (lane == bad_lane));
      }
  }
}

template <class T, int kWidth>
void means(int64_t n) {
  const Exact<float> table = problem_table();
  const int64_t row[] = {1, 0, -1, 4, 5, 6};  // the last one is out of range
  const float guidance[] = {0.0f, 1.0f, 2.0f, 3.5f, 1.0f, 1.0f};
  Exact<T> x(kLanes * n), u(kLanes * n), uncond(kLanes * n);
  fill(x, 6);
  fill(u, 7);
  fill(uncond, 8);
  for (int64_t lane : {1, 4})  // of guidance 1
    for (int64_t i = 0; i < n; ++i) narrow(std::numeric_limits<float>::quiet_NaN(), uncond[lane * n + i]);
  for (const bool guided : {false, true}) {
    Exact<T> u_out(kLanes * n), x0(kLanes * n), expected_u(kLanes * n), expected_x0(kLanes * n);
    PosteriorMean task{row,     table.get(), nullptr, 6,           kLanes,   n,
                       x.get(), u.get(),     nullptr, u_out.get(), x0.get(), nullptr};
    if (guided) task.guidance = guidance, task.u_uncond = uncond.get();
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for_threads(ceil_div(n, kWidth), [&](int64_t thread) { posterior_mean_thread<T, kWidth>(task, lane, thread); });
    for (int64_t lane = 0; lane < kLanes - 1; ++lane)
      if (row[lane] >= 0)
        kScalarKernels.posterior_mean[kStorageOf<T>](
            {0, n, table.get() + row[lane] * kColumns, guided ? guidance[lane] : 1.0f, x.get() + lane * n,
             u.get() + lane * n, uncond.get() + lane * n, expected_u.get() + lane * n, expected_x0.get() + lane * n});
    for (int64_t i = 0; i < (kLanes - 1) * n; ++i)
      CHECK(std::memcmp(&u_out[i], &expected_u[i], sizeof(T)) == 0 &&
            std::memcmp(&x0[i], &expected_x0[i], sizeof(T)) == 0);
    CHECK(std::memcmp(&u_out[n], &u[n], n * sizeof(T)) == 0, "guidance 1 is u, n = %ld", n);
    for (int64_t i = (kLanes - 1) * n; i < kLanes * n; ++i)
      CHECK(widen(u_out[i]) != widen(u_out[i]) && widen(x0[i]) != widen(x0[i]));
  }
}

// Lane 1 of three gets a mark, whichever element is not finite; lane 2 has one and keeps it.
template <class T, int kWidth>
void marks_of_broken_lanes(int64_t n) {
  const Exact<float> table = sum_of_x_and_u();
  const int64_t row[] = {0, 0, 0};
  for (const NotFinite<T>& value : not_finite<T>()) {
    for (int64_t place : {int64_t{0}, n / 2, n - 1}) {
      Exact<T> x(3 * n), u(3 * n), u_out(3 * n), x0(3 * n);
      Exact<bool> broken(3);
      fill(x, 9);
      x[n + place] = value.x;
      u[n + place] = value.u;
      broken[2] = true;
      PosteriorMean task{row,     table.get(), nullptr, 1,           3,        n,
                         x.get(), u.get(),     nullptr, u_out.get(), x0.get(), broken.get()};
      for (T* out : {u_out.get(), static_cast<T*>(nullptr)}) {
        task.u_out = out;
        for (int64_t lane = 0; lane < 3; ++lane)
          for_threads(ceil_div(n, kWidth),
                      [&](int64_t thread) { posterior_mean_thread<T, kWidth>(task, lane, thread); });
      }
      CHECK(u_out.same_bits(u));
      CHECK(!broken[0] && broken[1] == !value.stays_finite && broken[2], "%s at %ld of %ld", value.name, place, n);
      CHECK(std::isfinite(widen(x0[n + place])) == value.stays_finite, "%s", value.name);
    }
  }
}

template <class T>
void elementwise() {
  constexpr int kWide = kVector<T>;
  for (int64_t n : {1, 7, 123, 1023, 4097}) {
    step_and_noise<T, 1>(n);
    step_in_place_and_out_of_range<T, 1>(n);
    means<T, 1>(n);
    marks_of_broken_lanes<T, 1>(n);
  }
  for (int64_t n : {kWide, 7 * kWide, 256, 256 + kWide, 1024 - kWide, 4096}) {
    step_and_noise<T, kWide>(n);
    step_in_place_and_out_of_range<T, kWide>(n);
    means<T, kWide>(n);
    marks_of_broken_lanes<T, kWide>(n);
  }
}

template <int kBytes>
void row_copies(int64_t bytes) {
  const int64_t rows = 7, lanes = 4;
  Exact<char> x(rows * bytes), u(rows * bytes), x_lane(lanes * bytes), u_lane(lanes * bytes);
  Random random(bytes);
  for (Exact<char>* latent : {&x, &u, &x_lane, &u_lane})
    for (int64_t i = 0; i < latent->size(); ++i) (*latent)[i] = static_cast<char>(random.bits());
  const auto expected = [&](const Exact<char>& from, const int64_t* source, const Exact<char>& kept) {
    Exact<char> result(rows * bytes);
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(result.get() + row * bytes,
                  source[row] < 0 ? kept.get() + row * bytes : from.get() + source[row] * bytes, bytes);
    return result;
  };
  const auto run = [&](const auto& thread_of) {
    for (int64_t row = 2 * rows - 1; row >= 0; --row)
      for (int64_t block = copy_blocks(bytes, kBytes) - 1; block >= 0; --block)
        for (int64_t thread = kThreads - 1; thread >= 0; --thread) thread_of(row, block, thread);
  };

  const int64_t ancestors[] = {0, 0, 2, 5, 2, 5, 0}, broken[] = {0, 1, 2, 3, 9, -1, 7};
  const Exact<char> new_x = expected(x, ancestors, x), new_u = expected(u, ancestors, u);
  for (const int64_t* a : {ancestors, broken}) {
    const GatherAncestors task{a, rows, bytes, x.get(), u.get()};
    run([&](int64_t row, int64_t block, int64_t thread) { gather_ancestors_thread<kBytes>(task, row, block, thread); });
    CHECK(x.same_bits(new_x) && u.same_bits(new_u), "%ld bytes in accesses of %d", bytes, kBytes);
  }
}

// Rows that survive lie in memory that cannot be written.
void survivors_are_not_written() {
  const int64_t rows = 4, bytes = sysconf(_SC_PAGESIZE);
  const int64_t ancestors[] = {0, 0, 2, 0};
  auto* x = static_cast<char*>(
      mmap(nullptr, 2 * rows * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(x != MAP_FAILED);
  for (int64_t i = 0; i < 2 * rows * bytes; ++i) x[i] = static_cast<char>(i / bytes);
  for (int64_t row = 0; row < 2 * rows; ++row)
    if (ancestors[row % rows] == row % rows) mprotect(x + row * bytes, bytes, PROT_READ);
  const GatherAncestors task{ancestors, rows, bytes, x, x + rows * bytes};
  for (int64_t row = 0; row < 2 * rows; ++row)
    for (int64_t block = 0; block < copy_blocks(bytes, 16); ++block)
      for (int64_t thread = 0; thread < kThreads; ++thread) gather_ancestors_thread<16>(task, row, block, thread);
  CHECK(x[bytes] == 0 && x[4 * bytes - 1] == 0 && x[2 * bytes] == 2 && x[8 * bytes - 1] == rows);
  munmap(x, 2 * rows * bytes);
}

template <class scalar>
void slots(int64_t n) {
  SerialBlock block;
  Random random(n);
  const scalar inf = std::numeric_limits<scalar>::infinity();
  for (const scalar first : {scalar(0.5), -inf, inf, std::numeric_limits<scalar>::quiet_NaN()}) {
    Exact<scalar> logs(n), weights(n), expected(n);
    for (int64_t i = 0; i < n; ++i) logs[i] = i == 0 || first == -inf ? first : scalar(10 * random.normalish());
    scalar ess[1], log_normalizer[1], expected_ess, expected_log;
    const NormalizeLogWeights<scalar> task{logs.get(), 1, n, weights.get(), ess, log_normalizer};
    normalize_log_weights_block(block, task, 0);
    normalize_log_weights_slot(logs.get(), n, expected.get(), &expected_ess, &expected_log);
    CHECK(weights.same_bits(expected) && ess[0] == expected_ess && log_normalizer[0] == expected_log, "n = %ld", n);

    for (int64_t run = 0; run < 3 * kSchemes; ++run) {
      const int64_t scheme = run % kSchemes;
      const bool is_enabled = run / kSchemes != 1;
      if (run == 2 * kSchemes) weights[n / 2] = scalar(-1e-3);  // no weight, but the sum is hardly another
      const int64_t key = static_cast<int64_t>(random.bits()), row = 17;
      Exact<int64_t> ancestors(n), serial(n), counts(n), sums(n);
      Exact<uint32_t> words(n);
      resampling_words(key, row, n, words.get());
      for (int64_t i = 0; i < n; ++i) serial[i] = i;
      if (is_enabled && count_offspring(weights.get(), n, scheme, words.get(), sums.get(), counts.get()))
        ancestors_from_counts(counts.get(), n, serial.get());
      const Resample<scalar> draw{weights.get(), &key, &row, &is_enabled, scheme, 1, n, ancestors.get()};
      for (int64_t tile : {n / 2 + 1, n > 1000 ? int64_t{600} : int64_t{3}, n + 1}) {
        Exact<int64_t> tile_sums(tile), marks(tile);
        resample_block(block, draw, 0, {tile_sums.get(), tile}, marks.get());
        CHECK(ancestors.same_bits(serial), "scheme %ld, n = %ld, tiles of %ld", scheme, n, tile);
      }
    }
  }
}

}  // namespace

void test_cuda_threads() {
  index_arithmetic();
  words_beyond_32_bits_of_elements();
  roots_are_correctly_rounded();
  elementwise<float>();
  elementwise<BFloat16>();
  elementwise<Half>();
  for (int64_t bytes : {16, 112, 8192, 8208, 32784}) row_copies<16>(bytes);
  for (int64_t bytes : {4, 28, 492, 4092, 16388}) row_copies<4>(bytes);
  for (int64_t bytes : {2, 14, 246, 2046, 8194}) row_copies<2>(bytes);
  survivors_are_not_written();
  for (int64_t n : {1, 2, 7, 123, 1023, 4097}) {
    slots<float>(n);
    slots<double>(n);
  }
}

}  // namespace flowfast
