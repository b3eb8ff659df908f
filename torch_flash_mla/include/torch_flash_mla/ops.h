// ops.h: the operators of torch_flash_mla as typed C++ functions, for programs without Python.
//
// Header-only: each function looks its operator up in torch's dispatcher, so it is what
// torch_flash_mla/ops.py is in Python, whose docstrings hold here too. The operators come from
// torch_flash_mla/_C_torch<series>.so: link the CMake target torch_flash_mla::torch_flash_mla,
// which takes the one for the torch that CMake found, or dlopen the file.
//
// Errors are the exceptions of torch: c10::ValueError, c10::TypeError, c10::IndexError,
// c10::NotImplementedError, all of them c10::Error, with a message that names the argument.
// Gradients need Python: the backward pass is registered by the Python package.
//
// Notation: B sequences, Sq query tokens each, H heads, L = kv_lora_rank, R = qk_rope_head_dim,
// P = qk_nope_head_dim, V = v_head_dim, D = L + R.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace torch_flash_mla {

using at::Tensor;

// Which keys a query sees, and how they are stored. Made to be written on the spot:
// {.causal = true, .kv_cache_dtype = "q8_kv"}.
struct AttentionOptions {
  // Query s sees the keys before position length - Sq + s + 1 (bottom-right aligned).
  bool causal = false;
  // bool (true: keep) or float (added), broadcastable to [B, H, Sq, S], S >= max(cache_seqlens).
  std::optional<Tensor> attn_mask = std::nullopt;
  std::optional<Tensor> cache_leftpad = std::nullopt;  // int32 [B], leading keys that nobody sees
  std::optional<Tensor> indices = std::nullopt;       // int32 [B, Sq, topk], the keys each one sees
  std::optional<Tensor> topk_length = std::nullopt;   // int32 [B], how many of the indices count
  std::optional<Tensor> attn_sink = std::nullopt;     // float32 [H], joins the softmax sum
  std::optional<Tensor> q_pe = std::nullopt;          // [B, Sq, H, R], if q lacks the rope part
  std::optional<Tensor> k_pe_cache = std::nullopt;    // [num_blocks, block_size, R], likewise
  int64_t window = 0;                                 // above 0: the last keys only
  std::string_view kv_cache_dtype = "auto";           // or q8_kv, q8_0, q6_0, q4_kv
  std::optional<Tensor> cu_seqlens_q = std::nullopt;  // int32 [B + 1], queries of ragged length
};

namespace detail {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  const auto handle = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(
      handle.has_value(), name,
      " is not registered: the library of torch_flash_mla, _C_torch*.so, is not loaded. Link the "
      "CMake target torch_flash_mla::torch_flash_mla, or dlopen the file before the first call");
  return handle->typed<Signature>();
}

}  // namespace detail

// Attention of absorbed queries against the latent cache.
//   q              [B, Sq, H, D] as [latent | rope], or [B, Sq, H, L] with q_pe
//   kv_cache       [num_blocks, block_size, D] or uint8 [num_blocks, block_size, row_bytes(..)]
//   block_table    int32 [B, max_blocks]; none: block i is sequence i
//   cache_seqlens  int32 [B], the new tokens included
//   head_dim_v     L
// Returns out [B, Sq, H, L] in q's dtype and lse float32 [B, H, Sq].
inline std::tuple<Tensor, Tensor> mla_attention(const Tensor& q, const Tensor& kv_cache,
                                                const std::optional<Tensor>& block_table,
                                                const Tensor& cache_seqlens, int64_t head_dim_v,
                                                double softmax_scale,
                                                const AttentionOptions& options = {}) {
  using O = const std::optional<Tensor>&;
  static const auto op = detail::find<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, O, const Tensor&, int64_t, double, bool, O, O, O, O, O, O, O,
      int64_t, std::string_view, O)>("flashmla::mla_attention");
  return op.call(q, kv_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, options.causal,
                 options.attn_mask, options.cache_leftpad, options.indices, options.topk_length,
                 options.attn_sink, options.q_pe, options.k_pe_cache, options.window,
                 options.kv_cache_dtype, options.cu_seqlens_q);
}

