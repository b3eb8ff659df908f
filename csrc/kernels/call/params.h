// The room call/: what comes in (params.h), which keys a query sees, who does what (plan.h), how a
// call runs (driver.h) and what a level must offer (kernel_table.h). May include arithmetic/.
//
// params.h: the plain structs that carry a call from the ops to the kernels. Pointers, strides in
// bytes, no tensors.
//
//   ops (tensors, checks)  ->  params.h  ->  driver.h (plan, threads)  ->  kernel_table.h (one
//   instruction set)
//
// Everything here is checked by the ops before a kernel sees it: kernels trust it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashmla {

// 32 bits, like all enums here: kernels and operators may come from different compilers, and those
// disagree on who widens a narrower argument.
enum class ScalarType : int32_t { kF32, kBf16, kF16 };

[[gnu::always_inline]] constexpr inline int64_t size_of(ScalarType type) {
  return type == ScalarType::kF32 ? 4 : 2;
}

enum class MaskType : int32_t { kNone, kBool, kF32, kBf16, kF16 };

// How a row of the cache is stored. The list with names and sizes is formats.h.
enum class CacheFormat : int32_t { kF32, kBf16, kF16, kQ8Kv, kQ8_0, kQ6_0, kQ4Kv };

// A paged cache tensor: token t of block b starts at data + b * block_stride + t * token_stride.
struct PagedRows {
  std::byte* data;       // [num_blocks, block_size, row]
  int64_t block_stride;  // bytes
  int64_t token_stride;  // bytes
};

// Queries (or outputs): element row (b, s, h) starts at data + b * stride[0] + s * stride[1] + h *
// stride[2]. Ragged: s counts the tokens of all sequences, and stride[0] is 0.
struct QueryRows {
  std::byte* data;    // [B, Sq, H, width]
  int64_t stride[3];  // bytes
};

// The cache as attention sees it. Float formats: kv_c rows hold L values, k_pe rows hold R values
// (in the one-tensor form k_pe.data is kv_c.data plus L elements, with the same strides). Packed
// formats: kv_c rows hold everything, k_pe is unused.
//
// Values are the first columns of kv_c; or, float formats only, rows of their own.
struct CacheView {
  CacheFormat format;
  int32_t latent;  // L, values
  int32_t rope;    // R, values
  int32_t value;   // values of a value row: L, or the width of `v`
  PagedRows kv_c;
  PagedRows k_pe;
  PagedRows v;                 // data null: values are in kv_c
  int32_t block_size;          // tokens per block
  const int32_t* block_table;  // [B, block_table_stride]; null: sequence b is block b
  int64_t block_table_stride;  // entries
};

// Queries of D = L + R values against rows of as many.
//
// Absorbed: one call, rows of the cache. Expanded (mla_attention_kv_b): a call per sequence and
// group of heads, where "sequence" stands for a head, kv_c and v for its keys and values, and k_pe,
// the same for all heads, has block stride 0.
struct AttentionParams {
  int32_t batch;                // B
  int32_t q_len;                // Sq; ragged: of the longest sequence
  int32_t heads;                // H
  const int32_t* cu_seqlens_q;  // [B + 1]: sequence b has query tokens [cu[b], cu[b + 1]); or null
  ScalarType q_type;            // of the caller's queries: of q_pe, and what the arithmetic follows
  ScalarType q_main_type;       // of q: q_type, or f32 where a projection made them
  ScalarType out_type;
  QueryRows q;     // [B, Sq, H, L]
  QueryRows q_pe;  // [B, Sq, H, R]
  CacheView cache;
  const int32_t* cache_seqlens;  // [B], including the new tokens
  float softmax_scale;

  // Which keys a row sees: all of these combine by AND.
  // Positions outside take no part (a call over a part of the keys).
  int32_t key_begin = 0, key_end = INT32_MAX;
  bool causal;                   // bottom-right aligned
  int32_t window;                // > 0: the last `window` keys only
  const int32_t* cache_leftpad;  // [B] or null
  MaskType mask_type;
  const std::byte* mask;         // [B, H, Sq, S], columns contiguous, or null
  int64_t mask_stride[3];        // bytes, of B, H, Sq (0: broadcast)
  const int32_t* key_ranges;     // [B, Sq, 2]: keys [first, limit) of each query token; or null
  int64_t key_ranges_stride[2];  // entries, of B, Sq

