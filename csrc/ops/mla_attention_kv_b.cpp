// mla_attention_kv_b.cpp: attention of queries as the model makes them, with the up-projection of
// the latent (kv_b_proj). Chooses the form of each sequence and hands runs of equal ones to it
// (forms.h).
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "kernels/call/visible.h"
#include "ops/attention_arguments.h"
#include "ops/checks.h"
#include "ops/forms.h"
#include "ops/interrupt.h"

namespace flashmla {
namespace {

Form form_of(const AttentionParams& p, int32_t sequence, std::string_view form,
             const Projections& w) {
  if (form == "expanded") return Form::kExpanded;
  // An index list belongs to one query; expansion pays when many share the keys.
  if (form == "absorbed" || p.indices) return Form::kAbsorbed;
  return cheaper_form(p, sequence, w);
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
  TORCH_CHECK_VALUE(form == "auto" || form == "absorbed" || form == "expanded", "form: \"", form,
                    "\" is unknown, expected auto, absorbed or expanded");
  TORCH_CHECK_VALUE(form != "expanded" || !indices.has_value(),
                    "form: \"expanded\" shares the keys of a sequence among its queries, but "
                    "indices gives each its own; expected auto or absorbed");
  check_tensor(w_kv_b, "w_kv_b");
  check_rank(w_kv_b, "w_kv_b", 3, "[H, P + V, L]");
  check_width(head_dim_v, "head_dim_v", 1);
  const int64_t nope = w_kv_b.size(1) - head_dim_v;
  TORCH_CHECK_VALUE(nope >= 1, "w_kv_b: shape ", w_kv_b.sizes(),
                    ", expected [H, P + V, L] with V = head_dim_v = ", head_dim_v, " and P >= 1");
  check_width(nope, "w_kv_b.size(1) - head_dim_v", 1);
  const Queries queries = check_queries(q, q_pe, nope, cu_seqlens_q.has_value());
  check_same_dtype(w_kv_b, "w_kv_b", q, "q");
  TORCH_CHECK_VALUE(w_kv_b.size(0) == queries.heads(), "w_kv_b: ", w_kv_b.size(0),
                    " heads, expected ", queries.heads(), " as in q");
  Attention attention = check_attention(
      {kv_cache, block_table, cache_seqlens, softmax_scale, causal, attn_mask, cache_leftpad,
       indices, topk_length, attn_sink, k_pe_cache, window, kv_cache_dtype, cu_seqlens_q},
      queries, w_kv_b.size(2), "w_kv_b.size(2), L");

  AttentionParams& p = attention.params;
  const Projections w = {w_kv_b, static_cast<int32_t>(nope), static_cast<int32_t>(head_dim_v)};
  const InterruptibleCall interruptible;
  const Tensor out = make_out(queries, head_dim_v), lse = make_lse(p, queries);
  p.q_type = p.q_main_type = p.out_type = float_type(q.scalar_type(), "q");
  p.q = queries.main_rows();
  p.q_pe = queries.rope_rows();
  p.out = query_rows(out);
  for (int32_t begin = 0, end = 0; begin < p.batch; begin = end) {
    const Form run = form_of(p, begin, form, w);
    for (end = begin + 1; end < p.batch && form_of(p, end, form, w) == run;) ++end;
    (run == Form::kAbsorbed ? attend_absorbed : attend_expanded)(of_sequences(p, begin, end), w);
  }
  InterruptibleCall::finish({out, lse});
  return {out, lse};
}

}  // namespace flashmla
