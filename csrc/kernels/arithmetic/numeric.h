// numeric.h: scalar conversions between f32 and the 16-bit storage types, round to nearest even,
// without any instruction set.
#pragma once
#include <cstdint>

namespace flashmla {
namespace {

[[maybe_unused, gnu::always_inline]] inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

[[maybe_unused, gnu::always_inline]] inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

[[maybe_unused]] inline float bf16_to_float(uint16_t x) {
  return bits_float(static_cast<uint32_t>(x) << 16);
}

[[maybe_unused]] inline uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

[[maybe_unused]] inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product also normalises subnormals,
  // exactly.
  const float x = bits_float(magnitude << 13) * 0x1p112f;
  return bits_float(sign | float_bits(x));
}

[[maybe_unused]] inline uint16_t float_to_f16(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded code in the low bits
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign |
                               ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

}  // namespace
}  // namespace flashmla
