// merge_attn_states.cpp: combines two partial attention results of the same queries over different
// keys by their log-sum-exp.
#include "kernels/call/driver.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

// [B, H, Sq], or ragged [H, T]
void lse_strides(const Tensor& lse, int64_t (&stride)[3]) {
  stride[0] = lse.dim() == 3 ? lse.stride(0) : 0;
  stride[1] = lse.stride(-2);
  stride[2] = lse.stride(-1);
}

void check_lse(const Tensor& lse, const char* name, at::IntArrayRef shape, int64_t (&stride)[3]) {
  check_tensor(lse, name);
  check_dtype(lse, name, at::kFloat);
  check_shape(lse, name, shape, shape.size() == 3 ? "[B, H, Sq]" : "[H, T]");
  lse_strides(lse, stride);
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a,
                                             const Tensor& out_b, const Tensor& lse_b,
                                             const OptionalTensor& attn_sink) {
  check_environment();
  MergeParams p = {};
  check_tensor(out_a, "out_a");
  p.type = p.out_type = float_type(out_a.scalar_type(), "out_a");
  const bool ragged = out_a.dim() == 3;
  if (!ragged) check_rank(out_a, "out_a", 4, "[B, Sq, H, width] or ragged [T, H, width]");
  check_rows_contiguous(out_a, "out_a");
  check_tensor(out_b, "out_b");
  check_same_dtype(out_b, "out_b", out_a, "out_a");
  check_shape(out_b, "out_b", out_a.sizes(), "the shape of out_a");
  check_rows_contiguous(out_b, "out_b");
  p.batch = ragged ? 1 : check_int32(out_a.size(0), "out_a.size(0)");
  p.q_len = check_int32(out_a.size(-3), "out_a.size(-3), query tokens");
  p.heads = check_int32(out_a.size(-2), "out_a.size(-2), heads");
  p.width = check_int32(out_a.size(-1), "out_a.size(-1), width");
  std::vector<int64_t> lse_shape = {p.batch, p.heads, p.q_len};
  if (ragged) lse_shape.erase(lse_shape.begin());
  check_lse(lse_a, "lse_a", lse_shape, p.lse_a_stride);
  check_lse(lse_b, "lse_b", lse_shape, p.lse_b_stride);
  Tensor sink;
  if (attn_sink.has_value()) {
    check_tensor(*attn_sink, "attn_sink", kAnyAddress);
    check_dtype(*attn_sink, "attn_sink", at::kFloat);
    check_shape(*attn_sink, "attn_sink", {p.heads}, "[H]");
    sink = aligned(attn_sink->contiguous());
    p.attn_sink = sink.const_data_ptr<float>();
  }
  const Tensor out = uninitialised(out_a.sizes(), out_a.scalar_type(), "out");
  const Tensor lse = uninitialised(lse_shape, at::kFloat, "lse");
  if (lse.numel() == 0) return {out, lse};
  p.out_a = query_rows(out_a);
  p.out_b = query_rows(out_b);
  p.out = query_rows(out);
  p.lse_a = lse_a.const_data_ptr<float>();
  p.lse_b = lse_b.const_data_ptr<float>();
  p.lse = lse.mutable_data_ptr<float>();
  lse_strides(lse, p.lse_stride);
  merge_states(p, torch_executor());
  return {out, lse};
}

}  // namespace flashmla
