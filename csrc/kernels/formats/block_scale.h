// formats/block_scale.h: what the formats with one fp16 scale per 32 values share.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/numeric.h"

namespace flashmla {
namespace {

constexpr int kBlock = 32;

[[maybe_unused]] inline float absolute_maximum(const float* x, int count) {
  float most = 0;
  for (int i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    if (!(magnitude <= most)) most = magnitude;  // NaN and infinity stay
    if (!(most < __builtin_inff())) return __builtin_nanf("");
  }
  return most;
}

// Nearest integer (ties to even) of a value known to be small.
[[maybe_unused]] inline int32_t round_to_int(float x) { return static_cast<int32_t>(__builtin_rintf(x)); }

[[maybe_unused]] inline int32_t clamp(int32_t x, int32_t low, int32_t high) {
  return x < low ? low : x > high ? high : x;
}

// The stored scale of a block whose largest code is `code_max`: finite unless the block is not. Codes are computed from the
// rounded scale, so that decoding divides by what encoding multiplied with.
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

// x * inverse, 0 where the block holds nothing finite.
[[maybe_unused]] inline float scaled(float x, float inverse) { return inverse > 0 ? x * inverse : 0; }

}  // namespace
}  // namespace flashmla
