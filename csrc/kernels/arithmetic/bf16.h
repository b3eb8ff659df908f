// arithmetic/bf16.h: words of two bf16, f32 accumulators; levels with a bf16 dot product.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

template <class Simd>
struct Bf16 {
  using Float = typename Simd::Float;
  using Word = typename Simd::Word;
  using Acc = Float;
  static constexpr int kGroup = 2;
  static constexpr int kBytes = 2;
  static constexpr bool kScaled = false;
  static constexpr bool kBiased = false;
  static constexpr bool kResidual = false;
  static constexpr bool kPartialSums = false;

  static Acc dot_key(Acc sum, Word query, Word key) { return Simd::dot_bf16(sum, query, key); }
  static Acc dot_key_at(Acc sum, Word query, const std::byte* key) {
    return Simd::dot_bf16_at(sum, query, key);
  }
  static Acc dot_value(Acc sum, Word probability, Word value) {
    return Simd::dot_bf16(sum, probability, value);
  }

  static void interleave(const std::byte* row, int64_t stride, Word out[2]) {
    Simd::interleave16(Simd::load_word(row), Simd::load_word(row + stride), out);
  }
  static void restore(Float v[2]) { Simd::restore16(v); }

  static Word pack_probabilities(const Float p[2]) { return Simd::pair_bf16(p[0], p[1]); }

  static void store_query(std::byte* p, const Float x[2]) {
    Simd::store_bf16(p, x[0]);
    Simd::store_bf16(p + 2 * Simd::kLanes, x[1]);
  }
};

}  // namespace
}  // namespace flashmla
