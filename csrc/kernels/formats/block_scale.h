// formats/block_scale.h: what the formats with one fp16 scale per 32 values share.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/numeric.h"
#include "kernels/formats/row_layout.h"

namespace flashmla {
namespace {

constexpr int kBlock = 32;

// NaN if any value is not finite. Magnitudes are compared as integers, which order like floats and
// which compilers vectorise.
[[maybe_unused]] inline float absolute_maximum(const float* x, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    most = most > magnitude ? most : magnitude;
  }
  return most < 0x7f800000 ? bits_float(most) : __builtin_nanf("");
}

// Nearest integer (ties to even) within [low, high]; 0 where there is nothing finite to scale
// (inverse 0).
[[maybe_unused]] inline int32_t to_code(float x, float inverse, float low, float high) {
  float y = inverse > 0 ? x * inverse : 0;
  y = y < low ? low : y;
  y = y > high ? high : y;
  return static_cast<int32_t>(__builtin_rintf(y));
}

// The f32 scale of a segment of codes up to 127, from its largest magnitude: 127 times it must stay
// finite. 0 where there is nothing to scale, NaN for NaN.
[[maybe_unused]] inline float segment_scale(float most) {
  constexpr float kLargest = 0x1.020406p+121f;
  if (!(most > 1e-30f)) return most == most ? 0.0f : most;
  const float scale = most / 127.0f;
  return scale < kLargest ? scale : kLargest;
}

// What encoding multiplies a segment with: 127 / its largest magnitude, or 0.
[[maybe_unused]] inline float segment_inverse(float most) {
  return most > 1e-30f ? 127.0f / most : 0.0f;
}

// The stored scale of a block whose largest code is `code_max`: finite unless the block is not.
// Codes are computed from the rounded scale, so that decoding divides by what encoding multiplied
// with.
[[maybe_unused]] inline uint16_t block_scale(const float* x, float code_max) {
  const float scale = absolute_maximum(x, kBlock) / code_max;
  return float_to_f16(scale > 65504.0f ? 65504.0f : scale);
}

// 1 / scale, or 0 when there is nothing to scale (all zero, underflowed or not finite).
[[maybe_unused]] inline float inverse_scale(float scale) { return scale > 0 ? 1 / scale : 0; }

[[maybe_unused]] inline uint16_t load_u16(const std::byte* p) {
  uint16_t x;
  __builtin_memcpy(&x, p, 2);
  return x;
}

[[maybe_unused]] inline void store_u16(std::byte* p, uint16_t x) { __builtin_memcpy(p, &x, 2); }

// How codes with a scale per block become codes of one scale for the segment: the largest block
// scale times code_max becomes target_max.
struct Recoding {
  const std::byte* scales;  // fp16, of the blocks
  int32_t blocks;
  float scale;    // of the segment: NaN if that of a block is not finite
  float inverse;  // of a block scale: what its codes are multiplied with, in units of 1 / unit
};

template <class Simd>
Recoding recoding(const std::byte* scales, int32_t blocks, float code_max, float target_max,
                  float unit) {
  // Scales are not negative: fp16 orders as integers do, what is not finite last.
  uint32_t most = 0;
  int32_t b = 0;
  for (; b + 8 <= blocks; b += 8) {
    const uint32_t eight = Simd::largest_of_eight(scales + 2 * b);
    most = most > eight ? most : eight;
  }
  for (; b < blocks; ++b) {
    const uint32_t one = load_u16(scales + 2 * b);
    most = most > one ? most : one;
  }
  if (most >= 0x7c00) return {scales, blocks, __builtin_nanf(""), 0};
  const float scale = f16_to_float(static_cast<uint16_t>(most)) * (code_max / target_max);
  return {scales, blocks, scale, scale > 0 ? unit / scale : 0};
}

// Of both segments of a row.
struct RowRecoding {
  Recoding latent, rope;
};

[[maybe_unused]] inline void store_scales(const RowRecoding& r, const RowLayout& layout,
                                          std::byte* row) {
  const float scales[2] = {r.latent.scale, r.rope.scale};
  __builtin_memcpy(row + layout.scale_offset, scales, 8);
}

// Calls recode(b, factors) for every kStep-th block b: both halves of factors[i] are what the codes
// of block b + i are multiplied with. They are in memory, since loads can spread a word over a
// vector, and shuffles have enough to do.
template <class Simd, int kStep, class Recode>
[[gnu::always_inline]] inline void recode_blocks(const Recoding& r, Recode recode) {
  for (int32_t b0 = 0; b0 < r.blocks; b0 += Simd::kLanes) {
    const std::byte* from = r.scales + 2 * b0;
    const int32_t count = r.blocks - b0 < Simd::kLanes ? r.blocks - b0 : Simd::kLanes;
    const auto scales = count == Simd::kLanes ? Simd::load_f16(from) : Simd::load_f16(from, count);
    const auto word = Simd::round_to_word(Simd::mul(scales, Simd::set(r.inverse)));
    alignas(kCacheLine) int32_t factors[Simd::kLanes];
    Simd::store_word(factors, Simd::bit_or(word, Simd::template shift_left<16>(word)));
    for (int32_t i = 0; i < count; i += kStep) recode(b0 + i, factors + i);
  }
}

}  // namespace
}  // namespace flashmla
