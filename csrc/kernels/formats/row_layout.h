// row_layout.h: how one token's row looks in the memory of an arithmetic, in a staged tile: [latent
// | rope | two f32 scales | values, if they are rows of their own].
#pragma once
#include <cstdint>

#include "kernels/call/params.h"

namespace flashmla {
namespace {

constexpr int kTile = 128;  // tokens per tile, at most
constexpr int kPage = 16;   // tokens whose rows are addressed by one pointer
constexpr int kCacheLine = 64;

[[gnu::always_inline]] constexpr inline int32_t round_up(int32_t n, int32_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct RowLayout {
  int32_t latent, rope;  // L and R, values
  int32_t groups[2];     // 32-bit words of the latent and of the rope segment
  int32_t value_width;   // values of a V row
  int32_t value;         // padded to whole interleaved vectors
  int32_t rope_offset;   // bytes from the start of a staged row
  int32_t scale_offset;  // bytes
  int32_t value_offset;  // bytes; 0: the values are the latent
  int32_t stride;  // bytes of a staged row: an odd number of cache lines, so that rows spread over
                   // the L1 sets
};

template <class Simd, class Arithmetic>
RowLayout row_layout(const CacheView& cache) {
  constexpr int kVector = Simd::kLanes * Arithmetic::kGroup;
  const int32_t latent = cache.latent, rope = cache.rope;
  RowLayout l;
  l.latent = latent;
  l.rope = rope;
  l.value_width = cache.value;
  l.groups[0] = round_up(latent, Arithmetic::kGroup) / Arithmetic::kGroup;
  l.groups[1] = round_up(rope, Arithmetic::kGroup) / Arithmetic::kGroup;
  l.value = round_up(l.value_width, kVector);
  // Codecs write whole steps: up to two blocks of 32, or a vector.
  constexpr int kStep = kVector > 64 ? kVector : 64;
  l.rope_offset = round_up(latent, kStep) * Arithmetic::kBytes;
  l.scale_offset = l.rope_offset + round_up(rope, kStep) * Arithmetic::kBytes;
  int32_t bytes = round_up(l.scale_offset + (Arithmetic::kScaled ? 8 : 0), kCacheLine);
  l.value_offset = cache.v.data ? bytes : 0;
  if (cache.v.data) bytes += round_up(l.value * Arithmetic::kBytes, kCacheLine);
  l.stride = (bytes / kCacheLine | 1) * kCacheLine;
  return l;
}

}  // namespace
}  // namespace flashmla
