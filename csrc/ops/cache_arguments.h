// cache_arguments.h: cache tensors, block tables and lengths, checked, as the kernels' CacheView.
// Every operator that touches a cache comes through here.
#pragma once
#include <string_view>

#include "kernels/call/params.h"
#include "ops/ops.h"

namespace flashmla {

// A cache after its tensors were checked: the view, and what the view itself does not need to know.
struct Cache {
  CacheView view;
  int64_t num_blocks;
};

// kv_cache [num_blocks, block_size, (1,) row] and k_pe_cache (float formats: the rope columns
// apart) for rows of latent + rope values. kv_cache_dtype is one of formats.h, or "auto": the
// tensor's own float dtype.
Cache check_cache(const Tensor& kv_cache, const OptionalTensor& k_pe_cache,
                  std::string_view kv_cache_dtype, int64_t latent, int64_t rope);

// A cache that will be written: no two cells may share memory. Tells autograd that its contents
// change.
void check_cache_writable(const Tensor& cache, const char* name);

// The sequences in a cache. Holds copies of tensors that were not contiguous.
struct Sequences {
  Tensor cache_seqlens;  // int32 [B]
  Tensor block_table;    // int32 [B, max_blocks], or undefined
  int64_t capacity;      // tokens a sequence can have
  int32_t longest;       // the largest of cache_seqlens
};

// Checks lengths and the block ids they use (the entries behind them may hold anything), and puts
// the table into the view.
Sequences check_sequences(Cache& cache, const OptionalTensor& block_table,
                          const Tensor& cache_seqlens, int64_t batch);

}  // namespace flashmla
