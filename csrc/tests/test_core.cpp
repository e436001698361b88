// csrc/core against known answers. The golden values are those of the PyTorch reference (flowfast/ops).
#include <cmath>
#include <limits>

#include "core/log_weights.h"
#include "core/philox.h"
#include "core/resample.h"
#include "core/round.h"
#include "core/step.h"
#include "cpu/simd.h"
#include "tests/check.h"

namespace flowfast {
namespace {

void philox_known_answers() {
  struct Answer {
    uint32_t counter[4], key[2], words[4];
  };
  // Random123, kat_vectors: philox4x32 10.
  const Answer answers[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Answer& answer : answers) {
    const Address address{answer.key[0], answer.key[1], answer.counter[1], answer.counter[2], answer.counter[3]};
    const FourWords four = philox(address, answer.counter[0]);
    for (int w = 0; w < 4; ++w) CHECK(four.word[w] == answer.words[w], "word %d is %08x", w, four.word[w]);
  }
}

uint64_t fnv(const float* values, int64_t n) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < n; ++i) hash = (hash ^ detail::bits_of(values[i])) * 0x100000001b3u;
  return hash;
}

// key 0x0123456789abcdef, row 5, candidate 7, chain 9, purpose 1: flowfast.ops.noise.normals, 4097 elements.
void normals_are_the_reference() {
  const Address address{0x89abcdef, 0x01234567, 7, row_word(5, kTransition), 9};
  Exact<float> z(4097), u(4097);
  kScalarKernels.normal[kFloat32]({address, 0, z.size(), z.get()});
  kScalarKernels.uniform({address, 0, u.size(), u.get()});
  const struct {
    int element;
    uint32_t bits;
  } golden[] = {{0, 0x3f1b1684},   {63, 0x3f935e6b},  {64, 0x3fdc9b20},
                {200, 0x3ff87ad1}, {256, 0xc02ce319}, {4096, 0xbf51e2ba}};
  for (const auto& [element, bits] : golden)
    CHECK(detail::bits_of(z[element]) == bits, "element %d is %a", element, z[element]);
  CHECK(fnv(z.get(), z.size()) == 0xb1c23b808b86559cu);
  CHECK(fnv(u.get(), u.size()) == 0x7f6c8e650d499e71u);
}

void normals_of_extreme_words() {
  for (uint32_t a : {0u, 1u, 0xffu, 0x100u, 0x7fffffffu, 0x80000000u, 0xfffffeffu, 0xffffff00u, 0xffffffffu})
    for (uint32_t b : {0u, 1u, 0x3fffffffu, 0x40000000u, 0x7fffffffu, 0x80000000u, 0xc0000000u, 0xffffffffu}) {
      float first, second;
      box_muller<ScalarLanes>(a, b, first, second);
      const double u = ((a >> 8) + 1.0) * 0x1p-24, r = std::sqrt(-2.0 * std::log(u)), turn = 2 * M_PI * b * 0x1p-32;
      CHECK(std::fabs(first - r * std::cos(turn)) < 2e-6, "words %08x %08x give %a", a, b, first);
      CHECK(std::fabs(second - r * std::sin(turn)) < 2e-6, "words %08x %08x give %a", a, b, second);
    }
}

void sixteen_bit_numbers() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    const Half half{static_cast<uint16_t>(bits)};
    BFloat16 brain_again;
    Half half_again;
    narrow(widen(brain), brain_again);
    narrow(widen(half), half_again);
    if (widen(brain) == widen(brain)) CHECK(brain_again.bits == bits, "bfloat16 %04x", bits);
    if (widen(half) == widen(half)) CHECK(half_again.bits == bits, "float16 %04x", bits);
  }
}

template <class T>
void storage_overflows_at_first_infinite() {
  for (uint32_t sign : {0u, 0x80000000u})
    for (uint32_t past : {0u, 1u}) {
      T value;
      narrow(detail::float_of(sign | (first_infinite(T{}) - 1 + past)), value);
      CHECK(std::isfinite(widen(value)) == (past == 0), "%zu bytes, sign %08x, past %u", sizeof(T), sign, past);
    }
}

