// arithmetic/f32.h: f32 words of one element; any level, any format.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

template <class Simd>
struct F32 {
  using Float = typename Simd::Float;
  using Word = typename Simd::Word;
  using Acc = Float;
  static constexpr int kGroup = 1;        // elements per 32-bit word
  static constexpr int kBytes = 4;        // bytes per element
  static constexpr bool kScaled = false;  // rows carry scales, accumulators are integers
  static constexpr bool kBiased = false;  // accumulators start from a value of the query
  static constexpr bool kResidual =
      false;  // queries may need what rounding leaves of them (refine.h)
  static constexpr bool kPartialSums = false;  // accumulators may take but a part of a segment

  static Acc dot_key(Acc sum, Word query, Word key) {
    return Simd::fma(Simd::as_float(query), Simd::as_float(key), sum);
  }
  // The same with a key's word in memory.
  static Acc dot_key_at(Acc sum, Word query, const std::byte* key) {
    return Simd::fma_at(Simd::as_float(query), key, sum);
  }
  static Acc dot_value(Acc sum, Word probability, Word value) {
    return dot_key(sum, probability, value);
  }

  // kGroup rows of V -> kGroup vectors whose words hold one dim of all rows; `restore` puts the
  // dims back in order.
  static void interleave(const std::byte* row, int64_t, Word out[1]) {
    out[0] = Simd::load_word(row);
  }
  static void restore(Float*) {}

  static Word pack_probabilities(const Float p[1]) { return Simd::as_word(p[0]); }

  // One vector of query values (kLanes * kGroup) as it is stored for packing.
  static void store_query(std::byte* p, const Float x[1]) {
    Simd::store(reinterpret_cast<float*>(p), x[0]);
  }
};

}  // namespace
}  // namespace flashmla
