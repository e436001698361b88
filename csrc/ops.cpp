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
  m.def("promote_(Tensor(a!) x_store, Tensor(b!) u_store, Tensor x_lane, Tensor u_lane, Tensor source) -> ()");
  m.def(
      "rollover(Tensor rewards, Tensor live, Tensor next_quota, bool carry, Tensor(a!) quota, Tensor(b!) threshold, "
      "Tensor(c!) best_child, Tensor(d!) winner, Tensor(e!) advance, Tensor(f!) used) -> ()");
  m.def(
      "assign_lanes(Tensor(a!) chain, Tensor alive, Tensor slot, Tensor slot_real, Tensor given, Tensor time, "
      "Tensor linear_time, Tensor(b!) lane, Tensor(c!) lane_real, Tensor(d!) lane_live, Tensor(e!) live, "
      "Tensor(f!) position, int width) -> ()");
  m.def(
      "decide(Tensor rewards, float temperature, Tensor? bias, Tensor(a!) chain, Tensor(b!) score, Tensor(c!) "
      "alive, Tensor(d!) slot, Tensor slot_real, Tensor given, Tensor quota_table, Tensor(e!) path_chain, "
      "Tensor(f!) path_candidate, Tensor(g!) top_reward, Tensor(h!) top_row, Tensor(i!) top_chain, Tensor(j!) "
      "top_candidate, Tensor accept, Tensor finished, Tensor time, Tensor linear_time, Tensor(k!) lane, Tensor(l!) "
      "lane_real, Tensor(m!) lane_live, Tensor(n!) live, Tensor(o!) position, Tensor(p!) broken, Tensor x_lane, "
      "Tensor u_lane, Tensor x0_lane, Tensor(q!) x, Tensor(r!) u, Tensor(s!) top_x, Tensor(t!) top_x0, "
      "Tensor(u!) dense, Tensor(v!) status, Tensor(w!) advance, Tensor(x!) store_source, Tensor(y!) top_source, "
      "Tensor(z!) ticket, float margin, bool carry, int passes, int next_width) -> ()");
}
