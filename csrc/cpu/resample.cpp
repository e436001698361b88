// flowfast::resample on the CPU: core/resample.h for each slot, slots spread over threads.
#include "core/resample.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/log_weights.h"
#include "cpu/rows.h"

namespace flowfast {
namespace {

template <typename scalar>
void resample_slots(const Tensor& weights, const Tensor& key, const Tensor& row, const Tensor& enabled, int64_t scheme,
                    Tensor& ancestors) {
  const int64_t slots = weights.size(0), n = weights.size(1);
  const auto* w = static_cast<const scalar*>(weights.const_data_ptr());
  const int64_t* keys = key.const_data_ptr<int64_t>();
  const int64_t* rows = row.const_data_ptr<int64_t>();
  const bool* is_enabled = enabled.const_data_ptr<bool>();
  int64_t* a = ancestors.mutable_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, 8192 / n);  // some 200 microseconds are worth a thread
  torch::stable::parallel_for(0, slots, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> cumulative(n), counts(n);
    std::vector<uint32_t> words(n);
    for (int64_t s = begin; s < end; ++s) {
      int64_t* out = a + s * n;
      if (is_enabled[s]) resampling_words(keys[s], rows[s], scheme == kSystematic ? 1 : n, words.data());
      if (is_enabled[s] && count_offspring(w + s * n, n, scheme, words.data(), cumulative.data(), counts.data()))
        ancestors_from_counts(counts.data(), n, out);
      else
        std::iota(out, out + n, int64_t{0});
    }
  });
}

void resample(const Tensor& weights, const Tensor& key, const Tensor& row, const Tensor& enabled, int64_t scheme,
              Tensor ancestors) {
  constexpr const char* op = "resample";
  check_dense(op, "weights", weights);
  const ScalarType dtype = weights.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail(op, ": weights must be float32 or float64, got ", torch::headeronly::toString(dtype));
  if (weights.dim() != 2 || weights.size(1) < 1 || weights.size(1) > kMaxParticles)
    fail(op, ": weights must have shape (slots, particles) with 1..", kMaxParticles, " particles, got ",
         shape_text(weights));
  if (scheme < 0 || scheme >= kSchemes)
    fail(op, ": scheme must be one of 0 multinomial, 1 stratified, 2 systematic, 3 residual, 4 ssp, got ", scheme);
  const int64_t slots = weights.size(0);
  check_operand(op, "key", key, ScalarType::Long, {slots});
  check_operand(op, "row", row, ScalarType::Long, {slots});
  check_operand(op, "enabled", enabled, ScalarType::Bool, {slots});
  check_operand(op, "ancestors", ancestors, ScalarType::Long, {slots, weights.size(1)});
  for (int64_t s = 0; s < slots; ++s)
    if (enabled.const_data_ptr<bool>()[s])
      Addresses::check_word(op, "row", row.const_data_ptr<int64_t>()[s], kRowLimit, "2^28");
  if (dtype == ScalarType::Float)
    resample_slots<float>(weights, key, row, enabled, scheme, ancestors);
  else
    resample_slots<double>(weights, key, row, enabled, scheme, ancestors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("resample", TORCH_BOX(&resample)); }

}  // namespace flowfast
