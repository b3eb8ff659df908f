// kv_cache.cpp: the operators on the cache itself: write tokens, read rows back dequantised, copy
// blocks.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "kernels/call/driver.h"
#include "ops/cache_arguments.h"
#include "ops/checks.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

// [.., width] -> [tokens, width], rows contiguous. k_pe may have one more dimension of size 1, its
// head, at any place.
Tensor token_rows(const Tensor& t, const char* name, int64_t tokens) {
  TORCH_CHECK_VALUE(t.dim() >= 2, name, ": shape ", t.sizes(), ", expected [tokens, width]");
  const int64_t width = t.size(-1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  TORCH_CHECK_VALUE(rows == tokens, name, ": shape ", t.sizes(), " holds ", rows,
                    " tokens, expected ", tokens, " as in slot_mapping");
  const Tensor flat = t.reshape({tokens, width});
  return width > 1 && flat.stride(1) != 1 ? flat.contiguous() : flat;
}

}  // namespace

void concat_and_cache_mla(const Tensor& kv_c, const Tensor& k_pe, const Tensor& kv_cache,
                          const Tensor& slot_mapping, std::string_view kv_cache_dtype,
                          const OptionalTensor& k_pe_cache) {
  check_environment();
  check_tensor(slot_mapping, "slot_mapping");
  check_dtype(slot_mapping, "slot_mapping", at::kLong);
  check_tensor(kv_c, "kv_c");
  check_tensor(k_pe, "k_pe");
  AppendParams p = {};
  p.type = float_type(kv_c.scalar_type(), "kv_c");
  check_same_dtype(k_pe, "k_pe", kv_c, "kv_c");
  p.tokens = slot_mapping.numel();
  const Tensor latent = token_rows(kv_c, "kv_c", p.tokens);
  const Tensor rope = token_rows(k_pe, "k_pe", p.tokens);
  const Cache cache =
      check_cache(kv_cache, k_pe_cache, kv_cache_dtype, latent.size(1), rope.size(1));
  const Tensor slots = slot_mapping.contiguous();
  p.slot_mapping = slots.const_data_ptr<int64_t>();
  const int64_t end = cache.num_blocks * cache.view.block_size;
  for (int64_t i = 0; i < p.tokens; ++i) {
    TORCH_CHECK_INDEX(p.slot_mapping[i] >= -1 && p.slot_mapping[i] < end, "slot_mapping: slot ",
                      p.slot_mapping[i], " of token ", i, ", expected -1 (skip) to ", end - 1);
  }
  check_cache_writable(kv_cache, "kv_cache");
  if (k_pe_cache.has_value()) check_cache_writable(*k_pe_cache, "k_pe_cache");
  if (p.tokens == 0) return;
  p.kv_c = bytes(latent);
  p.kv_c_stride = latent.stride(0) * item_bytes(latent);
  p.k_pe = bytes(rope);
  p.k_pe_stride = rope.stride(0) * item_bytes(rope);
  p.cache = cache.view;
  append(p, torch_executor());
}

Tensor gather_cache(const Tensor& kv_cache, const OptionalTensor& block_table,
                    const Tensor& cache_seqlens, int64_t head_dim_v, int64_t head_dim,
                    at::ScalarType dtype, std::string_view kv_cache_dtype,
                    std::optional<int64_t> max_seqlen) {
  check_environment();
  GatherParams p = {};
  p.out_type = float_type(dtype, "dtype");
  Cache cache =
      check_cache(kv_cache, std::nullopt, kv_cache_dtype, head_dim_v, head_dim - head_dim_v);
  check_tensor(cache_seqlens, "cache_seqlens");
  check_rank(cache_seqlens, "cache_seqlens", 1, "[B]");
  p.batch = check_int32(cache_seqlens.size(0), "cache_seqlens.size(0)");
  const Sequences sequences = check_sequences(cache, block_table, cache_seqlens, p.batch);
  p.max_seqlen = max_seqlen.value_or(sequences.capacity);
  TORCH_CHECK_VALUE(p.max_seqlen >= 0, "max_seqlen: ", p.max_seqlen, ", expected 0 or more");
  const Tensor out = at::empty({p.batch, p.max_seqlen, head_dim}, kv_cache.options().dtype(dtype));
  if (out.numel() == 0) return out;
  p.cache = cache.view;
  p.cache_seqlens = sequences.cache_seqlens.const_data_ptr<int32_t>();
  p.out = static_cast<std::byte*>(out.mutable_data_ptr());
  gather(p, torch_executor());
  return out;
}

void copy_blocks(const Tensor& kv_cache, const Tensor& block_mapping) {
  check_tensor(kv_cache, "kv_cache");
  TORCH_CHECK_VALUE(kv_cache.dim() >= 2, "kv_cache: shape ", kv_cache.sizes(),
                    ", expected [num_blocks, block_size, row]");
  check_tensor(block_mapping, "block_mapping");
  check_dtype(block_mapping, "block_mapping", at::kLong);
  check_rank(block_mapping, "block_mapping", 2, "[pairs, 2]");
  check_shape(block_mapping, "block_mapping", {block_mapping.size(0), 2}, "[pairs, 2]");
  const Tensor mapping = block_mapping.contiguous();
  const int64_t* ids = mapping.const_data_ptr<int64_t>();
  const int64_t pairs = mapping.size(0);
  std::vector<int64_t> sources, targets;
  for (int64_t i = 0; i < 2 * pairs; ++i) {
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < kv_cache.size(0), "block_mapping[", i / 2, "][",
                      i % 2, "]: block ", ids[i], ", expected 0 to ", kv_cache.size(0) - 1);
    (i % 2 == 0 ? sources : targets).push_back(ids[i]);
  }
  // Copies may happen in any order, so their results must not depend on it.
  std::sort(sources.begin(), sources.end());
  std::sort(targets.begin(), targets.end());
  TORCH_CHECK_VALUE(std::adjacent_find(targets.begin(), targets.end()) == targets.end(),
                    "block_mapping: a block is the target of two copies");
  for (const int64_t target : targets) {
    TORCH_CHECK_VALUE(!std::binary_search(sources.begin(), sources.end(), target),
                      "block_mapping: block ", target, " is both a source and a target");
  }
  check_cache_writable(kv_cache, "kv_cache");
  for (int64_t i = 0; i < pairs; ++i) {
    kv_cache.select(0, ids[2 * i + 1]).copy_(kv_cache.select(0, ids[2 * i]));
  }
}

}  // namespace flashmla
