// attention_arguments.cpp: checks of the attention operators' common arguments, and the call of the
// kernels.
#include "ops/attention_arguments.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cmath>

#include "ops/checks.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

void refuse(const OptionalTensor& t, const char* name, const char* what) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t.has_value(), name, ": ", what,
                              " not implemented yet, expected None");
}

Tensor check_leftpad(const Tensor& leftpad, const Sequences& sequences) {
  check_tensor(leftpad, "cache_leftpad");
  check_dtype(leftpad, "cache_leftpad", at::kInt);
  check_shape(leftpad, "cache_leftpad", sequences.cache_seqlens.sizes(), "[B]");
  const Tensor dense = leftpad.contiguous();
  const int32_t* pads = dense.const_data_ptr<int32_t>();
  const int32_t* lengths = sequences.cache_seqlens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < dense.numel(); ++b) {
    TORCH_CHECK_VALUE(pads[b] >= 0 && pads[b] <= lengths[b], "cache_leftpad[", b, "]: ", pads[b],
                      ", expected 0 to cache_seqlens[", b, "] = ", lengths[b]);
  }
  return dense;
}

MaskType mask_type(at::ScalarType type) {
  switch (type) {
    case at::kBool:
      return MaskType::kBool;
    case at::kFloat:
      return MaskType::kF32;
    case at::kBFloat16:
      return MaskType::kBf16;
    case at::kHalf:
      return MaskType::kF16;
    default:
      TORCH_CHECK_TYPE(false, "attn_mask: dtype ", type,
                       ", expected Bool, Float, BFloat16 or Half");
  }
}

// The mask as [B or 1, H or 1, Sq or 1, S] with contiguous columns. A copy, where columns are
// strided, keeps broadcast dimensions at size 1.
Tensor check_mask(const Tensor& attn_mask, const AttentionParams& p, int32_t longest) {
  check_tensor(attn_mask, "attn_mask");
  TORCH_CHECK_VALUE(attn_mask.dim() >= 1 && attn_mask.dim() <= 4, "attn_mask: shape ",
                    attn_mask.sizes(), ", expected one broadcastable to [B, H, Sq, S]");
  Tensor mask = attn_mask;
  while (mask.dim() < 4) mask = mask.unsqueeze(0);
  const int64_t full[3] = {p.batch, p.heads, p.q_len};
  for (int64_t d = 0; d < 3; ++d) {
    TORCH_CHECK_VALUE(mask.size(d) == 1 || mask.size(d) == full[d], "attn_mask: shape ",
                      attn_mask.sizes(), ", expected one broadcastable to [B, H, Sq, S] = [",
                      p.batch, ", ", p.heads, ", ", p.q_len, ", S]");
  }
  TORCH_CHECK_VALUE(mask.size(3) >= longest, "attn_mask: shape ", attn_mask.sizes(), " has ",
                    mask.size(3), " columns, expected at least max(cache_seqlens) = ", longest);
  if (mask.size(3) > 1 && mask.stride(3) != 1) {
    for (int64_t d = 0; d < 3; ++d) {
      if (mask.size(d) > 1 && mask.stride(d) == 0) mask = mask.narrow(d, 0, 1);
    }
    mask = mask.contiguous();
  }
  return mask;
}

