// attention_demo.h: what script_module.cpp and package.cpp have in common: they feed the layer that
// export.py saved, two sequences of five tokens at first and then one token at a time.
#pragma once
#include <ATen/ATen.h>
#include <torch_flash_mla/ops.h>

#include <cstdio>
#include <vector>

#include "paging.h"

namespace demo {

// The layer's sizes, as in export.py.
constexpr int64_t kHidden = 64, kLatent = 64, kRope = 32, kBlockSize = 16;
constexpr int64_t kSequences = 2;

// Values that every language makes alike: sin(0), sin(1), ...
inline at::Tensor numbers(at::IntArrayRef shape) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  return at::arange(count, at::kFloat).sin_().view(shape);
}

// Calls `layer` with the seven tensors of MLAAttention.forward: hidden_states, cos, sin, kv_cache,
// block_table, cache_seqlens, slot_mapping. Prints the first values of each result.
template <class Layer>
void run(const Layer& layer) {
  const at::Tensor hidden = numbers({kSequences, 9, kHidden});
  const at::Tensor frequency = at::pow(10000, at::arange(0, kRope, 2, at::kFloat) / -kRope);
  at::Tensor kv_cache =
      at::empty({8, kBlockSize, torch_flash_mla::row_bytes("q8_kv", kLatent, kRope)}, at::kByte);
  Paging paging(kSequences, /*max_blocks=*/2, /*num_blocks=*/8, kBlockSize);
  int64_t position = 0;
  for (const int64_t new_tokens : {5, 1, 1, 2}) {
    const at::Tensor slots = paging.reserve(new_tokens);
    const at::Tensor angle =
        at::arange(position, position + new_tokens, at::kFloat).view({1, -1, 1}) * frequency;
    const at::Tensor out = layer(std::vector<at::Tensor>{
        hidden.narrow(1, position, new_tokens).contiguous(), angle.cos(), angle.sin(), kv_cache,
        paging.block_table(), paging.cache_seqlens(), slots});
    position += new_tokens;
    std::printf("%2d tokens:", static_cast<int>(position));
    for (int64_t b = 0; b < kSequences; ++b) {
      for (int64_t i = 0; i < 3; ++i) std::printf(" %.6f", out[b][-1][i].item<float>());
    }
    std::printf("\n");
  }
}

}  // namespace demo
