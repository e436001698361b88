// Schemas of torch.ops.flowfast, and nothing else: each op registers its kernels in csrc/cpu/<op>.cpp.
// Every op writes into tensors that the caller owns and returns nothing.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flowfast, m) {
  m.def("normal_(Tensor(a!) out, Tensor key, Tensor row, Tensor candidate, Tensor chain, int purpose) -> ()");
  m.def("uniform_(Tensor(a!) out, Tensor key, Tensor row, Tensor candidate, Tensor chain, int purpose) -> ()");
  m.def(
      "branch_step(Tensor x, Tensor u, Tensor parent, Tensor row, Tensor key, Tensor candidate, Tensor chain, "
      "Tensor table, Tensor(a!) out, Tensor(b!)? x0_out=None, Tensor? grad=None) -> ()");
  m.def(
      "posterior_mean(Tensor x, Tensor u, Tensor? u_uncond, Tensor? guidance, Tensor row, Tensor table, "
      "Tensor(a!)? u_out, Tensor(b!) x0_out, Tensor(c!)? broken=None) -> ()");
  m.def(
      "normalize_log_weights(Tensor log_weights, Tensor(a!) weights, Tensor(b!) ess, Tensor(c!) log_normalizer) "
      "-> ()");
  m.def("resample(Tensor weights, Tensor key, Tensor row, Tensor enabled, int scheme, Tensor(a!) ancestors) -> ()");
  m.def("gather_ancestors_(Tensor(a!) x, Tensor(b!) u, Tensor ancestors) -> ()");
  // ints, floats and flags are the packed buffers of core/layout.h.
  m.def(
      "assign_lanes(Tensor(a!) ints, Tensor(b!) floats, Tensor(c!) flags, int slots, int chains, int lanes, "
      "int transitions, int widest, int top, int width) -> ()");
  m.def(
      "decide(Tensor rewards, float temperature, Tensor? bias, Tensor(a!) ints, Tensor(b!) floats, Tensor(c!) flags, "
      "Tensor x_lane, Tensor u_lane, Tensor x0_lane, Tensor(d!) x, Tensor(e!) u, Tensor(f!) top_x, "
      "Tensor(g!) top_x0, int slots, int lanes, int transitions, float margin, bool carry, int next_width) -> ()");
}