// Entries of the lists need no check: the kernels skip what no query may see.
void check_indices(const AttentionArguments& a, Attention& attention) {
  AttentionParams& p = attention.params;
  check_tensor(*a.indices, "indices");
  check_dtype(*a.indices, "indices", at::kInt);
  check_rank(*a.indices, "indices", 3, "[B, Sq, topk]");
  check_shape(*a.indices, "indices", {p.batch, p.q_len, a.indices->size(2)}, "[B, Sq, topk]");
  p.topk = check_int32(a.indices->size(2), "indices.size(2)");
  const bool rows_contiguous = p.topk <= 1 || a.indices->stride(2) == 1;
  attention.indices = rows_contiguous ? *a.indices : a.indices->contiguous();
  // The kernels tell a sparse call by the pointer, which empty lists do not have.
  static const int32_t kNothing = -1;
  p.indices = p.topk > 0 ? attention.indices.const_data_ptr<int32_t>() : &kNothing;
  for (int d = 0; d < 2; ++d) p.indices_stride[d] = attention.indices.stride(d);
  if (!a.topk_length.has_value()) return;
  check_tensor(*a.topk_length, "topk_length");
  check_dtype(*a.topk_length, "topk_length", at::kInt);
  check_shape(*a.topk_length, "topk_length", {p.batch}, "[B]");
  attention.topk_length = a.topk_length->contiguous();
  p.topk_length = attention.topk_length.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < p.batch; ++b) {
    TORCH_CHECK_VALUE(p.topk_length[b] >= 0 && p.topk_length[b] <= p.topk, "topk_length[", b,
                      "]: ", p.topk_length[b], ", expected 0 to ", p.topk, " (indices.size(2))");
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

Tensor Queries::main() const { return q_pe.has_value() ? q : q.narrow(3, 0, main_width); }

Tensor Queries::rope() const {
  return q_pe.has_value() ? *q_pe : q.narrow(3, main_width, rope_width);
}

Queries check_queries(const Tensor& q, const OptionalTensor& q_pe, int64_t main_width) {
  check_environment();
  check_tensor(q, "q");
  float_type(q.scalar_type(), "q");
  check_rank(q, "q", 4, "[B, Sq, H, head_dim]");
  check_rows_contiguous(q, "q");
  if (!q_pe.has_value()) {
    TORCH_CHECK_VALUE(q.size(3) >= main_width, "q: rows of ", q.size(3), ", expected at least ",
                      main_width, " values and then the rope part");
    return {q, q_pe, main_width, q.size(3) - main_width};
  }
  TORCH_CHECK_VALUE(q.size(3) == main_width, "q: rows of ", q.size(3), ", expected ", main_width,
                    " as q_pe holds the rope part");
  check_tensor(*q_pe, "q_pe");
  check_same_dtype(*q_pe, "q_pe", q, "q");
  check_rank(*q_pe, "q_pe", 4, "[B, Sq, H, R]");
  check_shape(*q_pe, "q_pe", {q.size(0), q.size(1), q.size(2), q_pe->size(3)}, "[B, Sq, H, R]");
  check_rows_contiguous(*q_pe, "q_pe");
  return {q, q_pe, main_width, q_pe->size(3)};
}

Attention check_attention(const AttentionArguments& a, const Queries& queries, int64_t latent) {
  refuse(a.cu_seqlens_q, "cu_seqlens_q", "queries of ragged length are");
  Attention attention = {};
  AttentionParams& p = attention.params;
  p.batch = check_int32(queries.q.size(0), "q.size(0)");
  p.q_len = check_int32(queries.q.size(1), "q.size(1)");
  p.heads = check_int32(queries.q.size(2), "q.size(2)");
  check_int32(queries.q.size(1) * queries.q.size(2), "q.size(1) * q.size(2), rows per sequence");
  p.softmax_scale = static_cast<float>(a.softmax_scale);
  TORCH_CHECK_VALUE(std::isfinite(p.softmax_scale), "softmax_scale: ", a.softmax_scale,
                    ", expected a finite float32 number");
  TORCH_CHECK_VALUE(a.window >= 0, "window: ", a.window, ", expected 0 (none) or more keys");
  p.window = static_cast<int32_t>(std::min<int64_t>(a.window, std::numeric_limits<int32_t>::max()));
  p.causal = a.causal;

  Cache cache = check_cache(a.kv_cache, a.k_pe_cache, a.kv_cache_dtype, latent, queries.rope_width);
  attention.sequences = check_sequences(cache, a.block_table, a.cache_seqlens, p.batch);
  p.cache = cache.view;
  p.cache_seqlens = attention.sequences.cache_seqlens.const_data_ptr<int32_t>();
  if (a.cache_leftpad.has_value()) {
    attention.cache_leftpad = check_leftpad(*a.cache_leftpad, attention.sequences);
    p.cache_leftpad = attention.cache_leftpad.const_data_ptr<int32_t>();
  }
  if (a.attn_mask.has_value()) {
    p.mask_type = mask_type(a.attn_mask->scalar_type());
    const Tensor mask = check_mask(*a.attn_mask, p, attention.sequences.longest);
    for (int d = 0; d < 3; ++d)
      p.mask_stride[d] = mask.size(d) == 1 ? 0 : mask.stride(d) * item_bytes(mask);
    p.mask = bytes(mask);
    attention.attn_mask = mask;
  }
  if (a.indices.has_value()) check_indices(a, attention);
  TORCH_CHECK_VALUE(a.indices.has_value() || !a.topk_length.has_value(),
                    "topk_length: given without indices, expected None");
  if (a.attn_sink.has_value()) {
    check_tensor(*a.attn_sink, "attn_sink");
    check_dtype(*a.attn_sink, "attn_sink", at::kFloat);
    check_shape(*a.attn_sink, "attn_sink", {p.heads}, "[H]");
    attention.attn_sink = a.attn_sink->contiguous();
    p.attn_sink = attention.attn_sink.const_data_ptr<float>();
  }
  p.deterministic = at::globalContext().deterministicAlgorithms();
  return attention;
}

Tensor run_attention(Attention& attention, const QueryRows& q_latent, const QueryRows& q_rope,
                     const Tensor& out) {
  AttentionParams& p = attention.params;
  const Tensor lse = uninitialised({p.batch, p.heads, p.q_len}, at::kFloat);
  if (lse.numel() == 0) return lse;
  p.q_type = float_type(out.scalar_type(), "q");
  p.q = q_latent;
  p.q_pe = q_rope;
  p.out = query_rows(out);
  p.lse = lse.mutable_data_ptr<float>();
  for (int d = 0; d < 3; ++d) p.lse_stride[d] = lse.stride(d);
  flashmla::attention(p, thread_plan(), torch_executor());
  return lse;
}

}  // namespace flashmla
