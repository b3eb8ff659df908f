// paging.h: what the caller of a paged cache keeps: which blocks belong to which sequence, and how
// long each is. The same for every layer of a model; torch_flash_mla.PagedLatentCache in Python.
#pragma once
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <vector>

class Paging {
 public:
  // Room for `sequences` of up to `max_blocks` blocks each, in pools of `num_blocks` blocks.
  Paging(int64_t sequences, int64_t max_blocks, int64_t num_blocks, int64_t block_size)
      : block_table_(at::full({sequences, max_blocks}, -1, at::kInt)),
        cache_seqlens_(at::full({sequences}, 0, at::kInt)),
        block_size_(block_size) {
    // The last blocks first: that a sequence's blocks need not be in order should show.
    for (int64_t block = 0; block < num_blocks; ++block) free_.push_back(static_cast<int>(block));
  }

  // Makes each sequence longer by `new_tokens`, taking free blocks as needed.
  // Returns int64 [sequences, new_tokens]: the slot of each token, block * block_size + offset.
  at::Tensor reserve(int64_t new_tokens) {
    const int64_t sequences = block_table_.size(0);
    at::Tensor slots = at::empty({sequences, new_tokens}, at::kLong);
    auto table = block_table_.accessor<int, 2>();
    auto lengths = cache_seqlens_.accessor<int, 1>();
    auto slot = slots.accessor<int64_t, 2>();
    for (int64_t b = 0; b < sequences; ++b) {
      for (int64_t t = 0; t < new_tokens; ++t) {
        const int64_t position = lengths[b]++;
        const int64_t column = position / block_size_;
        TORCH_CHECK(column < table.size(1), "sequence ", b, " is full");
        if (table[b][column] < 0) {
          TORCH_CHECK(!free_.empty(), "no block is free");
          table[b][column] = free_.back();
          free_.pop_back();
        }
        slot[b][t] = table[b][column] * block_size_ + position % block_size_;
      }
    }
    return slots;
  }

  const at::Tensor& block_table() const { return block_table_; }      // int32 [B, max_blocks]
  const at::Tensor& cache_seqlens() const { return cache_seqlens_; }  // int32 [B]

 private:
  at::Tensor block_table_;
  at::Tensor cache_seqlens_;
  int64_t block_size_;
  std::vector<int> free_;
};
