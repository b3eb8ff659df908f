// value_scales.h: scales of V rows for the arithmetics that have them, on the way from tile to
// score() and soften().
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"

namespace flashmla {
namespace {

// log2(x) for positive normal x: the series of atanh around sqrt(2), relative error 1e-7.
template <class Simd>
typename Simd::Float log2(typename Simd::Float x) {
  constexpr float kRoot = 1.41421356f, kTwoOverLn2 = 2.88539008f;
  const auto m = Simd::mantissa(x);
  const auto t = Simd::div(Simd::sub(m, Simd::set(kRoot)), Simd::add(m, Simd::set(kRoot)));
  const auto t2 = Simd::mul(t, t);
  auto p = Simd::set(kTwoOverLn2 / 7);
  p = Simd::fma(p, t2, Simd::set(kTwoOverLn2 / 5));
  p = Simd::fma(p, t2, Simd::set(kTwoOverLn2 / 3));
  p = Simd::fma(p, t2, Simd::set(kTwoOverLn2));
  return Simd::fma(p, t, Simd::add(Simd::exponent(x), Simd::set(0.5f)));
}

// Value scales of a page of the tile as score() and soften() use them.
template <class Simd>
void load_value_scales(const Tile& tile, int32_t page, const Scratch& s) {
  const std::byte* row = tile.value.group[page] + tile.value.scale;
  const int32_t begin = page * kPage, end = begin + kPage;
  for (int32_t t = begin; t < end; ++t, row += tile.value.stride)
    __builtin_memcpy(s.value_log2 + t, row, 4);
  for (int32_t t = begin; t < end; t += Simd::kLanes) {
    // A row of zeros has scale 0 but counts in the sum: any tiny scale does, as its codes are 0.
    const auto scale = Simd::max(Simd::set(1e-30f), Simd::load(s.value_log2 + t));
    // A scale that is not finite makes the scores of its token NaN. Its inverse is 0 all the same:
    // the weight 0 of rows that do not see the token is multiplied by it.
    const auto nan = Simd::sub(scale, scale);
    Simd::store(s.value_inverse + t, Simd::max(Simd::div(Simd::set(1.0f), scale), Simd::zero()));
    Simd::store(s.value_log2 + t, Simd::add(Simd::mul(log2<Simd>(scale), Simd::set(s.unit)), nan));
  }
}

}  // namespace
}  // namespace flashmla
