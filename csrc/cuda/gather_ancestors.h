// One thread of flowfast::gather_ancestors_. Dead rows are written, survivors are only read: no second buffer.
#pragma once

#include "cuda/copy_rows.h"

namespace flowfast {

struct GatherAncestors {
  const int64_t* ancestors;
  int64_t rows, bytes;  // of a row
  void *x, *u;
};

// row: 0..rows-1 of x, then the same of u. A row whose ancestor is out of range, or does not keep its own row (on the
// CPU an error), stays as it is.
template <int kBytes>
FF_HD inline void gather_ancestors_thread(const GatherAncestors& task, int64_t row, int64_t block, int64_t thread) {
  auto* latent = static_cast<char*>(row < task.rows ? task.x : task.u);
  const int64_t to = row % task.rows, from = task.ancestors[to];
  if (from == to || from < 0 || from >= task.rows || task.ancestors[from] != from) return;
  copy_row_thread<kBytes>(latent + row_offset(from, task.bytes), latent + row_offset(to, task.bytes), task.bytes, block,
                          thread);
}

}  // namespace flowfast
