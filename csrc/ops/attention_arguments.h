// attention_arguments.h: what both attention operators take besides queries and projections,
// checked once for both.
//
//   mla_attention, mla_attention_kv_b  ->  check_attention  ->  run_attention  ->  driver.h
#pragma once
#include <string_view>

#include "kernels/call/params.h"
#include "ops/cache_arguments.h"
#include "ops/ops.h"

namespace flashmla {

// Arguments as they came.
struct AttentionArguments {
  const Tensor& kv_cache;
  const OptionalTensor& block_table;
  const Tensor& cache_seqlens;
  double softmax_scale;
  bool causal;
  const OptionalTensor& attn_mask;
  const OptionalTensor& cache_leftpad;
  const OptionalTensor& indices;
  const OptionalTensor& topk_length;
  const OptionalTensor& attn_sink;
  const OptionalTensor& k_pe_cache;
  int64_t window;
  std::string_view kv_cache_dtype;
  const OptionalTensor& cu_seqlens_q;
};

// Queries, checked: q [B, Sq, H, main + R], or q [B, Sq, H, main] with q_pe [B, Sq, H, R], where
// `main` is L latent (or P plain) values; ragged: [T, H, ..]. Refers to the arguments; narrowed
// tensors would cost as much as all checks of a call.
struct Queries {
  const Tensor& q;
  const OptionalTensor& q_pe;
  int64_t main_width;
  int64_t rope_width;

  bool ragged() const { return q.dim() == 3; }
  int64_t heads() const { return q.size(-2); }
  int64_t tokens() const { return ragged() ? q.size(0) : q.size(0) * q.size(1); }
  QueryRows main_rows() const;
  QueryRows rope_rows() const;
};

Queries check_queries(const Tensor& q, const OptionalTensor& q_pe, int64_t main_width, bool ragged);

// Everything but queries and outputs, checked; with what it points into. Integers that addresses
// are made of are copies: another thread may write to the tensors meanwhile. Floats, masks and
// index lists are not: what they hold changes results, and nothing else.
struct Attention {
  AttentionParams params;
  Sequences sequences;
  std::vector<int32_t> cu_seqlens_q;
  std::vector<int32_t> cache_leftpad;
  Tensor attn_mask;
  std::vector<int32_t> key_ranges;  // of an interval mask
  Tensor indices;
  std::vector<int32_t> topk_length;
  Tensor attn_sink;
};

// `queries` gives the tokens, H and R; latent_name, what L follows from.
Attention check_attention(const AttentionArguments& arguments, const Queries& queries,
                          int64_t latent, const char* latent_name);

// out, uninitialised: [.., H, width], in the dtype of the queries.
Tensor make_out(const Queries& queries, int64_t width);

// lse, uninitialised: [B, H, Sq], ragged [H, T]. The kernels will write there.
Tensor make_lse(AttentionParams& params, const Queries& queries);

// Attends with latent queries [B, Sq, H, L] and [B, Sq, H, R] and writes `out` [B, Sq, H, L], all
// three of the same type.
void run_attention(AttentionParams& params, ScalarType type, const QueryRows& q_latent,
                   const QueryRows& q_rope, const QueryRows& out);

}  // namespace flashmla
