// absorbed.cpp: the absorbed form (forms.h). The products are ATen's (oneDNN).
#include <ATen/ops/bmm.h>

#include "kernels/call/visible.h"
#include "ops/checks.h"
#include "ops/forms.h"

namespace flashmla {
namespace {

// [.., H, width] -> [H, tokens, width]
Tensor by_head(const Tensor& t) {
  return t.movedim(-2, 0).reshape({t.size(-2), t.numel() / (t.size(-2) * t.size(-1)), t.size(-1)});
}

// out_latent [H, tokens, L] @ W_UV^T -> [H, tokens, V]
Tensor project(const Tensor& out_latent, const Tensor& uv) {
  // f32: the weight from the left, where it lies. ATen would copy its transpose, element by
  // element.
  if (uv.scalar_type() == at::kFloat) return at::bmm(uv, out_latent.transpose(1, 2)).mT();
  // bf16: oneDNN wants dense matrices, transposed or not, so one of the two is copied; a plain copy
  // of the weight is quick (decoding one token, 16 heads: 220 us with it, 320 from the left).
  return at::bmm(out_latent, uv.contiguous().transpose(1, 2));
}

// Rows of t [H, tokens, width] under the numbers that tokens have in the call.
QueryRows rows_by_head(const Tensor& t, const AttentionParams& p) {
  const int64_t token = t.size(2) * item_bytes(t), head = t.size(1) * token;
  std::byte* data = const_cast<std::byte*>(bytes(t));
  if (p.cu_seqlens_q) return {data - p.cu_seqlens_q[0] * token, {0, token, head}};
  return {data, {p.q_len * token, token, head}};
}

QueryRows rows_of_run(const Tensor& t, const AttentionParams& p) {
  QueryRows rows = query_rows(t);
  if (p.cu_seqlens_q) rows.data -= p.cu_seqlens_q[0] * rows.stride[1];
  return rows;
}

}  // namespace

Tensor attend_absorbed(AttentionParams p, const Tensor& q_main, const Tensor& q_rope,
                       const Projections& w) {
  const at::ScalarType type = q_main.scalar_type();
  // ATen's fp16 products are slow on CPUs without fp16 arithmetic, and a latent query rounded to
  // fp16 may overflow.
  const at::ScalarType working = type == at::kHalf ? at::kFloat : type;
  const Tensor q_latent = at::bmm(by_head(q_main).to(working), w.uk.to(working));
  const Tensor rope = q_rope.to(working);
  const Tensor out_latent = uninitialised(q_latent.sizes(), working);
  if (q_latent.numel() > 0) {
    run_attention(p, float_type(working, "q"), rows_by_head(q_latent, p), rows_of_run(rope, p),
                  rows_by_head(out_latent, p));
  }
  const Tensor values = project(out_latent, w.uv.to(working));
  std::vector<int64_t> shape = q_main.sizes().vec();
  shape.back() = w.uv.size(1);
  return values.transpose(0, 1).to(type).contiguous().view(shape);
}

}  // namespace flashmla
