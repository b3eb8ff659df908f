// formats/q8_kv.h: 8-bit codes with two f32 scales per token: [L codes | R codes | scale of the
// latent | scale of the rope].
//
// Codes are uint8 with bias 128, 1..255. The latent and the rope part differ in size by large
// factors, hence two scales.
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

struct Q8Kv {
  static constexpr const char* kName = "q8_kv";
  static constexpr CacheFormat kFormat = CacheFormat::kQ8Kv;
  static constexpr bool kPacked = true;
  static constexpr int kMultiple = 32;
  static constexpr ArithmeticId kNative = ArithmeticId::kInt8;
  static constexpr int32_t kKeyMax = 128;  // byte 0 is no code, but may be there

  static int64_t row_bytes(int32_t latent, int32_t rope) {
    return static_cast<int64_t>(latent) + rope + 8;
  }

  static float encode_segment(const float* x, int32_t count, std::byte* codes) {
    const float most = absolute_maximum(x, count);
    const float inverse = segment_inverse(most);
    for (int32_t i = 0; i < count; ++i) {
      codes[i] = static_cast<std::byte>(to_code(x[i], inverse, -127, 127) + 128);
    }
    return segment_scale(most);
  }

  static void encode(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* row,
                     std::byte*) {
    const float scales[2] = {encode_segment(latent, l, row), encode_segment(rope, r, row + l)};
    __builtin_memcpy(row + l + r, scales, 8);
  }

  static void decode(const std::byte* row, const std::byte*, int32_t l, int32_t r, float* latent,
                     float* rope) {
    float scales[2];
    __builtin_memcpy(scales, row + l + r, 8);
    for (int32_t i = 0; i < l; ++i)
      latent[i] = static_cast<float>(static_cast<int>(row[i]) - 128) * scales[0];
    for (int32_t i = 0; i < r; ++i)
      rope[i] = static_cast<float>(static_cast<int>(row[l + i]) - 128) * scales[1];
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
    float scales[2];
    __builtin_memcpy(scales, codes + layout.latent + layout.rope, 8);
    widen<Simd>(codes, layout.latent, scales[0], reinterpret_cast<float*>(row));
    widen<Simd>(codes + layout.latent, layout.rope, scales[1],
                reinterpret_cast<float*>(row + layout.rope_offset));
  }

  template <class Simd>
  static void stage(Int8<Simd>, const std::byte* codes, const std::byte*, const RowLayout& layout,
                    std::byte* row) {
    __builtin_memcpy(row, codes, layout.latent);
    __builtin_memcpy(row + layout.rope_offset, codes + layout.latent, layout.rope);
    __builtin_memcpy(row + layout.scale_offset, codes + layout.latent + layout.rope, 8);
  }

  // The codes as they are: int16 holds them exactly.
  template <class Simd>
  static void stage(Int16<Simd>, const std::byte* codes, const std::byte*, const RowLayout& layout,
                    std::byte* row) {
    widen16<Simd>(codes, layout.latent, row);
    widen16<Simd>(codes + layout.latent, layout.rope, row + layout.rope_offset);
    __builtin_memcpy(row + layout.scale_offset, codes + layout.latent + layout.rope, 8);
  }

 private:
  template <class Simd>
  static void widen16(const std::byte* codes, int32_t count, std::byte* to) {
    for (int32_t i = 0; i < count; i += 2 * Simd::kLanes)
      Simd::store_word(to + 2 * i, Simd::widen8(codes + i, 0x80));
  }

  template <class Simd>
  static void widen(const std::byte* codes, int32_t count, float scale, float* to) {
    const auto bias = Simd::set(128.0f), s = Simd::set(scale);
    for (int32_t i = 0; i < count; i += Simd::kLanes) {
      Simd::store(to + i, Simd::mul(Simd::sub(Simd::load_u8(codes + i), bias), s));
    }
  }
};

}  // namespace
}  // namespace flashmla
