// mla_attention.cpp: attention of ready (absorbed) queries against the latent cache.
#include "ops/attention_arguments.h"
#include "ops/checks.h"
#include "ops/interrupt.h"

namespace flashmla {

std::tuple<Tensor, Tensor> mla_attention(
    const Tensor& q, const Tensor& kv_cache, const OptionalTensor& block_table,
    const Tensor& cache_seqlens, int64_t head_dim_v, double softmax_scale, bool causal,
    const OptionalTensor& attn_mask, const OptionalTensor& cache_leftpad,
    const OptionalTensor& indices, const OptionalTensor& topk_length,
    const OptionalTensor& attn_sink, const OptionalTensor& q_pe, const OptionalTensor& k_pe_cache,
    int64_t window, std::string_view kv_cache_dtype, const OptionalTensor& cu_seqlens_q) {
  check_width(head_dim_v, "head_dim_v", 1);
  const Queries queries = check_queries(q, q_pe, head_dim_v, cu_seqlens_q.has_value());
  Attention attention = check_attention(
      {kv_cache, block_table, cache_seqlens, softmax_scale, causal, attn_mask, cache_leftpad,
       indices, topk_length, attn_sink, k_pe_cache, window, kv_cache_dtype, cu_seqlens_q},
      queries, head_dim_v, "head_dim_v");
  const InterruptibleCall interruptible;
  const Tensor out = make_out(queries, head_dim_v);
  const Tensor lse = make_lse(attention.params, queries);
  run_attention(attention.params, float_type(q.scalar_type(), "q"), queries.main_rows(),
                queries.rope_rows(), query_rows(out));
  InterruptibleCall::finish({out, lse});
  return {out, lse};
}

}  // namespace flashmla
