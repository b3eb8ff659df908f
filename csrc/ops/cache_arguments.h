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

// What the widths of a cache's rows follow from, in the words of the operator's caller.
struct WidthNames {
  const char* latent;
  const char* rope;
};

// kv_cache [num_blocks, block_size, (1,) row] and k_pe_cache (float formats: the rope columns
// apart) for rows of latent + rope values. kv_cache_dtype is one of formats.h, or "auto": the
// tensor's own float dtype.
Cache check_cache(const Tensor& kv_cache, const OptionalTensor& k_pe_cache,
                  std::string_view kv_cache_dtype, int64_t latent, int64_t rope, WidthNames names);

// A cache that will be written: no two cells may share memory, and no gradient is expected.
void check_cache_writable(const Tensor& cache, const char* name);

// Its memory, to write to: a lazy copy becomes one of its own, and autograd learns that the
// contents change. When all checks have passed.
std::byte* written_bytes(const Tensor& cache);

// Whether the memory of two tensors may be the same.
bool may_overlap(const Tensor& a, const Tensor& b);

// The sequences in a cache: what the tensors held when they were checked.
struct Sequences {
  std::vector<int32_t> cache_seqlens;  // [B]
  std::vector<int32_t> block_table;    // [B, columns in use]
  int64_t capacity;                    // tokens a sequence can have
  int32_t longest;                     // the largest of cache_seqlens
};

// Checks lengths and the block ids they use (the entries behind them may hold anything), and puts
// the table into the view. The vectors keep their memory when the struct is moved.
Sequences check_sequences(Cache& cache, const OptionalTensor& block_table,
                          const Tensor& cache_seqlens, int64_t batch);

}  // namespace flashmla