  const int32_t*
      indices;  // [B, Sq, topk]: the positions a query token may see, others are skipped; or null
  int64_t indices_stride[2];  // entries, of B, Sq
  int32_t topk;
  const int32_t* topk_length;  // [B]: leading entries of each list that count; or null

  const float* attn_sink;       // [H] or null
  int64_t attn_sink_stride[2];  // elements, of B, H

  QueryRows out;          // [B, Sq, H, value], out_type
  float* lse;             // [B, H, Sq]: natural logarithm, without the sink
  int64_t lse_stride[3];  // elements, of B, H, Sq

  bool deterministic;  // key splits depend on one sequence alone, never on threads or batch mates
};

// One half of an up-projection of the latent: the rows of each head, as the caller has them.
struct WeightRows {
  const std::byte* data;  // [H, rows, L]
  int64_t stride[3];      // bytes, of head, row and value
};

// The projections around absorbed attention, for few query tokens: q_latent = q W_UK and
// out = out_latent W_UV^T. Token i is query token i % q_len of sequence i / q_len. The latent rows
// are f32, those of a head are neighbours, and the caller lends their memory.
struct ProjectionParams {
  ScalarType type;  // of queries, weights and results
  int32_t heads, tokens, q_len;
  int32_t nope, latent, value;  // P, L, V
  WeightRows uk;                // [H, P, L]
  WeightRows uv;                // [H, V, L]
  QueryRows q;                  // [B, Sq, H, P]
  QueryRows out;                // [B, Sq, H, V]
  float* q_latent;              // [H, tokens, latent_row]
  float* out_latent;            // [H, tokens, latent_row]
  int32_t latent_row;           // floats from a row to the next
};

// Keys or values of heads from rows of the latent: out[h][t] = weight[h] rows[t]. All of one type:
// f32, or bf16 where the level multiplies it.
struct ExpansionParams {
  ScalarType type;
  int32_t heads, width;  // H, and the values of a result
  int32_t latent;        // L, whole words
  int32_t tokens;
  const std::byte* rows;  // [tokens, L]; memory goes on to a multiple of kExpandedTokens
  int64_t row_stride;     // bytes
  WeightRows weight;      // [H, width, L], values are neighbours
  std::byte* out;         // [H, tokens, width]
  int64_t out_head_stride, out_token_stride;  // bytes
};
constexpr int32_t kExpandedTokens = 128;

// Writes tokens into the cache. Token i goes to slot slot_mapping[i] = block * block_size + offset;
// -1 skips it.
struct AppendParams {
  int64_t tokens;
  ScalarType type;              // of kv_c and k_pe
  const std::byte* kv_c;        // [tokens, L]
  int64_t kv_c_stride;          // bytes
  const std::byte* k_pe;        // [tokens, R]
  int64_t k_pe_stride;          // bytes
  const int64_t* slot_mapping;  // [tokens]
  CacheView cache;              // block_table unused
};

// Dequantises rows of the cache into a dense tensor, zero beyond each length.
struct GatherParams {
  int32_t batch;
  int64_t max_seqlen;  // N: rows written per sequence
  int64_t begin;       // position of the first
  CacheView cache;
  const int32_t* cache_seqlens;  // [B]
  ScalarType out_type;
  std::byte* out;  // [B, N, L + R], contiguous
};

// Combines two partial results of the same queries by their log-sum-exp; the sink, if any, joins
// here.
struct MergeParams {
  int32_t batch;
  int32_t q_len;
  int32_t heads;
  int32_t width;    // values per row
  ScalarType type;  // of out_a and out_b
  ScalarType out_type;
  QueryRows out_a;          // [B, Sq, H, width]
  QueryRows out_b;          // [B, Sq, H, width]
  QueryRows out;            // [B, Sq, H, width]; may be out_a, as lse may be lse_a
  const float* lse_a;       // [B, H, Sq]
  const float* lse_b;       // [B, H, Sq]
  float* lse;               // [B, H, Sq]
  int64_t lse_a_stride[3];  // elements
  int64_t lse_b_stride[3];
  int64_t lse_stride[3];
  const float* attn_sink;  // [H] or null
};

}  // namespace flashmla
