// mla_attention_kv_b.cpp: attention of queries as the model makes them, with the up-projection of
// the latent (kv_b_proj).
//
// Absorbed form, per head:  q_latent = q_nope @ W_UK,  attention over latent rows,  out =
// out_latent @ W_UV^T. The products are ATen's (oneDNN).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "ops/attention_arguments.h"
#include "ops/checks.h"

namespace flashmla {
namespace {

// [B, Sq, H, width] -> [H, B * Sq, width]
Tensor by_head(const Tensor& t) {
  return t.permute({2, 0, 1, 3}).reshape({t.size(2), t.size(0) * t.size(1), t.size(3)});
}

// A slice of w_kv_b as a product takes it best: oneDNN (bf16) wants a dense matrix, transposed or
// not. Copying the slice is quick; ATen, given the transposed slice, would copy it element by
// element.
Tensor dense(const Tensor& weight, at::ScalarType type) {
  const Tensor converted = weight.to(type);
  return type == at::kFloat ? converted : converted.contiguous();
}

std::tuple<Tensor, Tensor> absorbed(Attention& attention, const Queries& queries,
                                    const Tensor& w_uk, const Tensor& w_uv) {
  const int64_t batch = queries.q.size(0);
  const int64_t q_len = queries.q.size(1);
  const int64_t heads = queries.q.size(2);
  const at::ScalarType type = queries.q.scalar_type();
  // ATen's fp16 products are slow on CPUs without fp16 arithmetic, and a latent query rounded to
  // fp16 may overflow.
  const at::ScalarType working = type == at::kHalf ? at::kFloat : type;
  const Tensor q_latent = at::bmm(by_head(queries.main()).to(working), dense(w_uk, working))
                              .view({heads, batch, q_len, w_uk.size(2)})
                              .permute({1, 2, 0, 3});
  const Tensor q_rope = queries.rope().to(working);
  const Tensor out_latent = uninitialised({heads, batch, q_len, w_uk.size(2)}, working);
  const Tensor lse = run_attention(attention, query_rows(q_latent), query_rows(q_rope),
                                   out_latent.permute({1, 2, 0, 3}));
  const Tensor out = at::bmm(out_latent.view({heads, batch * q_len, w_uk.size(2)}),
                             dense(w_uv, working).transpose(1, 2))
                         .view({heads, batch, q_len, w_uv.size(1)})
                         .permute({1, 2, 0, 3});
  return {out.to(type).contiguous(), lse};
}

}  // namespace

std::tuple<Tensor, Tensor> mla_attention_kv_b(
    const Tensor& q, const Tensor& kv_cache, const OptionalTensor& block_table,
    const Tensor& cache_seqlens, const Tensor& w_kv_b, int64_t head_dim_v, double softmax_scale,
    bool causal, const OptionalTensor& attn_mask, const OptionalTensor& cache_leftpad,
    const OptionalTensor& indices, const OptionalTensor& topk_length,
    const OptionalTensor& attn_sink, const OptionalTensor& q_pe, const OptionalTensor& k_pe_cache,
    int64_t window, std::string_view kv_cache_dtype, const OptionalTensor& cu_seqlens_q,
    std::string_view form) {
  const at::AutoDispatchBelowAutograd no_autograd;
  // Dtypes follow the arguments: autocast would hand the kernels products of another dtype.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  TORCH_CHECK_NOT_IMPLEMENTED(
      form != "expanded", "form: \"expanded\" is not implemented yet, expected auto or absorbed");
  TORCH_CHECK_VALUE(form == "auto" || form == "absorbed", "form: \"", form,
                    "\" is unknown, expected auto, absorbed or expanded");
  check_tensor(w_kv_b, "w_kv_b");
  check_rank(w_kv_b, "w_kv_b", 3, "[H, P + V, L]");
  check_width(head_dim_v, "head_dim_v", 1);
  const int64_t nope = w_kv_b.size(1) - head_dim_v;
  TORCH_CHECK_VALUE(nope >= 1, "w_kv_b: shape ", w_kv_b.sizes(),
                    ", expected [H, P + V, L] with V = head_dim_v = ", head_dim_v, " and P >= 1");
  const Queries queries = check_queries(q, q_pe, nope);
  check_same_dtype(w_kv_b, "w_kv_b", q, "q");
  TORCH_CHECK_VALUE(w_kv_b.size(0) == q.size(2), "w_kv_b: ", w_kv_b.size(0), " heads, expected ",
                    q.size(2), " as in q");
  Attention attention = check_attention(
      {kv_cache, block_table, cache_seqlens, softmax_scale, causal, attn_mask, cache_leftpad,
       indices, topk_length, attn_sink, k_pe_cache, window, kv_cache_dtype, cu_seqlens_q},
      queries, w_kv_b.size(2));
  return absorbed(attention, queries, w_kv_b.narrow(1, 0, nope),
                  w_kv_b.narrow(1, nope, head_dim_v));
}

}  // namespace flashmla
