// The inner loops of noise, branch_step and posterior_mean, compiled once for each instruction set and chosen at run time.
// Each works on a range [begin, end) of one row; begin is a multiple of kBlock. All sets give the same bits.
#pragma once

#include <cstdint>

#include "core/philox.h"
#include "core/step.h"

namespace flowfast {

enum Storage { kFloat32 = 0, kBFloat16, kFloat16, kStorages };

struct NoiseTask {
  Address address;
  int64_t begin, end;
  void* out;  // start of the row
};

struct StepTask {
  Address address;
  int64_t begin, end;
  const float* row;  // kColumns coefficients
  const void *x, *u, *grad;  // starts of the rows; grad may be null
  void *out, *x0_out;  // x0_out may be null
};

struct MeanTask {
  int64_t begin, end;
  const float* row;
  float guidance;
  const void *x, *u, *u_uncond;  // u_uncond is not read when guidance is 1
  void *u_out, *x0_out;  // u_out may be null
};

struct Kernels {
  const char* name;
  void (*block_words)(const Address&, int64_t begin, uint32_t* words);  // kBlock of them
  void (*words_to_normals)(const uint32_t* words, float* z);  // kBlock of them
  void (*uniform)(const NoiseTask&);
  void (*normal[kStorages])(const NoiseTask&);
  void (*branch_step[kStorages])(const StepTask&);
  bool (*posterior_mean[kStorages])(const MeanTask&);  // is x0_out finite there
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best set that this processor runs.
const Kernels& kernels();

}  // namespace flowfast
