// The launch of gather_ancestors_ and promote_: two latents (x and u) of `rows` rows, one kernel.
#pragma once

#include "cuda/copy_rows.h"
#include "cuda/launch.h"

namespace flowfast {

// Calls f.operator()<kBytes>(grid) with accesses of 128 bits where the rows allow, of one element otherwise.
template <class F>
void with_access(int64_t n, int64_t element_size, int64_t rows, std::initializer_list<const void*> latents,
                 const F& f) {
  const int64_t bytes = n * element_size;
  if (rows_take_vectors(n, element_size, latents))
    f.template operator()<16>(grid_of(copy_blocks(bytes, 16), 2 * rows));
  else if (element_size == 4)
    f.template operator()<4>(grid_of(copy_blocks(bytes, 4), 2 * rows));
  else
    f.template operator()<2>(grid_of(copy_blocks(bytes, 2), 2 * rows));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace flowfast
