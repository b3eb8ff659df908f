// formats/float.h: rows of plain f32, bf16 or fp16 values, in one tensor or two.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/arithmetic_id.h"
#include "kernels/arithmetic/bf16.h"
#include "kernels/arithmetic/f32.h"
#include "kernels/arithmetic/numeric.h"
#include "kernels/call/params.h"
#include "kernels/formats/row_layout.h"

namespace flashmla {
namespace {

struct F32Element {
  using Storage = float;
  static constexpr const char* kName = "float32";
  static float widen(float x) { return x; }
  static float narrow(float x) { return x; }
  template <class Simd>
  static typename Simd::Float load(const float* p) {
    return Simd::load(p);
  }
};

struct Bf16Element {
  using Storage = uint16_t;
  static constexpr const char* kName = "bfloat16";
  static float widen(uint16_t x) { return bf16_to_float(x); }
  static uint16_t narrow(float x) { return float_to_bf16(x); }
  template <class Simd>
  static typename Simd::Float load(const uint16_t* p) {
    return Simd::load_bf16(p);
  }
};

struct F16Element {
  using Storage = uint16_t;
  static constexpr const char* kName = "float16";
  static float widen(uint16_t x) { return f16_to_float(x); }
  static uint16_t narrow(float x) { return float_to_f16(x); }
  template <class Simd>
  static typename Simd::Float load(const uint16_t* p) {
    return Simd::load_f16(p);
  }
};

// count values to f32, then zeros up to `padded`.
template <class Simd, class Element>
void widen_values(const std::byte* from, int32_t count, int32_t padded, float* to) {
  const auto* source = reinterpret_cast<const typename Element::Storage*>(from);
  int32_t i = 0;
  // Unrolled, or the speed of so short a loop depends on the address that it happens to get.
#pragma GCC unroll 4
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    Simd::store(to + i, Element::template load<Simd>(source + i));
  }
  for (; i < count; ++i) to[i] = Element::widen(source[i]);
  for (; i < padded; ++i) to[i] = 0;
}

template <class ElementType, CacheFormat kFormatId>
struct FloatFormat {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  static constexpr const char* kName = Element::kName;
  static constexpr CacheFormat kFormat = kFormatId;
  static constexpr bool kPacked = false;
  static constexpr int kMultiple = 1;
  // The arithmetic whose rows the cache rows already are.
  static constexpr ArithmeticId kNative = kFormat == CacheFormat::kF32    ? ArithmeticId::kF32
                                          : kFormat == CacheFormat::kBf16 ? ArithmeticId::kBf16
                                                                          : ArithmeticId::kNone;

  static int64_t row_bytes(int32_t latent, int32_t rope) {
    return (static_cast<int64_t>(latent) + rope) * static_cast<int64_t>(sizeof(Storage));
  }

  static void encode(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* kv_c,
                     std::byte* k_pe) {
    for (int32_t i = 0; i < l; ++i)
      reinterpret_cast<Storage*>(kv_c)[i] = Element::narrow(latent[i]);
    for (int32_t i = 0; i < r; ++i) reinterpret_cast<Storage*>(k_pe)[i] = Element::narrow(rope[i]);
  }

  static void decode(const std::byte* kv_c, const std::byte* k_pe, int32_t l, int32_t r,
                     float* latent, float* rope) {
    for (int32_t i = 0; i < l; ++i)
      latent[i] = Element::widen(reinterpret_cast<const Storage*>(kv_c)[i]);
    for (int32_t i = 0; i < r; ++i)
      rope[i] = Element::widen(reinterpret_cast<const Storage*>(k_pe)[i]);
  }

  // Never coarser than the query: bf16 arithmetic only when both sides are bf16.
  template <class Simd>
  static constexpr ArithmeticId arithmetic(ScalarType query) {
    const bool bf16 = Simd::kBf16Dot && kFormat == CacheFormat::kBf16 && query == ScalarType::kBf16;
    return bf16 ? ArithmeticId::kBf16 : ArithmeticId::kF32;
  }

  template <class Arithmetic>
  static void stage(Arithmetic a, const std::byte* kv_c, const std::byte* k_pe,
                    const RowLayout& layout, std::byte* row) {
    stage_segment(a, kv_c, layout.latent, layout.rope_offset, row);
    stage_segment(a, k_pe, layout.rope, 4 * layout.groups[1], row + layout.rope_offset);
  }

  template <class Arithmetic>
  static void stage_value(Arithmetic a, const std::byte* v, const RowLayout& layout,
                          std::byte* row) {
    stage_segment(a, v, layout.value_width, layout.value * Arithmetic::kBytes,
                  row + layout.value_offset);
  }

 private:
  // `count` values, then zeros up to `bytes` bytes.
  template <class Simd>
  static void stage_segment(F32<Simd>, const std::byte* from, int32_t count, int32_t bytes,
                            std::byte* to) {
    widen_values<Simd, Element>(from, count, bytes / 4, reinterpret_cast<float*>(to));
  }

  template <class Simd>
    requires(kFormat == CacheFormat::kBf16)
  static void stage_segment(Bf16<Simd>, const std::byte* from, int32_t count, int32_t bytes,
                            std::byte* to) {
    __builtin_memcpy(to, from, static_cast<size_t>(2 * count));
    __builtin_memset(to + 2 * count, 0, static_cast<size_t>(bytes - 2 * count));
  }
};

using F32Format = FloatFormat<F32Element, CacheFormat::kF32>;
using Bf16Format = FloatFormat<Bf16Element, CacheFormat::kBf16>;
using F16Format = FloatFormat<F16Element, CacheFormat::kF16>;

}  // namespace
}  // namespace flashmla
