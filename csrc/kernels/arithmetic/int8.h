// arithmetic/int8.h: words of four 8-bit codes, int32 accumulators; levels with a u8 x s8 dot
// product.
//
// K and V rows are codes biased by 128 with one f32 scale per segment (a q8_kv row); queries are
// signed codes with one scale per (row, segment). The bias costs nothing: accumulators start at
// -128 * sum(query codes), and V is unbiased by one xor. Sums fit int32: 255 * 127 * L for L <=
// 65536, 255 * 127 * 128 for V.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

template <class Simd>
struct Int8 {
  using Vocabulary = Simd;
  using Float = typename Simd::Float;
  using Word = typename Simd::Word;
  using Acc = Word;
  static constexpr int kGroup = 4;
  static constexpr int kBytes = 1;
  static constexpr bool kScaled = true;
  static constexpr bool kBiased = true;
  static constexpr bool kResidual = true;
  static constexpr bool kPartialSums = false;
  static constexpr float kKeyMax = 127.0f;
  static constexpr float kProbabilityMax = 255.0f;

  // Query codes per unit, for a segment with the largest magnitude `most`.
  static float query_resolution(float most, float, int32_t, int32_t) { return 127 / most; }
  static constexpr int32_t values_per_sum(int32_t) { return INT32_MAX; }
  // What rounding leaves of a query code is at most half; times this it is a code again.
  static constexpr float kResidualUnit = 254.0f;
  // Where accumulators start, in sums of query codes: the keys' bias costs nothing.
  static constexpr int32_t kStart = -128;
  // Sums of codes, zeros behind the last.
  static Word sum_codes(const std::byte* codes, int32_t count) {
    const Word ones = Simd::set_word(0x01010101);
    Word sums = Simd::zero_word();
    for (int32_t i = 0; i < count; i += 4 * Simd::kLanes)
      sums = Simd::dot_u8s8(sums, ones, Simd::load_word(codes + i));
    return sums;
  }

  static Acc dot_key(Acc sum, Word query, Word key) { return Simd::dot_u8s8(sum, key, query); }
  static Acc dot_key_at(Acc sum, Word query, const std::byte* key) {
    return dot_key(sum, query, Simd::broadcast_word(key));
  }
  static Acc dot_value(Acc sum, Word probability, Word value) {
    return Simd::dot_u8s8(sum, probability, value);
  }

  static void interleave(const std::byte* row, int64_t stride, Word out[4]) {
    const Word bias = Simd::set_word(static_cast<int32_t>(0x80808080u));
    Simd::interleave8(Simd::bit_xor(Simd::load_word(row), bias),
                      Simd::bit_xor(Simd::load_word(row + stride), bias),
                      Simd::bit_xor(Simd::load_word(row + 2 * stride), bias),
                      Simd::bit_xor(Simd::load_word(row + 3 * stride), bias), out);
  }
  static void restore(Float v[4]) { Simd::restore8(v); }

  // p: 0..255.
  static Word pack_probabilities(const Float p[4]) {
    const Word low = Simd::bit_or(Simd::round_to_word(p[0]),
                                  Simd::template shift_left<8>(Simd::round_to_word(p[1])));
    const Word high = Simd::bit_or(Simd::template shift_left<16>(Simd::round_to_word(p[2])),
                                   Simd::template shift_left<24>(Simd::round_to_word(p[3])));
    return Simd::bit_or(low, high);
  }

  // x: codes, before they are rounded.
  static void store_query(std::byte* p, const Float x[4]) {
    for (int i = 0; i < 4; ++i) Simd::store_s8(p + i * Simd::kLanes, Simd::round_to_word(x[i]));
  }
};

}  // namespace
}  // namespace flashmla
