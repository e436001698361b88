// A block of threads that works together: what normalize_log_weights, resample, assign_lanes and decide are written in.
// Every method that is not static is called by all threads and ends at a barrier. csrc/tests has a serial one of the
// same interface, which visits the elements in a scrambled order.
#pragma once

#include <cstdint>

#include "cuda/layout.h"

namespace flowfast {

class Block {
 public:
  // scratch: kScratchBytes of shared memory.
  static constexpr int kScratchBytes = kBlockThreads * 16;
  __device__ explicit Block(void* scratch) : scratch_(scratch) {}

  // f(i) for all i < n, in any order.
  template <class F>
  __device__ void each(int64_t n, const F& f) {
    for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) f(i);
    __syncthreads();
  }

  __device__ void barrier() { __syncthreads(); }

  template <class F>
  __device__ void once(const F& f) {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

  // Combines f(i) of all i < n; combine is associative and commutative. All threads get the result.
  template <class T, class F, class Combine>
  __device__ T reduce(int64_t n, T identity, const F& f, const Combine& combine) {
    static_assert(sizeof(T) * kBlockThreads <= kScratchBytes);
    T* part = static_cast<T*>(scratch_);
    T mine = identity;
    for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) mine = combine(mine, f(i));
    part[threadIdx.x] = mine;
    __syncthreads();
    for (int half = kBlockThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) part[threadIdx.x] = combine(part[threadIdx.x], part[threadIdx.x + half]);
      __syncthreads();
    }
    const T result = part[0];
    __syncthreads();  // the next reduce writes part
    return result;
  }

  // data[i] <- combine(data[0], ..., data[i]); combine is associative. A thread takes a run of neighbours.
  template <class Combine>
  __device__ void scan(int64_t* data, int64_t n, const Combine& combine) {
    auto* part = static_cast<int64_t*>(scratch_);
    const int64_t run = ceil_div(n, kBlockThreads), begin = threadIdx.x * run, end = begin + run < n ? begin + run : n;
    for (int64_t i = begin + 1; i < end; ++i) data[i] = combine(data[i - 1], data[i]);
    if (begin < end) part[threadIdx.x] = data[end - 1];
    __syncthreads();
    const int runs = static_cast<int>(ceil_div(n, run));
    for (int distance = 1; distance < runs; distance *= 2) {
      int64_t sum = 0;
      const bool takes = threadIdx.x >= distance && threadIdx.x < runs;
      if (takes) sum = combine(part[threadIdx.x - distance], part[threadIdx.x]);
      __syncthreads();
      if (takes) part[threadIdx.x] = sum;
      __syncthreads();
    }
    if (threadIdx.x > 0)
      for (int64_t i = begin; i < end; ++i) data[i] = combine(part[threadIdx.x - 1], data[i]);
    __syncthreads();
  }

  // How many blocks of the grid took one before. What those did is visible to this one, and came before what it does.
  __device__ int64_t take_ticket(int64_t* ticket) {
    auto* mine = static_cast<int64_t*>(scratch_);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      *mine = static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(ticket), 1ull));
      __threadfence();
    }
    __syncthreads();
    const int64_t taken = *mine;
    __syncthreads();  // the next method writes scratch
    return taken;
  }

  __device__ static void add(int64_t& sum, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(value));
  }

 private:
  void* scratch_;
};

}  // namespace flowfast
