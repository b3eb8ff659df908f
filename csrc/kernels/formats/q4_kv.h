// formats/q4_kv.h: a 4-bit latent beside an 8-bit rope part: [L / 2 nibbles | L / 32 fp16 scales |
// R int8 codes | f32 rope scale].
//
// Latent codes index a codebook of 16 levels, one fp16 scale per 32 values. Block b has 16 bytes:
// value j in the low nibble of byte j, value j + 16 in the high one. The rope part is what 4 bits
// would break, so it keeps 8.
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

struct Q4Kv {
  static constexpr const char* kName = "q4_kv";
  static constexpr CacheFormat kFormat = CacheFormat::kQ4Kv;
  static constexpr bool kPacked = true;
  static constexpr int kMultiple = kBlock;
  static constexpr ArithmeticId kNative = ArithmeticId::kNone;

  // Lloyd-Max levels of Gaussian blocks (tools/fit_q4_codebook.py), in units of scale. Frozen:
  // stored caches depend on them.
  static constexpr int8_t kLevels[16] = {-127, -96, -74, -57, -42, -29, -17, -6,
                                         6,    17,  29,  42,  57,  74,  96,  127};

  static int64_t row_bytes(int32_t latent, int32_t rope) {
    return static_cast<int64_t>(latent) / 2 + latent / kBlock * 2 + rope + 4;
  }

  // The planes of a row.
  struct Planes {
    const std::byte *nibbles, *scales, *rope, *rope_scale;
  };
  static Planes planes(const std::byte* row, int32_t l, int32_t r) {
    const std::byte* scales = row + l / 2;
    const std::byte* rope = scales + l / kBlock * 2;
    return {row, scales, rope, rope + r};
  }

  // Midpoint between levels k and k + 1.
  static constexpr float midpoint(int k) {
    return static_cast<float>(kLevels[k] + kLevels[k + 1]) * 0.5f;
  }

  // Half a block as the compiler's own vectors: plain arithmetic of every level, in whatever
  // registers it has. Left to vectorise loops, compilers spend most of the time on sums and
  // packing.
  static constexpr int kHalf = kBlock / 2;
  template <class T, int kCount>
  using Vector [[gnu::vector_size(kCount * sizeof(T))]] = T;
  using Floats = Vector<float, kHalf>;
  using Ints = Vector<int32_t, kHalf>;

  // Nibbles of a block: of each value the index of the level nearest to x * inverse, the number of
  // k with x * inverse > midpoint(k). Midpoints are symmetric, so half of them serve: for y <= 0 it
  // is 7 minus the number of positive ones with |y| >= midpoint, which is > after a step to the
  // next larger float.
  static void store_nearest(const float* x, float inverse, std::byte* nibbles) {
    Ints index[2];
    for (int half = 0; half < 2; ++half) {
      Floats y;
      __builtin_memcpy(&y, x + half * kHalf, sizeof(y));
      y = inverse > 0 ? y * inverse : Floats{};
      Ints bits;
      __builtin_memcpy(&bits, &y, sizeof(bits));
      const Ints negative = ~(y > 0.0f);  // 0 or -1
      const Ints magnitude = (bits & 0x7fffffff) - negative;
      Ints n = {};  // minus the number
#pragma GCC unroll 8
      for (int k = 8; k < 15; ++k) n += magnitude > static_cast<int32_t>(float_bits(midpoint(k)));
      index[half] = ((8 - n) & ~negative) | ((7 + n) & negative);
    }
    const auto packed = __builtin_convertvector(index[0] | (index[1] << 4), Vector<uint8_t, kHalf>);
    __builtin_memcpy(nibbles, &packed, sizeof(packed));
  }

  // Squared error of a block of magnitudes at a scale. The levels are symmetric, so the upper half
  // of them serves.
  static float squared_error(const float* magnitudes, float scale) {
    const float inverse = inverse_scale(scale);
    Vector<float, 8> part[4], sum;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Floats magnitude;
      __builtin_memcpy(&magnitude, magnitudes + half * kHalf, sizeof(magnitude));
      const Floats y = magnitude * inverse;
      Ints level = Ints{} + kLevels[8];
#pragma GCC unroll 8
      for (int k = 8; k < 15; ++k) level += (y > midpoint(k)) & (kLevels[k + 1] - kLevels[k]);
      const Floats d = magnitude - scale * __builtin_convertvector(level, Floats);
      const Floats square = d * d;
      __builtin_memcpy(part + 2 * half, &square, sizeof(square));
    }
    sum = ((part[0] + part[1]) + part[2]) + part[3];
    Vector<float, 4> quarter[2], four;
    __builtin_memcpy(quarter, &sum, sizeof(sum));
    four = quarter[0] + quarter[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
  }

