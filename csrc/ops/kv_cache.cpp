// kv_cache.cpp: the operators on the cache itself: write tokens, read rows back dequantised, copy
// blocks.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "kernels/call/driver.h"
#include "ops/cache_arguments.h"
#include "ops/checks.h"
#include "ops/interrupt.h"
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

// The two tensors of a cache hold different cells: they lie apart, or are columns of the same rows.
void check_apart(const Tensor& kv_cache, const Tensor& k_pe_cache) {
  if (!may_overlap(kv_cache, k_pe_cache)) return;
  auto same = [&](int64_t d) { return kv_cache.stride(d) == k_pe_cache.stride(d); };
  const int64_t row = kv_cache.stride(1) * item_bytes(kv_cache);
  const int64_t apart = k_pe_cache.storage_offset() - kv_cache.storage_offset();
  const bool columns = kv_cache.is_alias_of(k_pe_cache) && same(0) && same(1) &&
                       kv_cache.stride(0) % std::max<int64_t>(kv_cache.stride(1), 1) == 0 &&
                       apart >= kv_cache.size(-1) &&
                       (apart + k_pe_cache.size(-1)) * item_bytes(kv_cache) <= row;
  TORCH_CHECK_VALUE(columns,
                    "k_pe_cache: shares memory with kv_cache, expected memory of its own or "
                    "other columns of the same rows");
}

}  // namespace

void concat_and_cache_mla(const Tensor& kv_c, const Tensor& k_pe, const Tensor& kv_cache,
                          const Tensor& slot_mapping, std::string_view kv_cache_dtype,
                          const OptionalTensor& k_pe_cache) {
  check_environment();
  check_tensor(slot_mapping, "slot_mapping", kAnyAddress);
  check_dtype(slot_mapping, "slot_mapping", at::kLong);
  check_tensor(kv_c, "kv_c");
  check_tensor(k_pe, "k_pe");
  AppendParams p = {};
  p.type = float_type(kv_c.scalar_type(), "kv_c");
  check_same_dtype(k_pe, "k_pe", kv_c, "kv_c");
  p.tokens = slot_mapping.numel();
  const Tensor latent = token_rows(kv_c, "kv_c", p.tokens);
  const Tensor rope = token_rows(k_pe, "k_pe", p.tokens);
  Cache cache = check_cache(kv_cache, k_pe_cache, kv_cache_dtype, latent.size(1), rope.size(1),
                            {"kv_c.size(-1)", "k_pe.size(-1)"});
  const std::vector<int64_t> slots = copied<int64_t>(slot_mapping.reshape(-1));
  p.slot_mapping = slots.data();
  const int64_t end = cache.num_blocks * cache.view.block_size;
  for (int64_t i = 0; i < p.tokens; ++i) {
    TORCH_CHECK_INDEX(p.slot_mapping[i] >= -1 && p.slot_mapping[i] < end, "slot_mapping: slot ",
                      p.slot_mapping[i], " of token ", i, ", expected -1 (skip) to ", end - 1);
  }
  check_cache_writable(kv_cache, "kv_cache");
  if (k_pe_cache.has_value()) {
    check_cache_writable(*k_pe_cache, "k_pe_cache");
    check_apart(kv_cache, *k_pe_cache);
  }
  if (p.tokens == 0) return;
  // Rows that lie in the cache itself are read before any is written.
  auto source = [&](const Tensor& rows) {
    const bool inside =
        may_overlap(rows, kv_cache) || (k_pe_cache.has_value() && may_overlap(rows, *k_pe_cache));
    return inside ? rows.clone(at::MemoryFormat::Contiguous) : rows;
  };
  const Tensor kv_c_rows = source(latent), k_pe_rows = source(rope);
  p.kv_c = bytes(kv_c_rows);
  p.kv_c_stride = kv_c_rows.stride(0) * item_bytes(kv_c_rows);
  p.k_pe = bytes(k_pe_rows);
  p.k_pe_stride = k_pe_rows.stride(0) * item_bytes(k_pe_rows);
  const int64_t rope_offset = cache.view.k_pe.data - cache.view.kv_c.data;
  cache.view.kv_c.data = written_bytes(kv_cache);
  cache.view.k_pe.data =
      k_pe_cache.has_value() ? written_bytes(*k_pe_cache) : cache.view.kv_c.data + rope_offset;
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
  Cache cache = check_cache(kv_cache, std::nullopt, kv_cache_dtype, head_dim_v,
                            head_dim - head_dim_v, {"head_dim_v", "head_dim - head_dim_v"});
  check_tensor(cache_seqlens, "cache_seqlens");
  check_rank(cache_seqlens, "cache_seqlens", 1, "[B]");
  p.batch = check_int32(cache_seqlens.size(0), "cache_seqlens.size(0)");
  const Sequences sequences = check_sequences(cache, block_table, cache_seqlens, p.batch);
  p.max_seqlen = max_seqlen.value_or(sequences.capacity);
  TORCH_CHECK_VALUE(p.max_seqlen >= 0, "max_seqlen: ", p.max_seqlen, ", expected 0 or more");
  const Tensor out = uninitialised({p.batch, p.max_seqlen, head_dim}, dtype, "out");
  if (out.numel() == 0) return out;
  p.cache = cache.view;
  p.cache_seqlens = sequences.cache_seqlens.data();
  p.out = static_cast<std::byte*>(out.mutable_data_ptr());
  const InterruptibleCall interruptible;
  gather(p, torch_executor());
  InterruptibleCall::finish({out});
  return out;
}

void copy_blocks(const Tensor& kv_cache, const Tensor& block_mapping) {
  check_tensor(kv_cache, "kv_cache");
  TORCH_CHECK_VALUE(kv_cache.dim() >= 2, "kv_cache: shape ", kv_cache.sizes(),
                    ", expected [num_blocks, block_size, row]");
  check_tensor(block_mapping, "block_mapping", kAnyAddress);
  check_dtype(block_mapping, "block_mapping", at::kLong);
  check_rank(block_mapping, "block_mapping", 2, "[pairs, 2]");
  check_shape(block_mapping, "block_mapping", {block_mapping.size(0), 2}, "[pairs, 2]");
  const std::vector<int64_t> ids = copied<int64_t>(block_mapping.reshape(-1));
  const int64_t pairs = block_mapping.size(0);
  std::vector<int64_t> sources, targets;
  for (size_t i = 0; i < ids.size(); ++i) {
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
  if (pairs == 0 || kv_cache.numel() == 0) return;
  // Plain tensors of the same memory: nothing that torch keeps of the cache's history can refuse a
  // copy when others are made.
  std::byte* data = written_bytes(kv_cache);
  const int64_t block_bytes = kv_cache.stride(0) * item_bytes(kv_cache);
  const at::AutoDispatchBelowADInplaceOrView plain;
  auto block = [&](int64_t id) {
    return at::from_blob(data + id * block_bytes, kv_cache.sizes().slice(1),
                         kv_cache.strides().slice(1), kv_cache.options());
  };
  for (size_t i = 0; i < ids.size(); i += 2) block(ids[i + 1]).copy_(block(ids[i]));
}

}  // namespace flashmla
