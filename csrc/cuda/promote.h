// One thread of flowfast::promote_: rows of winners are read and written, nothing else.
#pragma once

#include "cuda/copy_rows.h"

namespace flowfast {

struct Promote {
  const int64_t* source;
  int64_t rows, lanes, bytes;  // of a row
  const void *x_lane, *u_lane;
  void *x_store, *u_store;
};

// row: 0..rows-1 of x, then the same of u. A row whose source is out of range (on the CPU an error above) is kept.
template <int kBytes>
FF_HD inline void promote_thread(const Promote& task, int64_t row, int64_t block, int64_t thread) {
  const bool is_x = row < task.rows;
  const int64_t to = row % task.rows, from = task.source[to];
  if (from < 0 || from >= task.lanes) return;
  copy_row_thread<kBytes>(static_cast<const char*>(is_x ? task.x_lane : task.u_lane) + row_offset(from, task.bytes),
                          static_cast<char*>(is_x ? task.x_store : task.u_store) + row_offset(to, task.bytes),
                          task.bytes, block, thread);
}

}  // namespace flowfast
