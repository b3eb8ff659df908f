// formats/q8_0.h: 8-bit codes with one fp16 scale per 32 values: [D int8 codes | D / 32 scales].
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/arithmetic_id.h"
#include "kernels/arithmetic/f32.h"
#include "kernels/arithmetic/int16.h"
#include "kernels/call/params.h"
#include "kernels/formats/block_scale.h"
#include "kernels/formats/row_layout.h"

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

  // 8-bit products would take one scale per row, and lose a bit or two of what these codes hold.
  template <class Simd>
  static constexpr ArithmeticId arithmetic(ScalarType) {
    return Simd::kInt16Dot ? ArithmeticId::kInt16 : ArithmeticId::kF32;
  }

  template <class Simd>
  static void stage(F32<Simd>, const std::byte* codes, const std::byte*, const RowLayout& layout,
                    std::byte* row) {
    const std::byte* scales = codes + layout.latent + layout.rope;
    auto* latent = reinterpret_cast<float*>(row);
    widen<Simd>(codes, scales, layout.latent, latent);
    for (int32_t i = layout.latent; i < layout.value; ++i) latent[i] = 0;
    widen<Simd>(codes + layout.latent, scales + layout.latent / kBlock * 2, layout.rope,
                reinterpret_cast<float*>(row + layout.rope_offset));
  }

  // Block scales become one scale per segment.
  template <class Simd>
  static RowRecoding prepare(Int16<Simd>, const std::byte* codes, const RowLayout& layout) {
    constexpr float kMost = Int16<Simd>::kKeyMax;
    const std::byte* scales = codes + layout.latent + layout.rope;
    const int32_t blocks = layout.latent / kBlock;
    return {recoding<Simd>(scales, blocks, 128, kMost, 256),
            recoding<Simd>(scales + 2 * blocks, layout.rope / kBlock, 128, kMost, 256)};
  }
  template <class Simd>
  static void stage(Int16<Simd>, const std::byte* codes, const RowRecoding& ready,
                    const RowLayout& layout, std::byte* row) {
    recode<Simd>(ready.latent, codes, row);
    recode<Simd>(ready.rope, codes + layout.latent, row + layout.rope_offset);
    store_scales(ready, layout, row);
  }

 private:
  template <class Simd>
  static void recode(const Recoding& recoding, const std::byte* codes, std::byte* to) {
    recode_blocks<Simd, 1>(recoding, [=](int32_t b, const int32_t* factor) {
#pragma GCC unroll 2
      for (int i = 0; i < kBlock; i += 2 * Simd::kLanes) {
        const auto code = Simd::widen8(codes + b * kBlock + i, 0);
        Simd::store_word(to + 2 * (b * kBlock + i), Simd::template rescale16<7>(code, factor));
      }
    });
  }

  template <class Simd>
  static void widen(const std::byte* codes, const std::byte* scales, int32_t count, float* to) {
    for (int32_t i = 0; i < count; i += Simd::kLanes) {
      const auto scale = Simd::set(f16_to_float(load_u16(scales + i / kBlock * 2)));
      Simd::store(to + i, Simd::mul(scale, Simd::load_s8(codes + i)));
    }
  }
};

}  // namespace
}  // namespace flashmla