// Attention of queries as the model makes them.
//   q           [B, Sq, H, P + R], or [B, Sq, H, P] with q_pe
//   w_kv_b      [H, P + V, L], kv_b_proj's weight
//   head_dim_v  V
//   form        auto, absorbed or expanded
// Returns out [B, Sq, H, V] in q's dtype and lse float32 [B, H, Sq].
inline std::tuple<Tensor, Tensor> mla_attention_kv_b(
    const Tensor& q, const Tensor& kv_cache, const std::optional<Tensor>& block_table,
    const Tensor& cache_seqlens, const Tensor& w_kv_b, int64_t head_dim_v, double softmax_scale,
    const AttentionOptions& options = {}, std::string_view form = "auto") {
  using O = const std::optional<Tensor>&;
  static const auto op = detail::find<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, O, const Tensor&, const Tensor&, int64_t, double, bool, O, O, O,
      O, O, O, O, int64_t, std::string_view, O, std::string_view)>("flashmla::mla_attention_kv_b");
  return op.call(q, kv_cache, block_table, cache_seqlens, w_kv_b, head_dim_v, softmax_scale,
                 options.causal, options.attn_mask, options.cache_leftpad, options.indices,
                 options.topk_length, options.attn_sink, options.q_pe, options.k_pe_cache,
                 options.window, options.kv_cache_dtype, options.cu_seqlens_q, form);
}

// Writes tokens into the cache, in its format.
//   kv_c          [.., L], the normed latent
//   k_pe          [.., R], the rotated key, same dtype
//   kv_cache      written to, as is k_pe_cache
//   slot_mapping  int64, one per token: block * block_size + offset, -1 skips the token
inline void concat_and_cache_mla(const Tensor& kv_c, const Tensor& k_pe, const Tensor& kv_cache,
                                 const Tensor& slot_mapping,
                                 std::string_view kv_cache_dtype = "auto",
                                 const std::optional<Tensor>& k_pe_cache = std::nullopt) {
  static const auto op =
      detail::find<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        std::string_view, const std::optional<Tensor>&)>(
          "flashmla::concat_and_cache_mla");
  op.call(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_pe_cache);
}

// The rows of each sequence, dequantised and in order: [B, N, head_dim], zero beyond each length;
// N is max_seqlen, else max_blocks * block_size.
inline Tensor gather_cache(const Tensor& kv_cache, const std::optional<Tensor>& block_table,
                           const Tensor& cache_seqlens, int64_t head_dim_v, int64_t head_dim,
                           at::ScalarType dtype, std::string_view kv_cache_dtype = "auto",
                           std::optional<int64_t> max_seqlen = std::nullopt) {
  static const auto op =
      detail::find<Tensor(const Tensor&, const std::optional<Tensor>&, const Tensor&, int64_t,
                          int64_t, at::ScalarType, std::string_view, std::optional<int64_t>)>(
          "flashmla::gather_cache");
  return op.call(kv_cache, block_table, cache_seqlens, head_dim_v, head_dim, dtype, kv_cache_dtype,
                 max_seqlen);
}

// Copies blocks inside one cache. block_mapping: int64 [pairs, 2], (source, target).
inline void copy_blocks(const Tensor& kv_cache, const Tensor& block_mapping) {
  static const auto op = detail::find<void(const Tensor&, const Tensor&)>("flashmla::copy_blocks");
  op.call(kv_cache, block_mapping);
}

// Attention over two sets of keys from the results over each: out [B, Sq, H, width], lse
// [B, H, Sq].
inline std::tuple<Tensor, Tensor> merge_attn_states(
    const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
    const std::optional<Tensor>& attn_sink = std::nullopt) {
  static const auto op = detail::find<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&)>(
      "flashmla::merge_attn_states");
  return op.call(out_a, lse_a, out_b, lse_b, attn_sink);
}

// Bytes of one token in a packed format, the last dimension of its uint8 cache.
inline int64_t row_bytes(std::string_view kv_cache_dtype, int64_t latent_dim, int64_t rope_dim) {
  static const auto op =
      detail::find<int64_t(std::string_view, int64_t, int64_t)>("flashmla::_row_bytes");
  return op.call(kv_cache_dtype, latent_dim, rope_dim);
}

// The instruction set in use, the ones this machine can run, and a way to force one ("": the best).
inline std::string cpu_isa() {
  static const auto op = detail::find<std::string()>("flashmla::_isa");
  return op.call();
}
inline std::vector<std::string> available_isas() {
  static const auto op = detail::find<std::vector<std::string>()>("flashmla::_isas");
  return op.call();
}
inline void force_isa(std::string_view name) {
  static const auto op = detail::find<void(std::string_view)>("flashmla::_force_isa");
  op.call(name);
}

}  // namespace torch_flash_mla
