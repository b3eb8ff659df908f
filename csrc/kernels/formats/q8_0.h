// formats/q8_0.h: 8-bit codes with one fp16 scale per 32 values: [D int8 codes | D / 32 scales].
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/bf16.h"
#include "kernels/arithmetic/f32.h"
#include "kernels/arithmetic/int16.h"
#include "kernels/arithmetic_id.h"
#include "kernels/formats/block_scale.h"
#include "kernels/params.h"
#include "kernels/row_layout.h"

namespace flashmla {
namespace {

struct Q8_0 {
  static constexpr const char* kName = "q8_0";
  static constexpr CacheFormat kFormat = CacheFormat::kQ8_0;
  static constexpr bool kPacked = true;
  static constexpr int kMultiple = kBlock;
  static constexpr ArithmeticId kNative = ArithmeticId::kNone;

  static int64_t row_bytes(int32_t latent, int32_t rope) {
    const int64_t d = static_cast<int64_t>(latent) + rope;
    return d + d / kBlock * 2;
  }

  static void encode_blocks(const float* x, int32_t count, std::byte* codes, std::byte* scales) {
    for (int32_t b = 0; b < count; b += kBlock) {
      const uint16_t scale = block_scale(x + b, 127.0f);
      const float inverse = inverse_scale(f16_to_float(scale));
      for (int32_t i = b; i < b + kBlock; ++i) {
        codes[i] = static_cast<std::byte>(to_code(x[i], inverse, -127, 127));
      }
      store_u16(scales + b / kBlock * 2, scale);
    }
  }

  static void encode(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* row,
                     std::byte*) {
    std::byte* scales = row + l + r;
    encode_blocks(latent, l, row, scales);
    encode_blocks(rope, r, row + l, scales + l / kBlock * 2);
  }

  static void decode_blocks(const std::byte* codes, const std::byte* scales, int32_t count,
                            float* x) {
    for (int32_t i = 0; i < count; ++i) {
      x[i] = static_cast<float>(static_cast<int8_t>(codes[i])) *
             f16_to_float(load_u16(scales + i / kBlock * 2));
    }
  }

  static void decode(const std::byte* row, const std::byte*, int32_t l, int32_t r, float* latent,
                     float* rope) {
    const std::byte* scales = row + l + r;
    decode_blocks(row, scales, l, latent);
    decode_blocks(row + l, scales + l / kBlock * 2, r, rope);
  }

  // bf16 is the faster of the two, and exact enough where the query is bf16 already.
  template <class Simd>
  static constexpr ArithmeticId arithmetic(ScalarType query) {
    if (Simd::kBf16Dot && query == ScalarType::kBf16) return ArithmeticId::kBf16;
    return Simd::kInt16Dot ? ArithmeticId::kInt16 : ArithmeticId::kF32;
  }

  // Float arithmetics take the same values: code * scale, stored as their elements are.
  template <class Arithmetic>
    requires(!Arithmetic::kScaled)
  static void stage(Arithmetic, const std::byte* codes, const std::byte*, const RowLayout& layout,
                    std::byte* row) {
    const std::byte* scales = codes + layout.latent + layout.rope;
    widen<Arithmetic>(codes, scales, layout.latent, row);
    __builtin_memset(row + layout.latent * Arithmetic::kBytes, 0,
                     (layout.value - layout.latent) * Arithmetic::kBytes);
    widen<Arithmetic>(codes + layout.latent, scales + layout.latent / kBlock * 2, layout.rope,
                      row + layout.rope_offset);
  }

  // Block scales become one scale per segment.
  template <class Simd>
  static void stage(Int16<Simd>, const std::byte* codes, const std::byte*, const RowLayout& layout,
                    std::byte* row) {
    const std::byte* scales = codes + layout.latent + layout.rope;
    const float to_scales[2] = {
        recode<Simd>(codes, scales, layout.latent, row),
        recode<Simd>(codes + layout.latent, scales + layout.latent / kBlock * 2, layout.rope,
                     row + layout.rope_offset)};
    __builtin_memcpy(row + layout.scale_offset, to_scales, 8);
  }

 private:
  template <class Simd>
  static float recode(const std::byte* codes, const std::byte* scales, int32_t count,
                      std::byte* to) {
    using Word = typename Simd::Word;
    return recode_blocks<Simd, 1>(
        scales, count / kBlock, 127, Int16<Simd>::kKeyMax, 128,
        [&](int32_t b, Word factors, int lane) {
          for (int i = b * kBlock; i < (b + 1) * kBlock; i += 2 * Simd::kLanes) {
            Simd::store_word(
                to + 2 * i, Simd::template rescale16<8>(Simd::widen8(codes + i, 0), factors, lane));
          }
        });
  }

  template <template <class> class Arithmetic, class Simd>
  static Simd simd_of(Arithmetic<Simd>);

  template <class Arithmetic>
  static void widen(const std::byte* codes, const std::byte* scales, int32_t count, std::byte* to) {
    using Simd = decltype(simd_of(Arithmetic{}));
    constexpr int kVector = Simd::kLanes * Arithmetic::kGroup;
    static_assert(kBlock % kVector == 0, "a vector must not span two scales");
    const int32_t blocks = count / kBlock;
    for (int32_t b0 = 0; b0 < blocks; b0 += Simd::kLanes) {
      const int32_t n = blocks - b0 < Simd::kLanes ? blocks - b0 : Simd::kLanes;
      float scale[Simd::kLanes];
      Simd::store(scale, n == Simd::kLanes ? Simd::load_f16(scales + 2 * b0)
                                           : Simd::load_f16(scales + 2 * b0, n));
      for (int32_t b = 0; b < n; ++b) {
        const auto s = Simd::set(scale[b]);
        const int32_t at = (b0 + b) * kBlock;
        for (int32_t i = at; i < at + kBlock; i += kVector) {
          typename Simd::Float x[Arithmetic::kGroup];
          for (int v = 0; v < Arithmetic::kGroup; ++v) {
            x[v] = Simd::mul(s, Simd::load_s8(codes + i + v * Simd::kLanes));
          }
          Arithmetic::store_query(to + i * Arithmetic::kBytes, x);
        }
      }
    }
  }
};

}  // namespace
}  // namespace flashmla
