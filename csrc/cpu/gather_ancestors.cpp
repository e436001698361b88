// flowfast::gather_ancestors_ on the CPU: dead rows are overwritten, survivors only read, so there is no second buffer.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/checks.h"
#include "cpu/copy_rows.h"

namespace flowfast {
namespace {

void gather_ancestors_(Tensor x, Tensor u, const Tensor& ancestors) {
  constexpr const char* op = "gather_ancestors_";
  check_latents(op, "x", x);
  const int64_t rows = x.size(0), n = x.size(1);
  check_operand(op, "u", u, x.scalar_type(), {rows, n});
  check_operand(op, "ancestors", ancestors, ScalarType::Long, {rows});

  const int64_t* a = ancestors.const_data_ptr<int64_t>();
  const int64_t bytes = n * static_cast<int64_t>(x.element_size());
  std::vector<RowCopy> copies;
  for (Tensor* latent : {&x, &u}) {
    char* data = static_cast<char*>(latent->mutable_data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
      if (a[i] < 0 || a[i] >= rows)
        fail(op, ": ancestors must be in 0..", rows - 1, ", got ancestors[", i, "] = ", a[i]);
      if (a[a[i]] != a[i])
        fail(op, ": an ancestor must keep its own row, got ancestors[", i, "] = ", a[i], " but ancestors[", a[i],
             "] = ", a[a[i]], "; permute them as resample does");
      if (a[i] != i) copies.push_back({data + a[i] * bytes, data + i * bytes});
    }
  }
  copy_rows(copies, bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowfast, CPU, m) { m.impl("gather_ancestors_", TORCH_BOX(&gather_ancestors_)); }

}  // namespace flowfast
