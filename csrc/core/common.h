// FF_HD marks the functions that run on the host and on the device. Compile without contraction
// (gcc -ffp-contract=off, nvcc -fmad=false): a fused multiply-add happens only where std::fma is written.
#pragma once

#if defined(__CUDACC__)
#define FF_HD __host__ __device__
#else
#define FF_HD
#endif