void log_weights() {
  // flowfast.ops.normalize_log_weights of linspace(-3, 2, 7), float32.
  const uint32_t golden[] = {0x3b7a66fd, 0x3c100adb, 0x3ca5b814, 0x3d3ea865, 0x3ddb5978, 0x3e7c5be4, 0x3f112aff};
  const float linspace[] = {-3.0f, -2.1666667f, -1.3333333f, -0.5f, 0.33333337f, 1.1666667f, 2.0f};
  Exact<float> logs(7), weights(7);
  float ess, log_normalizer;
  std::memcpy(logs.get(), linspace, sizeof(linspace));
  normalize_log_weights_slot(logs.get(), 7, weights.get(), &ess, &log_normalizer);
  for (int i = 0; i < 7; ++i) CHECK(std::fabs(weights[i] - detail::float_of(golden[i])) < 1e-7, "weight %d", i);
  CHECK(std::fabs(ess - detail::float_of(0x4021707e)) < 1e-5);
  CHECK(std::fabs(log_normalizer - detail::float_of(0x3f1f127e)) < 1e-6);

  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (double value : {-inf, nan}) {
    Exact<double> empty(5), result(5);
    for (int i = 0; i < 5; ++i) empty[i] = value;
    double none, least;
    normalize_log_weights_slot(empty.get(), 5, result.get(), &none, &least);
    CHECK(none == 0 && least == -inf && result[4] != result[4]);
  }
  Exact<double> spread(4), shares(4);
  spread[0] = 1e4, spread[1] = -1e4, spread[2] = nan, spread[3] = 1e4;
  double size, normalizer;
  normalize_log_weights_slot(spread.get(), 4, shares.get(), &size, &normalizer);
  CHECK(shares[0] == 0.5 && shares[1] == 0 && shares[2] == 0 && size == 2);
  for (double x : {-1e-300, -0.5, -1.0, -37.25, -700.0, -707.9})
    CHECK(std::fabs(exp_nonpositive(x) / std::exp(x) - 1) < 1e-15, "exp(%g)", x);
  for (double x : {0x1p-1022, 1e-3, 1.0, 1.5, 3.0, 1e300})
    CHECK(std::fabs(log_positive(x) - std::log(x)) < 2e-15 * (1 + std::fabs(std::log(x))), "log(%g)", x);
}

void resampling_bounds() {
  Random random(3);
  for (int64_t n : {1, 2, 7, 123, 1023, 4097}) {
    for (int64_t scheme = 0; scheme < kSchemes; ++scheme) {
      Exact<double> weights(n);
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += weights[i] = i % 3 == 1 ? 0.0 : random.unit() + 1e-3;
      for (int64_t i = 0; i < n; ++i) weights[i] /= sum;
      Exact<uint32_t> words(n);
      Exact<int64_t> cumulative(n), counts(n), ancestors(n);
      resampling_words(static_cast<int64_t>(random.bits()), n, n, words.get());
      CHECK(count_offspring(weights.get(), n, scheme, words.get(), cumulative.get(), counts.get()));
      int64_t children = 0;
      for (int64_t i = 0; i < n; ++i) {
        children += counts[i];
        const double share = static_cast<double>(n) * weights[i];
        CHECK(weights[i] > 0 || counts[i] == 0, "scheme %ld gives particle %ld of weight 0 children", scheme, i);
        if (scheme == kSystematic || scheme == kSsp)
          CHECK(counts[i] >= std::floor(share - 1e-6) && counts[i] <= std::ceil(share + 1e-6), "scheme %ld", scheme);
        if (scheme == kResidual) CHECK(counts[i] >= std::floor(share - 1e-6));
      }
      CHECK(children == n, "scheme %ld makes %ld of %ld", scheme, children, n);
      ancestors_from_counts(counts.get(), n, ancestors.get());
      Exact<int64_t> found(n);
      for (int64_t i = 0; i < n; ++i) {
        CHECK(ancestors[i] >= 0 && ancestors[i] < n && (counts[i] == 0) == (ancestors[i] != i));
        ++found[ancestors[i]];
      }
      CHECK(found.same_bits(counts));
    }
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (double wrong : {nan, -0.1, 3.0}) {
    Exact<double> weights(3);
    weights[0] = wrong, weights[1] = 0.5, weights[2] = 0.5;
    Exact<uint32_t> words(3);
    Exact<int64_t> cumulative(3), counts(3);
    CHECK(!count_offspring(weights.get(), 3, kMultinomial, words.get(), cumulative.get(), counts.get()));
  }
  CHECK(scale_by_word(0xffffffffu, int64_t{1} << 61) == 2305843008676823040);
}

void rollover_rounds() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const struct {
    float rewards[3];
    bool live[3];
    int64_t quota;
    float best_child;
    Verdict after;
  } rounds[] = {
      {{1, 3, 5}, {true, true, true}, 5, -inf, {1, kAccepted, 2, 3 + 4, -inf}},
      {{1, 0, 5}, {true, true, false}, 5, -inf, {0, kStay, 2, 3, 1}},
      {{1, 0, 9}, {true, true, true}, 2, -inf, {0, kSpent, 2, 0 + 4, -inf}},
      {{nan, nan, nan}, {true, true, true}, 3, -inf, {-1, kDead, 3, 0, -inf}},
      {{2, 2, 0}, {true, true, true}, 5, -inf, {0, kStay, 3, 2, 2}},  // ties lose
      {{9, 9, 9}, {true, true, true}, 0, 1, {-1, kStay, 0, 0, 1}},
  };
  for (const auto& round : rounds) {
    const Verdict found = choose(round.rewards, round.live, 3, 4, true, 2.0f, round.quota, round.best_child);
    CHECK(found.winner == round.after.winner && found.advance == round.after.advance &&
          found.used == round.after.used && found.quota == round.after.quota &&
          found.best_child == round.after.best_child);
  }
}

}  // namespace

void test_core() {
  philox_known_answers();
  normals_are_the_reference();
  normals_of_extreme_words();
  sixteen_bit_numbers();
  storage_overflows_at_first_infinite<float>();
  storage_overflows_at_first_infinite<BFloat16>();
  storage_overflows_at_first_infinite<Half>();
  log_weights();
  resampling_bounds();
  rollover_rounds();
}

}  // namespace flowfast
