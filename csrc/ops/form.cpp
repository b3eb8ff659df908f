// form.cpp: which form of mla_attention_kv_b costs less.
#include "kernels/kernel_table.h"
#include "kernels/visible.h"
#include "ops/forms.h"

namespace flashmla {

AttentionParams of_sequences(const AttentionParams& p, int32_t begin, int32_t end) {
  AttentionParams part = p;
  part.batch = end - begin;
  part.cache_seqlens += begin;
  if (p.cache.block_table) {
    part.cache.block_table += begin * p.cache.block_table_stride;
  } else {
    part.cache.kv_c.data += begin * p.cache.kv_c.block_stride;
    part.cache.k_pe.data += begin * p.cache.k_pe.block_stride;
  }
  // Rows of ragged tokens are numbered throughout: their stride of sequences is 0.
  if (p.cu_seqlens_q) part.cu_seqlens_q += begin;
  for (QueryRows* rows : {&part.q, &part.q_pe, &part.out}) rows->data += begin * rows->stride[0];
  part.lse += begin * p.lse_stride[0];
  part.mask += begin * p.mask_stride[0];
  if (p.key_ranges) part.key_ranges += begin * p.key_ranges_stride[0];
  if (p.cache_leftpad) part.cache_leftpad += begin;
  if (p.indices) part.indices += begin * p.indices_stride[0];
  if (p.topk_length) part.topk_length += begin;
  if (p.attn_sink) part.attn_sink += begin * p.attn_sink_stride[0];
  return part;
}

Form cheaper_form(const AttentionParams& p, int32_t sequence, FormDims) {
  return query_tokens(p, sequence).count >= 128 ? Form::kExpanded : Form::kAbsorbed;
}

}  // namespace flashmla
