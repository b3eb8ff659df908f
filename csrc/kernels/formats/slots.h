// slots.h: token of a sequence -> address of its rows in the cache.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/params.h"

namespace flashmla {
namespace {

struct RowAddress {
  const std::byte* kv_c;
  const std::byte* k_pe;
  const std::byte* v;  // null: the values are in kv_c
};

// The pages of one sequence.
class Slots {
 public:
  Slots(const CacheView& cache, int32_t sequence)
      : cache_(cache),
        pages_(cache.block_table ? cache.block_table + sequence * cache.block_table_stride
                                 : nullptr),
        sequence_(sequence),
        shift_(__builtin_popcount(static_cast<uint32_t>(cache.block_size)) == 1
                   ? __builtin_ctz(static_cast<uint32_t>(cache.block_size))
                   : -1) {}

  [[gnu::always_inline]] RowAddress operator[](int32_t token) const {
    int64_t block = sequence_;
    int32_t offset = token;
    if (pages_) {
      const int32_t page = shift_ >= 0 ? token >> shift_ : token / cache_.block_size;
      block = pages_[page];
      offset = token - page * cache_.block_size;
    }
    return {cache_.kv_c.data + block * cache_.kv_c.block_stride + offset * cache_.kv_c.token_stride,
            cache_.k_pe.data + block * cache_.k_pe.block_stride + offset * cache_.k_pe.token_stride,
            cache_.v.data + block * cache_.v.block_stride + offset * cache_.v.token_stride};
  }

  // Tokens [tokens * i, tokens * (i + 1)) are neighbours in memory, for every i.
  bool whole_pages(int32_t tokens) const { return !pages_ || cache_.block_size % tokens == 0; }

 private:
  const CacheView& cache_;
  const int32_t* pages_;
  int32_t sequence_;
  int32_t shift_;  // of a block size that is a power of two, else -1
};

}  // namespace
}  // namespace flashmla
