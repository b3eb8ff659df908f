// absorbed.cpp: the absorbed form (forms.h). Few query tokens stream the weight: the kernels' own
// projections (driver.h). For many it is a matrix product, and ATen's (oneDNN).
#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/call/driver.h"
#include "kernels/call/visible.h"
#include "ops/checks.h"
#include "ops/forms.h"
#include "ops/interrupt.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

constexpr int64_t kCacheLine = 64;

// Latent queries and results of a call: as many tokens at a time as fit. What streams the weight
// keeps them in scratch memory; what copies it for a product had better do so once.
constexpr int64_t kStreamedBytes = int64_t{24} << 20, kMultipliedBytes = int64_t{96} << 20;

// The query tokens of a part of a call: [sequences, q_len]; ragged, one row of them.
struct PartTokens {
  int64_t sequences, q_len, first;

  explicit PartTokens(const AttentionParams& p) : sequences(1), q_len(p.q_len), first(0) {
    if (p.cu_seqlens_q) {
      first = p.cu_seqlens_q[0];
      q_len = p.cu_seqlens_q[p.batch] - first;
    } else {
      sequences = p.batch;
    }
    if (p.token_end < q_len) q_len = p.token_end;
    q_len -= p.token_begin;
    first += p.token_begin;
  }

  int64_t count() const { return sequences * q_len; }
  QueryRows rows(QueryRows all) const {
    all.data += first * all.stride[1];
    return all;
  }
};

// Calls attend(part) for parts of a call of at most `most` query tokens: neighbouring sequences, or
// tokens of one. The parts of a sequence that has more do not depend on the others.
template <class Attend>
void for_each_part(const AttentionParams& p, int64_t most, const Attend& attend) {
  for (int32_t begin = 0, end = 0; begin < p.batch && !interrupted(); begin = end) {
    int64_t tokens = query_tokens(p, begin).count;
    for (end = begin + 1; end < p.batch; ++end) {
      const int64_t next = query_tokens(p, end).count;
      if (tokens + next > most) break;
      tokens += next;
    }
    AttentionParams part = of_sequences(p, begin, end);
    if (tokens <= most) {
      if (tokens > 0) attend(part);
      continue;
    }
    for (int64_t at = 0; at < tokens && !interrupted(); at += most) {
      part.token_begin = static_cast<int32_t>(at);
      part.token_end = static_cast<int32_t>(std::min(at + most, tokens));
      attend(part);
    }
  }
}

// Floats of a latent row: an odd number of cache lines, so that rows spread over the L1 cache.
int64_t latent_row(int64_t latent) {
  constexpr int64_t kLine = kCacheLine / 4;
  return ((latent + kLine - 1) / kLine | 1) * kLine;
}

// The zeros of rows without keys stay zeros where the weight is not finite. latents: those that
// were multiplied by it, [H, tokens, row]; NaN if all logits of a row are minus infinity, which has
// the same log-sum-exp.
void clear_rows_without_keys(const AttentionParams& p, const PartTokens& tokens, int32_t value,
                             const std::byte* latents, int64_t row, ScalarType type) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  constexpr std::byte kZero[4] = {};
  const auto bytes = static_cast<size_t>(value * size_of(p.q_type));
  const QueryRows out = tokens.rows(p.out);
  const float* lse = p.lse + tokens.first * p.lse_stride[2];
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t s = 0; s < tokens.sequences; ++s) {
      for (int64_t t = 0; t < tokens.q_len; ++t, latents += row) {
        if (lse[s * p.lse_stride[0] + h * p.lse_stride[1] + t * p.lse_stride[2]] != kNone) continue;
        if (std::memcmp(latents, kZero, static_cast<size_t>(size_of(type))) != 0) continue;
        std::memset(out.data + s * out.stride[0] + t * out.stride[1] + h * out.stride[2], 0, bytes);
      }
    }
  }
}

void attend_streaming(const AttentionParams& p, const Projections& w) {
  const PartTokens tokens(p);
  const int64_t row = latent_row(p.cache.latent), floats = 2 * p.heads * tokens.count() * row;
  auto* latents = reinterpret_cast<float*>(
      thread_scratch(kLatentRows, static_cast<size_t>(floats) * sizeof(float)));
  ProjectionParams projections = {};
  projections.type = p.q_type;
  projections.heads = p.heads;
  projections.tokens = static_cast<int32_t>(tokens.count());
  projections.q_len = static_cast<int32_t>(tokens.q_len);
  projections.nope = w.nope;
  projections.latent = p.cache.latent;
  projections.value = w.value;
  projections.uk = projections.uv = weight_rows(w.w_kv_b);
  projections.uv.data += w.nope * projections.uv.stride[1];
  projections.q = tokens.rows(p.q);
  projections.out = tokens.rows(p.out);
  projections.q_latent = latents;
  projections.out_latent = latents + floats / 2;
  projections.latent_row = static_cast<int32_t>(row);
  projected_attention(p, projections, thread_plan(), torch_executor());
  clear_rows_without_keys(p, tokens, w.value, reinterpret_cast<std::byte*>(latents + floats / 2),
                          row * 4, ScalarType::kF32);
}

