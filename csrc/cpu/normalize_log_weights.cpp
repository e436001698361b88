// flowfast::normalize_log_weights on the CPU: core/log_weights.h for each slot, slots spread over threads.
#include "core/log_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/checks.h"

namespace flowfast {
namespace {

template <typename scalar>
void normalize_slots(const Tensor& log_weights, Tensor& weights, Tensor& ess, Tensor& log_normalizer) {
  const int64_t slots = log_weights.size(0), n = log_weights.size(1);
  const auto* from = static_cast<const scalar*>(log_weights.const_data_ptr());
  auto* to = static_cast<scalar*>(weights.mutable_data_ptr());
  auto* sizes = static_cast<scalar*>(ess.mutable_data_ptr());
  auto* normalizers = static_cast<scalar*>(log_normalizer.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 8192 / n);  // some 200 microseconds are worth a thread
  torch::stable::parallel_for(0, slots, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      normalize_log_weights_slot(from + s * n, n, to + s * n, sizes + s, normalizers + s);
  });
}

void normalize_log_weights(const Tensor& log_weights, Tensor weights, Tensor ess, Tensor log_normalizer) {
  constexpr const char* op = "normalize_log_weights";
  check_dense(op, "log_weights", log_weights);
  const ScalarType dtype = log_weights.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail(op, ": log_weights must be float32 or float64, got ", torch::headeronly::toString(dtype));
  if (log_weights.dim() != 2 || log_weights.size(1) < 1 || log_weights.size(1) > kMaxParticles)
    fail(op, ": log_weights must have shape (slots, particles) with 1..", kMaxParticles, " particles, got ",
         shape_text(log_weights));
  const int64_t slots = log_weights.size(0);
  check_operand(op, "weights", weights, dtype, {slots, log_weights.size(1)});
  check_operand(op, "ess", ess, dtype, {slots});
  check_operand(op, "log_normalizer", log_normalizer, dtype, {slots});
  if (dtype == ScalarType::Float)
    normalize_slots<float>(log_weights, weights, ess, log_normalizer);
  else
    normalize_slots<double>(log_weights, weights, ess, log_normalizer);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("normalize_log_weights", TORCH_BOX(&normalize_log_weights)); }

}  // namespace flowfast
