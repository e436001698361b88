// The choice of access for kernels that copy rows: gather_ancestors_ and decide.
#pragma once

#include "cuda/copy_rows.h"
#include "cuda/launch.h"

namespace flowfast {

// Calls f.operator()<kBytes>() for accesses of 128 bits where the rows allow, of one element otherwise.
template <class F>
void with_access(int64_t n, int64_t element_size, std::initializer_list<const void*> latents, const F& f) {
  if (rows_take_vectors(n, element_size, latents))
    f.template operator()<16>();
  else if (element_size == 4)
    f.template operator()<4>();
  else
    f.template operator()<2>();
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace flowfast