  // Tries a few scales below absmax / 127 (clipping the largest value can serve the others) and
  // keeps the one with the least squared error.
  static uint16_t best_scale(const float* x) {
    constexpr float kCandidates[] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f, 0.7f};
    const float most = absolute_maximum(x, kBlock);
    if (most != most) return float_to_f16(most);
    float magnitude[kBlock];
    for (int i = 0; i < kBlock; ++i) magnitude[i] = __builtin_fabsf(x[i]);
    // Candidates are compared before they are rounded to fp16; codes come from the rounded one.
    float best = 0, least = __builtin_inff();
#pragma GCC unroll 8
    for (const float candidate : kCandidates) {
      const float scale = most / 127.0f * candidate;
      const float error = squared_error(magnitude, scale);
      const bool better = error < least;
      least = better ? error : least;
      best = better ? scale : best;
    }
    if (least == __builtin_inff()) best = most / 127.0f;  // the squares overflow
    return float_to_f16(best > 65504.0f ? 65504.0f : best);
  }

  static void encode(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* row,
                     std::byte*) {
    const Planes to = planes(row, l, r);
    for (int32_t b = 0; b < l / kBlock; ++b) {
      const float* x = latent + b * kBlock;
      const uint16_t scale = best_scale(x);
      store_nearest(x, inverse_scale(f16_to_float(scale)), row + b * 16);
      store_u16(const_cast<std::byte*>(to.scales) + 2 * b, scale);
    }
    const float most = absolute_maximum(rope, r);
    const float inverse = segment_inverse(most);
    const float scale = segment_scale(most);
    for (int32_t i = 0; i < r; ++i) {
      const_cast<std::byte&>(to.rope[i]) =
          static_cast<std::byte>(to_code(rope[i], inverse, -127, 127));
    }
    __builtin_memcpy(const_cast<std::byte*>(to.rope_scale), &scale, 4);
  }

  static void decode(const std::byte* row, const std::byte*, int32_t l, int32_t r, float* latent,
                     float* rope) {
    const Planes from = planes(row, l, r);
    for (int32_t i = 0; i < l; ++i) {
      const int32_t b = i / kBlock, j = i % kBlock;
      const int index = static_cast<int>(from.nibbles[b * 16 + j % 16]) >> (j / 16 * 4) & 15;
      latent[i] = static_cast<float>(kLevels[index]) * f16_to_float(load_u16(from.scales + 2 * b));
    }
    float scale;
    __builtin_memcpy(&scale, from.rope_scale, 4);
    for (int32_t i = 0; i < r; ++i)
      rope[i] = static_cast<float>(static_cast<int8_t>(from.rope[i])) * scale;
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
    auto* latent = reinterpret_cast<float*>(row);
    decode(codes, nullptr, layout.latent, layout.rope, latent,
           reinterpret_cast<float*>(row + layout.rope_offset));
    for (int32_t i = layout.latent; i < layout.value; ++i) latent[i] = 0;
  }

  // Block scales of the latent become one scale.
  template <class Arithmetic>
    requires(Arithmetic::kScaled)
  static Recoding prepare(Arithmetic, const std::byte* codes, const RowLayout& layout) {
    constexpr float kUnit = Arithmetic::kBytes == 1 ? 128 : 256;
    return recoding<typename Arithmetic::Vocabulary>(
        planes(codes, layout.latent, layout.rope).scales, layout.latent / kBlock, 127,
        Arithmetic::kKeyMax, kUnit);
  }

  template <class Simd>
  static void stage(Int8<Simd>, const std::byte* codes, const Recoding& latent,
                    const RowLayout& layout, std::byte* row) {
    const auto bias = Simd::set_word(static_cast<int32_t>(0x80808080u));
    const Planes from = planes(codes, layout.latent, layout.rope);
    recode_blocks<Simd, Simd::kBytes / kBlock>(latent, [=](int32_t b, const int32_t* factors) {
      const auto level = levels<Simd>(from.nibbles, b, latent.blocks);
      Simd::store_word(row + b * kBlock, Simd::bit_xor(Simd::rescale8(level, factors), bias));
    });
    std::byte* rope = row + layout.rope_offset;
    for (int32_t i = 0, count = layout.rope; i < count; i += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, from.rope + i, 8);
      eight ^= 0x8080808080808080;
      __builtin_memcpy(rope + i, &eight, 8);
    }
    store_scales(latent.scale, from.rope_scale, layout, row);
  }

  template <class Simd>
  static void stage(Int16<Simd>, const std::byte* codes, const Recoding& latent,
                    const RowLayout& layout, std::byte* row) {
    constexpr int kWide = 2 * Simd::kLanes;
    const Planes from = planes(codes, layout.latent, layout.rope);
    recode_blocks<Simd, Simd::kBytes / kBlock>(latent, [=](int32_t b, const int32_t* factors) {
      alignas(64) std::byte level[Simd::kBytes];
      Simd::store_word(level, levels<Simd>(from.nibbles, b, latent.blocks));
      for (int i = 0; i < Simd::kBytes; i += kWide) {
        const auto code = Simd::widen8(level + i, 0);
        Simd::store_word(row + 2 * (b * kBlock + i),
                         Simd::template rescale16<7>(code, factors + i / kBlock));
      }
    });
    for (int32_t i = 0; i < layout.rope; i += kWide) {
      Simd::store_word(row + layout.rope_offset + 2 * i, Simd::widen8(from.rope + i, 0));
    }
    store_scales(latent.scale, from.rope_scale, layout, row);
  }

 private:
  static void store_scales(float latent, const std::byte* rope, const RowLayout& layout,
                           std::byte* row) {
    __builtin_memcpy(row + layout.scale_offset, &latent, 4);
    __builtin_memcpy(row + layout.scale_offset + 4, rope, 4);
  }

  // The levels of one vector of blocks from b on; past the last block they are anything.
  template <class Simd>
  static typename Simd::Word levels(const std::byte* nibbles, int32_t b, int32_t blocks) {
    constexpr int kBlocks = Simd::kBytes / kBlock;
    if (b + kBlocks <= blocks) return Simd::look_up4(nibbles + 16 * b, kLevels);
    std::byte rest[16 * kBlocks] = {};
    __builtin_memcpy(rest, nibbles + 16 * b, 16);
    return Simd::look_up4(rest, kLevels);
  }
};

}  // namespace
}  // namespace flashmla
