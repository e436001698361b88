// Operand checks shared by the CPU and the CUDA kernels. A failed check throws std::runtime_error, a RuntimeError in
// Python; the text says what was expected and what came. flowfast/ops/checks.py holds the same checks for the Python
// kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flowfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

constexpr int32_t kOnCpu = -1;  // otherwise the index of a CUDA device

// A contiguous tensor on the device of the kernel; every operand must pass.
inline void check_dense(const char* op, const char* name, const Tensor& tensor, int32_t device = kOnCpu) {
  if (device == kOnCpu && !tensor.is_cpu())
    fail(op, ": ", name, " must be on the CPU like the other operands; move it there");
  if (device != kOnCpu && !(tensor.is_cuda() && tensor.get_device_index() == device))
    fail(op, ": ", name, " must be on cuda:", device, " like the other operands; move it there");
  if (!tensor.is_contiguous()) fail(op, ": ", name, " must be contiguous; pass ", name, ".contiguous()");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype)
    fail(op, ": ", name, " must have dtype ", torch::headeronly::toString(dtype), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && tensor.size(d++) == size;
  if (same) return;
  std::ostringstream text;
  for (int64_t size : shape) text << (text.tellp() > 0 ? ", " : "") << size;
  fail(op, ": ", name, " must have shape (", text.str(), shape.size() == 1 ? ",)" : ")", ", got ", shape_text(tensor));
}

// Device, layout, dtype and shape in one call.
inline void check_operand(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                          std::initializer_list<int64_t> shape, int32_t device = kOnCpu) {
  check_dense(op, name, tensor, device);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, shape);
}

// The latent matrix that fixes the shape: rows x elements, one of the storage types.
inline void check_latents(const char* op, const char* name, const Tensor& tensor, int32_t device = kOnCpu) {
  check_dense(op, name, tensor, device);
  if (tensor.dim() != 2) fail(op, ": ", name, " must have shape (rows, elements), got ", shape_text(tensor));
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail(op, ": ", name, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
}

}  // namespace flowfast
