// call_parts.cpp: parts of a call as calls of their own (forms.h).
#include "kernels/call/visible.h"
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

AttentionParams heads_as_sequences(const AttentionParams& one, int32_t first, int32_t count,
                                   const int32_t* lengths, const int32_t* leftpads) {
  const QueryTokens tokens = query_tokens(one, 0);
  AttentionParams p = one;
  p.batch = count;
  p.heads = 1;
  p.q_len = tokens.count;
  p.cu_seqlens_q = nullptr;
  p.cache_seqlens = lengths;
  p.cache_leftpad = leftpads;
  for (QueryRows* rows : {&p.q, &p.q_pe, &p.out}) {
    rows->data += tokens.begin * rows->stride[1] + first * rows->stride[2];
    rows->stride[0] = rows->stride[2];
    rows->stride[2] = 0;
  }
  p.lse += first * one.lse_stride[1] + tokens.begin * one.lse_stride[2];
  p.lse_stride[0] = one.lse_stride[1];
  if (p.attn_sink) p.attn_sink += first * one.attn_sink_stride[1];
  p.attn_sink_stride[0] = one.attn_sink_stride[1];
  p.mask += first * one.mask_stride[1] + tokens.begin * one.mask_stride[2];
  p.mask_stride[0] = one.mask_stride[1];
  if (p.key_ranges) p.key_ranges += tokens.begin * one.key_ranges_stride[1];
  p.key_ranges_stride[0] = 0;
  return p;
}

}  // namespace flashmla
