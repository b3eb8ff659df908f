// values.h: values of the ops' dtypes to and from f32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/formats/float.h"
#include "kernels/params.h"

namespace flashmla {
namespace {

// count values of `type`, then zeros up to `padded`.
template <class Simd>
void load_values(ScalarType type, const std::byte* from, int32_t count, int32_t padded, float* to) {
  switch (type) {
    case ScalarType::kF32:
      return widen_values<Simd, F32Element>(from, count, padded, to);
    case ScalarType::kBf16:
      return widen_values<Simd, Bf16Element>(from, count, padded, to);
    case ScalarType::kF16:
      return widen_values<Simd, F16Element>(from, count, padded, to);
  }
}

// count f32 values as `type`.
template <class Simd>
void store_values(ScalarType type, const float* from, int32_t count, std::byte* to) {
  int32_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    const auto x = Simd::load(from + i);
    switch (type) {
      case ScalarType::kF32:
        Simd::store(reinterpret_cast<float*>(to) + i, x);
        break;
      case ScalarType::kBf16:
        Simd::store_bf16(to + 2 * i, x);
        break;
      case ScalarType::kF16:
        Simd::store_f16(to + 2 * i, x);
        break;
    }
  }
  for (; i < count; ++i) {
    switch (type) {
      case ScalarType::kF32:
        reinterpret_cast<float*>(to)[i] = from[i];
        break;
      case ScalarType::kBf16:
        reinterpret_cast<uint16_t*>(to)[i] = float_to_bf16(from[i]);
        break;
      case ScalarType::kF16:
        reinterpret_cast<uint16_t*>(to)[i] = float_to_f16(from[i]);
        break;
    }
  }
}

}  // namespace
}  // namespace flashmla
