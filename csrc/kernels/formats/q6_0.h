// formats/q6_0.h: 6-bit codes with one fp16 scale per 32 values: [nibbles | high bits | scales],
// each plane contiguous.
//
// code = u - 32 with u in 0..63. Block b has 16 bytes of nibbles (u[j] low, u[j + 16] high) and 8
// bytes of high bits, byte k holding the upper two bits of u[k], u[k + 8], u[k + 16], u[k + 24]
// from bit 0 up.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/arithmetic_id.h"
#include "kernels/arithmetic/f32.h"
#include "kernels/arithmetic/int16.h"
#include "kernels/arithmetic/int8.h"
#include "kernels/call/params.h"
#include "kernels/formats/block_scale.h"
#include "kernels/formats/row_layout.h"

namespace flashmla {
namespace {

struct Q6_0 {
  static constexpr const char* kName = "q6_0";
  static constexpr CacheFormat kFormat = CacheFormat::kQ6_0;
  static constexpr bool kPacked = true;
  static constexpr int kMultiple = kBlock;
  static constexpr ArithmeticId kNative = ArithmeticId::kNone;

  static int64_t row_bytes(int32_t latent, int32_t rope) {
    const int64_t d = static_cast<int64_t>(latent) + rope;
    return d / 2 + d / 4 + d / kBlock * 2;
  }

  // The three planes from block `block` on, in a row of d values.
  struct Planes {
    const std::byte *nibbles, *high, *scales;
  };
  static Planes planes(const std::byte* row, int32_t d, int32_t block) {
    return {row + 16 * block, row + d / 2 + 8 * block, row + d / 2 + d / 4 + 2 * block};
  }

  static void encode_blocks(const float* x, int32_t count, std::byte* row, int32_t d,
                            int32_t first_block) {
    for (int32_t b = 0; b < count / kBlock; ++b) {
      const float* v = x + b * kBlock;
      const uint16_t scale = block_scale(v, 31.0f);
      const float inverse = inverse_scale(f16_to_float(scale));
      uint8_t u[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        u[i] = static_cast<uint8_t>(to_code(v[i], inverse, -32, 31) + 32);
      }
      const Planes to = planes(row, d, first_block + b);
      for (int j = 0; j < 16; ++j) {
        const_cast<std::byte&>(to.nibbles[j]) =
            static_cast<std::byte>((u[j] & 15) | (u[j + 16] & 15) << 4);
      }
      for (int k = 0; k < 8; ++k) {
        const_cast<std::byte&>(to.high[k]) = static_cast<std::byte>(
            u[k] >> 4 | (u[k + 8] >> 4) << 2 | (u[k + 16] >> 4) << 4 | (u[k + 24] >> 4) << 6);
      }
      store_u16(const_cast<std::byte*>(to.scales), scale);
    }
  }

  static void encode(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* row,
                     std::byte*) {
    encode_blocks(latent, l, row, l + r, 0);
    encode_blocks(rope, r, row, l + r, l / kBlock);
  }

  static void decode_blocks(const std::byte* row, int32_t d, int32_t first_block, int32_t count,
                            float* x) {
    for (int32_t b = 0; b < count / kBlock; ++b) {
      const Planes from = planes(row, d, first_block + b);
      const float scale = f16_to_float(load_u16(from.scales));
      for (int i = 0; i < kBlock; ++i) {
        const int low = static_cast<int>(from.nibbles[i % 16]) >> (i / 16 * 4) & 15;
        const int high = static_cast<int>(from.high[i % 8]) >> (i / 8 * 2) & 3;
        x[b * kBlock + i] = static_cast<float>((low | high << 4) - 32) * scale;
      }
    }
  }

  static void decode(const std::byte* row, const std::byte*, int32_t l, int32_t r, float* latent,
                     float* rope) {
    decode_blocks(row, l + r, 0, l, latent);
    decode_blocks(row, l + r, l / kBlock, r, rope);
  }

  template <class Simd>
  static constexpr ArithmeticId arithmetic(ScalarType) {
    return Simd::kInt8Dot    ? ArithmeticId::kInt8
           : Simd::kInt16Dot ? ArithmeticId::kInt16
                             : ArithmeticId::kF32;
  }

  template <class Simd>
  static void stage(F32<Simd>, const std::byte* codes, const std::byte*, const RowLayout& layout,
                    std::byte* row) {
    const int32_t d = layout.latent + layout.rope;
    auto* latent = reinterpret_cast<float*>(row);
    auto* rope = reinterpret_cast<float*>(row + layout.rope_offset);
    if constexpr (Simd::kBytes < kBlock) {
      decode(codes, nullptr, layout.latent, layout.rope, latent, rope);
    } else {
      widen<Simd>(codes, d, 0, layout.latent / kBlock, latent);
      widen<Simd>(codes, d, layout.latent / kBlock, layout.rope / kBlock, rope);
    }
    for (int32_t i = layout.latent; i < layout.value; ++i) latent[i] = 0;
  }