// Rows of the caller's as a tensor [sequences, q_len, H, width].
Tensor as_tensor(const QueryRows& rows, const PartTokens& tokens, int64_t heads, int64_t width,
                 at::ScalarType type) {
  const QueryRows of_part = tokens.rows(rows);
  const auto item = static_cast<int64_t>(at::elementSize(type));
  return at::from_blob(
      of_part.data, {tokens.sequences, tokens.q_len, heads, width},
      {of_part.stride[0] / item, of_part.stride[1] / item, of_part.stride[2] / item, 1}, type);
}

// Rows of t [H, tokens, width] under the numbers that tokens have in the call.
QueryRows rows_by_head(const Tensor& t, const PartTokens& tokens, bool ragged) {
  const int64_t token = t.size(2) * item_bytes(t), head = t.size(1) * token;
  std::byte* data = const_cast<std::byte*>(bytes(t));
  return {data - tokens.first * token, {ragged ? 0 : tokens.q_len * token, token, head}};
}

// out_latent [H, tokens, L] @ W_UV^T -> [H, tokens, V]
Tensor project(const Tensor& out_latent, const Tensor& uv) {
  // f32: the weight from the left, where it lies. ATen would copy its transpose, element by
  // element.
  if (uv.scalar_type() == at::kFloat) return at::bmm(uv, out_latent.transpose(1, 2)).mT();
  // bf16: oneDNN wants dense matrices, transposed or not, so one of the two is copied; a plain copy
  // of the weight is quick.
  return at::bmm(out_latent, uv.contiguous().transpose(1, 2));
}

void attend_multiplying(const AttentionParams& call, const Projections& w) {
  AttentionParams p = call;
  const PartTokens tokens(p);
  const at::ScalarType type = w.w_kv_b.scalar_type();
  const int64_t heads = p.heads;
  const Tensor q = as_tensor(p.q, tokens, heads, w.nope, type);
  const Tensor out = as_tensor(p.out, tokens, heads, w.value, type);
  // ATen's fp16 products are slow on CPUs without fp16 arithmetic, and a latent query rounded to
  // fp16 may overflow. The two products have the same type.
  const at::ScalarType working = product_type(product_type(type, w.nope), p.cache.latent);
  const Tensor by_head = q.movedim(2, 0).reshape({heads, tokens.count(), w.nope});
  const Tensor q_latent = at::bmm(by_head.to(working), dense_rows(w.uk().to(working)));
  const Tensor out_latent = uninitialised(q_latent.sizes(), working);
  p.q_main_type = p.out_type = float_type(working, "q");
  p.q = rows_by_head(q_latent, tokens, p.cu_seqlens_q != nullptr);
  p.out = rows_by_head(out_latent, tokens, p.cu_seqlens_q != nullptr);
  attention(p, thread_plan(), torch_executor());
  const Tensor values = project(out_latent, dense_rows(w.uv().to(working)));
  out.copy_(values.view({heads, tokens.sequences, tokens.q_len, w.value}).movedim(0, 2));
  clear_rows_without_keys(call, tokens, w.value, bytes(out_latent),
                          out_latent.size(2) * item_bytes(out_latent), p.out_type);
}

}  // namespace

void attend_absorbed(const AttentionParams& p, const Projections& w) {
  const PartTokens tokens(p);
  if (tokens.count() == 0 || p.heads == 0) return;
  auto at_once = [](int64_t bytes, int64_t token_bytes) {
    constexpr int64_t kLeast = 8;
    return std::max(kLeast, bytes / (2 * token_bytes) / kLeast * kLeast);
  };
  // Streaming gives the same bits whatever tokens there are besides.
  if (p.deterministic || streams_projections(tokens.count(), p.q_type)) {
    const int64_t token_bytes = p.heads * latent_row(p.cache.latent) * 4;
    for_each_part(p, at_once(kStreamedBytes, token_bytes),
                  [&](const AttentionParams& part) { attend_streaming(part, w); });
  } else {
    const int64_t token_bytes = p.heads * p.cache.latent * size_of(p.q_type);
    for_each_part(p, at_once(kMultipliedBytes, token_bytes),
                  [&](const AttentionParams& part) { attend_multiplying(part, w); });
  }
}

}  // namespace flashmla
