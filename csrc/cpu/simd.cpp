#include "cpu/simd.h"

#include <atomic>
#include <cstring>

namespace flowfast {
namespace {

bool runs(const Kernels& set) {
#if defined(__x86_64__)
  if (&set == &kAvx2Kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&set == &kAvx512Kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &set == &kScalarKernels;
}

// Best first.
const Kernels* const kSets[] = {
#if defined(__x86_64__)
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kScalarKernels,
};

const Kernels* best() {
  for (const Kernels* set : kSets)
    if (runs(*set)) return set;
  return &kScalarKernels;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> set{best()};
  return set;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace flowfast

// For tests and benchmarks: the name of the instruction set in use, and a switch; false if this processor lacks it.
extern "C" const char* flowfast_instruction_set() { return flowfast::kernels().name; }

extern "C" bool flowfast_use_instruction_set(const char* name) {
  for (const flowfast::Kernels* set : flowfast::kSets) {
    if (std::strcmp(set->name, name) != 0 || !flowfast::runs(*set)) continue;
    flowfast::chosen().store(set);
    return true;
  }
  return false;
}

// For tests: one block of the stream, so that the ends of the 32-bit counter and extreme words can be reached.
extern "C" void flowfast_block_words(const flowfast::Address* address, int64_t block, uint32_t* words) {
  flowfast::kernels().block_words(*address, block * flowfast::kBlock, words);
}

extern "C" void flowfast_words_to_normals(const uint32_t* words, float* z) {
  flowfast::kernels().words_to_normals(words, z);
}