  // Block scales become one scale per segment; codes move from +-32 to the whole range of the
  // arithmetic.
  template <class Arithmetic>
    requires(Arithmetic::kScaled)
  static RowRecoding prepare(Arithmetic, const std::byte* codes, const RowLayout& layout) {
    using Simd = typename Arithmetic::Vocabulary;
    // Products are taken to units of 1 / 128 (8 bits) and 1 / 64.
    constexpr float kMost = Arithmetic::kKeyMax, kUnit = Arithmetic::kBytes == 1 ? 128 : 64;
    const int32_t d = layout.latent + layout.rope, blocks = layout.latent / kBlock;
    return {
        recoding<Simd>(planes(codes, d, 0).scales, blocks, 32, kMost, kUnit),
        recoding<Simd>(planes(codes, d, blocks).scales, layout.rope / kBlock, 32, kMost, kUnit)};
  }
  template <class Arithmetic>
    requires(Arithmetic::kScaled)
  static void stage(Arithmetic a, const std::byte* codes, const RowRecoding& ready,
                    const RowLayout& layout, std::byte* row) {
    const int32_t d = layout.latent + layout.rope;
    recode(a, ready.latent, planes(codes, d, 0), row);
    recode(a, ready.rope, planes(codes, d, layout.latent / kBlock), row + layout.rope_offset);
    store_scales(ready, layout, row);
  }

 private:
  // Unpacks the blocks of one vector from block b of `blocks` on. Where fewer are left, the rest is
  // anything.
  template <class Simd>
  static typename Simd::Word unpack(const Planes& from, int32_t b, int32_t blocks) {
    constexpr int kBlocks = Simd::kBytes / kBlock;
    const std::byte *nibbles = from.nibbles + 16 * b, *high = from.high + 8 * b;
    if (b + kBlocks <= blocks) return Simd::unpack6(nibbles, high);
    std::byte some_nibbles[16 * kBlocks] = {}, some_high[8 * kBlocks] = {};
    __builtin_memcpy(some_nibbles, nibbles, 16);
    __builtin_memcpy(some_high, high, 8);
    return Simd::unpack6(some_nibbles, some_high);
  }

  template <class Simd>
  static void widen(const std::byte* codes, int32_t d, int32_t first, int32_t blocks, float* to) {
    const Planes from = planes(codes, d, first);
    for (int32_t b = 0; b < blocks; ++b) {
      constexpr int kBlocks = Simd::kBytes / kBlock;
      alignas(64) std::byte u[Simd::kBytes];
      if (b % kBlocks == 0) Simd::store_word(u, unpack<Simd>(from, b, blocks));
      const auto scale = Simd::set(f16_to_float(load_u16(from.scales + 2 * b)));
      for (int i = 0; i < kBlock; i += Simd::kLanes) {
        const auto code = Simd::load_s8(u + b % kBlocks * kBlock + i);
        Simd::store(to + b * kBlock + i, Simd::mul(code, scale));
      }
    }
  }

  template <class Simd>
  static void recode(Int8<Simd>, const Recoding& recoding, const Planes& from, std::byte* to) {
    const auto bias = Simd::set_word(static_cast<int32_t>(0x80808080u));
    recode_blocks<Simd, Simd::kBytes / kBlock>(recoding, [=](int32_t b, const int32_t* factors) {
      const auto u = unpack<Simd>(from, b, recoding.blocks);
      Simd::store_word(to + b * kBlock, Simd::bit_xor(Simd::rescale8(u, factors), bias));
    });
  }

  template <class Simd>
  static void recode(Int16<Simd>, const Recoding& recoding, const Planes& from, std::byte* to) {
    constexpr int kStep = Simd::kBytes / kBlock, kWide = 2 * Simd::kLanes;
    recode_blocks<Simd, kStep>(recoding, [=](int32_t b, const int32_t* factors) {
      alignas(64) std::byte u[Simd::kBytes];
      Simd::store_word(u, unpack<Simd>(from, b, recoding.blocks));
      for (int i = 0; i < Simd::kBytes; i += kWide) {
        const auto code = Simd::widen8(u + i, 0);
        Simd::store_word(to + 2 * (b * kBlock + i),
                         Simd::template rescale16<9>(code, factors + i / kBlock));
      }
    });
  }
};

}  // namespace
}  // namespace flashmla
