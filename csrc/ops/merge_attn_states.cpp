// merge_attn_states.cpp: combines two partial attention results of the same queries over different
// keys by their log-sum-exp.
#include "kernels/driver.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

// lse float32 [B, H, Sq]
void check_lse(const Tensor& lse, const char* name, const MergeParams& p, int64_t (&stride)[3]) {
  check_tensor(lse, name);
  check_dtype(lse, name, at::kFloat);
  check_shape(lse, name, {p.batch, p.heads, p.q_len}, "[B, H, Sq]");
  for (int d = 0; d < 3; ++d) stride[d] = lse.stride(d);
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a,
                                             const Tensor& out_b, const Tensor& lse_b,
                                             const OptionalTensor& attn_sink) {
  check_environment();
  MergeParams p = {};
  check_tensor(out_a, "out_a");
  p.type = float_type(out_a.scalar_type(), "out_a");
  check_rank(out_a, "out_a", 4, "[B, Sq, H, width]");
  check_rows_contiguous(out_a, "out_a");
  check_tensor(out_b, "out_b");
  check_same_dtype(out_b, "out_b", out_a, "out_a");
  check_shape(out_b, "out_b", out_a.sizes(), "the shape of out_a");
  check_rows_contiguous(out_b, "out_b");
  p.batch = check_int32(out_a.size(0), "out_a.size(0)");
  p.q_len = check_int32(out_a.size(1), "out_a.size(1)");
  p.heads = check_int32(out_a.size(2), "out_a.size(2)");
  p.width = check_int32(out_a.size(3), "out_a.size(3)");
  check_lse(lse_a, "lse_a", p, p.lse_a_stride);
  check_lse(lse_b, "lse_b", p, p.lse_b_stride);
  Tensor sink;
  if (attn_sink.has_value()) {
    check_tensor(*attn_sink, "attn_sink");
    check_dtype(*attn_sink, "attn_sink", at::kFloat);
    check_shape(*attn_sink, "attn_sink", {p.heads}, "[H]");
    sink = attn_sink->contiguous();
    p.attn_sink = sink.const_data_ptr<float>();
  }
  const Tensor out = uninitialised(out_a.sizes(), out_a.scalar_type());
  const Tensor lse = uninitialised({p.batch, p.heads, p.q_len}, at::kFloat);
  if (lse.numel() == 0) return {out, lse};
  p.out_a = query_rows(out_a);
  p.out_b = query_rows(out_b);
  p.out = query_rows(out);
  p.lse_a = lse_a.const_data_ptr<float>();
  p.lse_b = lse_b.const_data_ptr<float>();
  p.lse = lse.mutable_data_ptr<float>();
  for (int d = 0; d < 3; ++d) p.lse_stride[d] = lse.stride(d);
  merge_states(p, torch_executor());
  return {out, lse};
}

}  // namespace flashmla
