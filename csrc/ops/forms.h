// forms.h: the two forms of mla_attention_kv_b, on checked arguments. Both compute the same.
//
//   absorbed   q_latent = q_nope @ W_UK;  attention over latent rows;  out = out_latent @ W_UV^T
//   expanded   keys and values of every head are made from the latent; attention over those
//
// Each takes a run of neighbouring sequences, given by of_sequences().
#pragma once
#include "kernels/call/params.h"
#include "ops/attention_arguments.h"
#include "ops/ops.h"

namespace flashmla {

// The two halves of w_kv_b. Narrowed tensors are for those who need tensors: making them takes
// longer than all checks of a call.
struct Projections {
  const Tensor& w_kv_b;  // [H, P + V, L]
  int32_t nope, value;   // P and V

  Tensor uk() const { return w_kv_b.narrow(1, 0, nope); }
  Tensor uv() const { return w_kv_b.narrow(1, nope, value); }
};

// A weight as products of ATen take it: rows that share memory, or whose values are apart, are not
// what BLAS understands by a matrix.
inline Tensor dense_rows(const Tensor& w) {
  const bool dense =
      (w.size(-1) <= 1 || w.stride(-1) == 1) && (w.size(-2) <= 1 || w.stride(-2) >= w.size(-1));
  return dense ? w : w.contiguous();
}

// What a product of ATen that adds up `depth` values is computed in, of rows of `type`. Products of
// bf16 take values by twos, those of AMX by 32, and the last ones together with the first of the
// row behind them, times 0: NaN there is NaN here.
inline at::ScalarType product_type(at::ScalarType type, int64_t depth) {
  return type == at::kBFloat16 && depth % 32 == 0 ? at::kBFloat16 : at::kFloat;
}

// The parameters of sequences [begin, end) of a call. Ragged tokens keep their numbers.
AttentionParams of_sequences(const AttentionParams& p, int32_t begin, int32_t end);

// The parameters of heads [first, first + count) of a call of one sequence, as sequences of one
// head each. Their lengths and, unless null, left paddings: `count` times those of the sequence.
// The cache is left to the caller.
AttentionParams heads_as_sequences(const AttentionParams& one, int32_t first, int32_t count,
                                   const int32_t* lengths, const int32_t* leftpads);

// What the expanded form computes in: bf16 for bf16 queries where the CPU has such products; else,
// and for fp16 queries, nothing coarser than f32.
const char* expanded_arithmetic(ScalarType q);

// The cheaper form of a sequence, by a model of the cost (form.cpp).
enum class Form : uint8_t { kAbsorbed, kExpanded };
Form cheaper_form(const AttentionParams& p, int32_t sequence, const Projections& w);

// Whether the absorbed form of so many query tokens reads the weight row by row (form.cpp).
bool streams_projections(int64_t tokens, ScalarType type);

// p: complete, with queries [.., H, P] and output [.., H, V] of type p.q_type.
void attend_absorbed(const AttentionParams& p, const Projections& w);
void attend_expanded(const AttentionParams& p, const Projections& w);

}  // namespace flashmla
