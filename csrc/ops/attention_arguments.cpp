// attention_arguments.cpp: checks of the attention operators' common arguments, and the call of the
// kernels.
#include "ops/attention_arguments.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cmath>

#include "ops/checks.h"
#include "ops/mask_arguments.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

// Where the queries of each sequence begin among all tokens of a ragged call.
std::vector<int32_t> check_cu_seqlens(const Tensor& cu_seqlens_q, int64_t tokens) {
  check_tensor(cu_seqlens_q, "cu_seqlens_q", kAnyAddress);
  check_dtype(cu_seqlens_q, "cu_seqlens_q", at::kInt);
  TORCH_CHECK_VALUE(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1, "cu_seqlens_q: shape ",
                    cu_seqlens_q.sizes(), ", expected [B + 1]");
  std::vector<int32_t> begin = copied<int32_t>(cu_seqlens_q);
  TORCH_CHECK_VALUE(begin[0] == 0, "cu_seqlens_q[0]: ", begin[0], ", expected 0");
  for (size_t b = 0; b + 1 < begin.size(); ++b) {
    TORCH_CHECK_VALUE(begin[b + 1] >= begin[b], "cu_seqlens_q[", b + 1, "]: ", begin[b + 1],
                      ", expected at least cu_seqlens_q[", b, "] = ", begin[b]);
  }
  TORCH_CHECK_VALUE(begin.back() == tokens, "cu_seqlens_q[", begin.size() - 1, "]: ", begin.back(),
                    ", expected the number of query tokens, q.size(0) = ", tokens);
  return begin;
}

std::vector<int32_t> check_leftpad(const Tensor& leftpad, const Sequences& sequences) {
  check_tensor(leftpad, "cache_leftpad", kAnyAddress);
  check_dtype(leftpad, "cache_leftpad", at::kInt);
  const std::vector<int32_t>& lengths = sequences.cache_seqlens;
  check_shape(leftpad, "cache_leftpad", {static_cast<int64_t>(lengths.size())}, "[B]");
  std::vector<int32_t> pads = copied<int32_t>(leftpad);
  for (size_t b = 0; b < pads.size(); ++b) {
    TORCH_CHECK_VALUE(pads[b] >= 0 && pads[b] <= lengths[b], "cache_leftpad[", b, "]: ", pads[b],
                      ", expected 0 to cache_seqlens[", b, "] = ", lengths[b]);
  }
  return pads;
}

// Entries of the lists need no check: the kernels skip what no query may see.
void check_indices(const AttentionArguments& a, const Queries& queries, Attention& attention) {
  AttentionParams& p = attention.params;
  check_tensor(*a.indices, "indices", kAnyAddress);
  check_dtype(*a.indices, "indices", at::kInt);
  const int64_t topk = a.indices->dim() > 0 ? a.indices->size(-1) : 0;
  if (queries.ragged()) {
    check_shape(*a.indices, "indices", {queries.tokens(), topk}, "[T, topk]");
  } else {
    check_shape(*a.indices, "indices", {p.batch, p.q_len, topk}, "[B, Sq, topk]");
  }
  p.topk = check_length(topk, "indices.size(-1)");
  const bool rows_contiguous = p.topk <= 1 || a.indices->stride(-1) == 1;
  attention.indices = aligned(rows_contiguous ? *a.indices : a.indices->contiguous());
  // The kernels tell a sparse call by the pointer, which empty lists do not have.
  static const int32_t kNothing = -1;
  p.indices = p.topk > 0 ? attention.indices.const_data_ptr<int32_t>() : &kNothing;
  p.indices_stride[0] = queries.ragged() ? 0 : attention.indices.stride(0);
  p.indices_stride[1] = attention.indices.stride(-2);
  if (!a.topk_length.has_value()) return;
  check_tensor(*a.topk_length, "topk_length", kAnyAddress);
  check_dtype(*a.topk_length, "topk_length", at::kInt);
  check_shape(*a.topk_length, "topk_length", {p.batch}, "[B]");
  attention.topk_length = copied<int32_t>(*a.topk_length);
  p.topk_length = attention.topk_length.data();
  for (int64_t b = 0; b < p.batch; ++b) {
    TORCH_CHECK_VALUE(p.topk_length[b] >= 0 && p.topk_length[b] <= p.topk, "topk_length[", b,
                      "]: ", p.topk_length[b], ", expected 0 to ", p.topk, " (indices.size(-1))");
  }
}

}  // namespace

QueryRows Queries::main_rows() const { return query_rows(q); }

QueryRows Queries::rope_rows() const {
  if (q_pe.has_value()) return query_rows(*q_pe);
  QueryRows rows = query_rows(q);
  if (rope_width > 0 && q.numel() > 0) rows.data += main_width * item_bytes(q);
  return rows;
}

