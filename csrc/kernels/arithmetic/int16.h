// arithmetic/int16.h: words of two 16-bit codes, int32 accumulators; levels with a 16-bit pair
// product.
//
// K and V rows are codes up to +-11585 (fewer where a format's own codes do) with one f32 scale per
// segment; queries and probabilities take what is left of 31 bits. As exact as the storage format,
// at half the rate of Int8: it serves levels without an 8-bit dot product, and formats whose codes
// eight bits with one scale would spoil.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

template <class Simd>
struct Int16 {
  using Vocabulary = Simd;
  using Float = typename Simd::Float;
  using Word = typename Simd::Word;
  using Acc = Word;
  static constexpr int kGroup = 2;
  static constexpr int kBytes = 2;
  static constexpr bool kScaled = true;
  static constexpr bool kBiased = false;
  static constexpr bool kResidual = false;
  static constexpr bool kPartialSums = true;
  static constexpr float kKeyMax = 11585.0f;
  static constexpr float kProbabilityMax = 1448.0f;  // 11585 * 1448 * 128 < 2^31

  // Values that one accumulator sums. The fewer, the finer the codes of the queries; with keys of
  // eight bits they have all of 16 (128 * 32767 * 512 < 2^31).
  static constexpr int32_t values_per_sum(int32_t key_max) { return key_max <= 128 ? 512 : 64; }
  // Query codes per unit, for a segment with the largest magnitude `most`, whose magnitudes sum up
  // to `sum` * 2^20 at most over `length` values that share an accumulator. key_max times the sum
  // of their codes must fit int32; rounding adds half a code each, and the float sum is good to 1 /
  // 1024.
  static float query_resolution(float most, float sum, int32_t length, int32_t key_max) {
    const float codes = 0x1p31f * (1023.0f / 1024) / static_cast<float>(key_max);
    const float room = (codes - 0.5f * static_cast<float>(length)) * 0x1p-20f / sum;
    const float range = 32767 / most;
    return room < range ? room : range;
  }

  static Acc dot_key(Acc sum, Word query, Word key) { return Simd::dot_s16(sum, query, key); }
  static Acc dot_key_at(Acc sum, Word query, const std::byte* key) {
    return Simd::dot_s16_at(sum, query, key);
  }
  static Acc dot_value(Acc sum, Word probability, Word value) {
    return Simd::dot_s16(sum, probability, value);
  }

  static void interleave(const std::byte* row, int64_t stride, Word out[2]) {
    Simd::interleave16(Simd::load_word(row), Simd::load_word(row + stride), out);
  }
  static void restore(Float v[2]) { Simd::restore16(v); }

  // p: 0..1448.
  static Word pack_probabilities(const Float p[2]) {
    return Simd::bit_or(Simd::round_to_word(p[0]),
                        Simd::template shift_left<16>(Simd::round_to_word(p[1])));
  }

  // x: codes, before they are rounded.
  static void store_query(std::byte* p, const Float x[2]) {
    for (int i = 0; i < 2; ++i)
      Simd::store_s16(p + 2 * i * Simd::kLanes, Simd::round_to_word(x[i]));
  }
};

}  // namespace
}  // namespace flashmla
