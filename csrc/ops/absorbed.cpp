// absorbed.cpp: the absorbed form (forms.h). Few query tokens stream the weight: the kernels' own
// projections (driver.h). For many it is a matrix product, and ATen's (oneDNN).
#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>

#include "kernels/call/driver.h"
#include "ops/checks.h"
#include "ops/forms.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kKeptBytes = int64_t{24} << 20;  // of latent rows that are kept between calls

// The query tokens of a run: [sequences, q_len]; ragged, one row of them.
struct RunTokens {
  int64_t sequences, q_len, first;

  explicit RunTokens(const AttentionParams& p)
      : sequences(p.cu_seqlens_q ? 1 : p.batch),
        q_len(p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] - p.cu_seqlens_q[0] : p.q_len),
        first(p.cu_seqlens_q ? p.cu_seqlens_q[0] : 0) {}

  int64_t count() const { return sequences * q_len; }
  QueryRows rows(QueryRows all) const {
    all.data += first * all.stride[1];
    return all;
  }
};

// Floats of a latent row: an odd number of cache lines, so that rows spread over the L1 cache.
int64_t latent_row(int64_t latent) {
  constexpr int64_t kLine = kCacheLine / 4;
  return ((latent + kLine - 1) / kLine | 1) * kLine;
}

void attend_streaming(const AttentionParams& p, const Projections& w) {
  const RunTokens tokens(p);
  const int64_t row = latent_row(p.cache.latent), floats = 2 * p.heads * tokens.count() * row;
  const bool kept = floats * 4 <= kKeptBytes;
  if (!kept && p.batch > 1) {
    for (int32_t b = 0; b < p.batch; ++b) attend_absorbed(of_sequences(p, b, b + 1), w);
    return;
  }
  const Tensor own = kept ? Tensor() : uninitialised({floats}, at::kFloat);
  const Executor executor = torch_executor();
  auto* latents =
      kept ? reinterpret_cast<float*>(thread_scratch(kLatentRows, static_cast<size_t>(floats) * 4))
           : own.mutable_data_ptr<float>();
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
  projected_attention(p, projections, thread_plan(), executor);
}

// Rows of the caller's as a tensor [sequences, q_len, H, width].
Tensor as_tensor(const QueryRows& rows, const RunTokens& tokens, int64_t heads, int64_t width,
                 at::ScalarType type) {
  const QueryRows of_run = tokens.rows(rows);
  const auto item = static_cast<int64_t>(at::elementSize(type));
  return at::from_blob(
      of_run.data, {tokens.sequences, tokens.q_len, heads, width},
      {of_run.stride[0] / item, of_run.stride[1] / item, of_run.stride[2] / item, 1}, type);
}

// Rows of t [H, tokens, width] under the numbers that tokens have in the call.
QueryRows rows_by_head(const Tensor& t, const RunTokens& tokens, bool ragged) {
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

void attend_multiplying(AttentionParams p, const Projections& w) {
  const RunTokens tokens(p);
  const at::ScalarType type = w.w_kv_b.scalar_type();
  const int64_t heads = p.heads;
  const Tensor q = as_tensor(p.q, tokens, heads, w.nope, type);
  const Tensor out = as_tensor(p.out, tokens, heads, w.value, type);
  // ATen's fp16 products are slow on CPUs without fp16 arithmetic, and a latent query rounded to
  // fp16 may overflow.
  const at::ScalarType working = type == at::kHalf ? at::kFloat : type;
  const Tensor by_head = q.movedim(2, 0).reshape({heads, tokens.count(), w.nope});
  const Tensor q_latent = at::bmm(by_head.to(working), dense_rows(w.uk().to(working)));
  const Tensor out_latent = uninitialised(q_latent.sizes(), working);
  p.q_main_type = p.out_type = float_type(working, "q");
  p.q = rows_by_head(q_latent, tokens, p.cu_seqlens_q != nullptr);
  p.out = rows_by_head(out_latent, tokens, p.cu_seqlens_q != nullptr);
  attention(p, thread_plan(), torch_executor());
  const Tensor values = project(out_latent, dense_rows(w.uv().to(working)));
  out.copy_(values.view({heads, tokens.sequences, tokens.q_len, w.value}).movedim(0, 2));
}

}  // namespace

void attend_absorbed(const AttentionParams& p, const Projections& w) {
  const int64_t tokens = RunTokens(p).count();
  if (tokens == 0 || p.heads == 0) return;
  // The kernels' projections give the same bits whatever tokens there are besides.
  if (p.deterministic || streams_projections(tokens, p.q_type)) {
    attend_streaming(p, w);
  } else {
    attend_multiplying(p, w);
  }
}

}  // namespace flashmla