Queries check_queries(const Tensor& q, const OptionalTensor& q_pe, int64_t main_width,
                      bool ragged) {
  check_environment();
  check_tensor(q, "q");
  float_type(q.scalar_type(), "q");
  if (ragged) {
    check_rank(q, "q", 3, "[T, H, head_dim] as cu_seqlens_q is given");
  } else {
    check_rank(q, "q", 4, "[B, Sq, H, head_dim]");
  }
  check_rows_contiguous(q, "q");
  if (!q_pe.has_value()) {
    TORCH_CHECK_VALUE(q.size(-1) >= main_width, "q: rows of ", q.size(-1), ", expected at least ",
                      main_width, " values and then the rope part");
    return {q, q_pe, main_width, q.size(-1) - main_width};
  }
  TORCH_CHECK_VALUE(q.size(-1) == main_width, "q: rows of ", q.size(-1), ", expected ", main_width,
                    " as q_pe holds the rope part");
  check_tensor(*q_pe, "q_pe");
  check_same_dtype(*q_pe, "q_pe", q, "q");
  const char* layout = ragged ? "[T, H, R]" : "[B, Sq, H, R]";
  check_rank(*q_pe, "q_pe", q.dim(), layout);
  TORCH_CHECK_VALUE(q_pe->sizes().slice(0, q.dim() - 1) == q.sizes().slice(0, q.dim() - 1),
                    "q_pe: shape ", q_pe->sizes(), ", expected ", layout,
                    " with the tokens and heads of q, whose shape is ", q.sizes());
  check_rows_contiguous(*q_pe, "q_pe");
  return {q, q_pe, main_width, q_pe->size(-1)};
}

Attention check_attention(const AttentionArguments& a, const Queries& queries, int64_t latent,
                          const char* latent_name) {
  Attention attention = {};
  AttentionParams& p = attention.params;
  const Tensor& q = queries.q;
  p.heads = check_int32(q.size(-2), "q.size(-2), heads");
  p.q_len = check_length(q.size(-3), "q.size(-3), query tokens");
  check_length(int64_t{p.q_len} * p.heads, "q.size(-3) * q.size(-2), rows per sequence");
  if (a.cu_seqlens_q.has_value()) {
    attention.cu_seqlens_q = check_cu_seqlens(*a.cu_seqlens_q, q.size(0));
    p.batch = check_int32(static_cast<int64_t>(attention.cu_seqlens_q.size()) - 1,
                          "cu_seqlens_q.size(0) - 1");
    p.cu_seqlens_q = attention.cu_seqlens_q.data();
  } else {
    p.batch = check_int32(q.size(0), "q.size(0)");
  }
  p.softmax_scale = static_cast<float>(a.softmax_scale);
  TORCH_CHECK_VALUE(std::isfinite(p.softmax_scale), "softmax_scale: ", a.softmax_scale,
                    ", expected a finite float32 number");
  TORCH_CHECK_VALUE(a.window >= 0, "window: ", a.window, ", expected 0 (none) or more keys");
  p.window = static_cast<int32_t>(std::min<int64_t>(a.window, std::numeric_limits<int32_t>::max()));
  p.causal = a.causal;

  const char* rope_name = queries.q_pe.has_value() ? "q_pe.size(-1)" : "q.size(-1), rope part";
  Cache cache = check_cache(a.kv_cache, a.k_pe_cache, a.kv_cache_dtype, latent, queries.rope_width,
                            {latent_name, rope_name});
  attention.sequences = check_sequences(cache, a.block_table, a.cache_seqlens, p.batch);
  p.cache = cache.view;
  p.cache_seqlens = attention.sequences.cache_seqlens.data();
  if (a.cache_leftpad.has_value()) {
    attention.cache_leftpad = check_leftpad(*a.cache_leftpad, attention.sequences);
    p.cache_leftpad = attention.cache_leftpad.data();
  }
  if (a.attn_mask.has_value()) set_mask(*a.attn_mask, queries, attention);
  if (a.indices.has_value()) check_indices(a, queries, attention);
  TORCH_CHECK_VALUE(a.indices.has_value() || !a.topk_length.has_value(),
                    "topk_length: given without indices, expected None");
  if (a.attn_sink.has_value()) {
    check_tensor(*a.attn_sink, "attn_sink", kAnyAddress);
    check_dtype(*a.attn_sink, "attn_sink", at::kFloat);
    check_shape(*a.attn_sink, "attn_sink", {p.heads}, "[H]");
    attention.attn_sink = aligned(a.attn_sink->contiguous());
    p.attn_sink = attention.attn_sink.const_data_ptr<float>();
    p.attn_sink_stride[1] = 1;
  }
  p.deterministic = at::globalContext().deterministicAlgorithms();
  return attention;
}

Tensor make_out(const Queries& queries, int64_t width) {
  const Tensor& q = queries.q;
  return queries.ragged()
             ? uninitialised({q.size(0), q.size(1), width}, q.scalar_type(), "out")
             : uninitialised({q.size(0), q.size(1), q.size(2), width}, q.scalar_type(), "out");
}

Tensor make_lse(AttentionParams& p, const Queries& queries) {
  const Tensor lse = queries.ragged()
                         ? uninitialised({p.heads, queries.q.size(0)}, at::kFloat, "lse")
                         : uninitialised({p.batch, p.heads, p.q_len}, at::kFloat, "lse");
  p.lse = lse.mutable_data_ptr<float>();
  p.lse_stride[0] = queries.ragged() ? 0 : lse.stride(0);
  p.lse_stride[1] = lse.stride(-2);
  p.lse_stride[2] = lse.stride(-1);
  return lse;
}

void run_attention(AttentionParams& p, ScalarType type, const QueryRows& q_latent,
                   const QueryRows& q_rope, const QueryRows& out) {
  p.q_type = p.q_main_type = p.out_type = type;
  p.q = q_latent;
  p.q_pe = q_rope;
  p.out = out;
  flashmla::attention(p, thread_plan(), torch_executor());
}

}  // namespace flashmla
