// What the CUDA launchers share: device guard, current stream, grid, choice of the kernel, operand columns.
//
// A launcher checks shapes, not values: looking at a value would make the host wait. What a kernel does with a value
// that the CPU would refuse stands in its header.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>

#include "cpu/checks.h"
#include "cuda/noise.h"

namespace flowfast {

// Makes the operands' device the current one while it lives, and names the stream that torch queues work on.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) : guard_(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The device of the first operand; all others must be there too.
inline int32_t device_of(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(op, ": ", name, " must be on a CUDA device like the other operands; move it there");
  return tensor.get_device_index();
}

// Blocks of one row go along x; rows along y, and z where y ends.
constexpr int64_t kMaxGridY = 65535;

inline dim3 grid_of(int64_t blocks, int64_t rows) {
  const int64_t y = std::min(rows, kMaxGridY);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(y), static_cast<unsigned>(ceil_div(rows, y)));
}

#if defined(__CUDACC__)
__device__ inline int64_t row_of_grid() { return int64_t{blockIdx.z} * gridDim.y + blockIdx.y; }
__device__ inline int64_t thread_of_grid() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
#endif

// True where every row of the latents starts at a multiple of 16 bytes: 128-bit accesses then cover it without a rest.
inline bool rows_take_vectors(int64_t n, int64_t element_size, std::initializer_list<const void*> latents) {
  bool aligned = n * element_size % 16 == 0;
  for (const void* data : latents) aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return aligned;
}

// Calls f.operator()<T, kWidth>() for the storage type and for 128-bit accesses or single elements.
template <class F>
void with_storage(ScalarType dtype, bool vectors, const F& f) {
  const auto with_width = [&]<class T>() {
    if (vectors)
      f.template operator()<T, kVector<T>>();
    else
      f.template operator()<T, 1>();
  };
  if (dtype == ScalarType::Float)
    with_width.template operator()<float>();
  else if (dtype == ScalarType::BFloat16)
    with_width.template operator()<BFloat16>();
  else
    with_width.template operator()<Half>();
}

template <class T>
const T* column(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t size,
                int32_t device) {
  check_operand(op, name, tensor, dtype, {size}, device);
  return tensor.const_data_ptr<T>();
}

inline AddressColumns address_columns(const char* op, const Tensor& key, const Tensor& row, const Tensor& candidate,
                                      const Tensor& chain, int64_t lanes, int32_t device) {
  return {column<int64_t>(op, "key", key, ScalarType::Long, lanes, device),
          column<int64_t>(op, "row", row, ScalarType::Long, lanes, device),
          column<int64_t>(op, "candidate", candidate, ScalarType::Long, lanes, device),
          column<int64_t>(op, "chain", chain, ScalarType::Long, lanes, device)};
}

inline void check_row_has_counters(const char* op, int64_t n) {
  if (n > kMaxElements) fail(op, ": a row may have at most 2^34 elements (the noise counter has 32 bits), got ", n);
}

// The schedule's table, (rows, kColumns) float32; returns the rows.
inline int64_t check_table(const char* op, const Tensor& table, int32_t device) {
  check_dense(op, "table", table, device);
  const int64_t rows = table.dim() == 2 ? table.size(0) : 0;
  check_operand(op, "table", table, ScalarType::Float, {rows, kColumns}, device);
  return rows;
}

}  // namespace flowfast
