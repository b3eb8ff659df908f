// soften.h: running softmax of one tile: S[t][row] -> P in words of a token group, and the factors of the output so far.
// Lanes are query rows, so maximum, exponential and sum need no horizontal step. Scores are kept in log2 units.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/scratch.h"
#include "kernels/tile.h"

namespace flashmla {
namespace {

// 2^x for x <= 0 (minimax of degree 5 on [-1/2, 1/2]: relative error 2e-7 with its rounding), exactly 0 at and below the
// floor, NaN for NaN.
template <class Simd>
typename Simd::Float exp2(typename Simd::Float x) {
  x = Simd::max(Simd::set(Simd::kExp2Floor), x);
  const auto n = Simd::round(x), f = Simd::sub(x, n);
  auto p = Simd::set(1.3398874e-3f);
  p = Simd::fma(p, f, Simd::set(9.6184373e-3f));
  p = Simd::fma(p, f, Simd::set(5.5503324e-2f));
  p = Simd::fma(p, f, Simd::set(2.4022648e-1f));
  p = Simd::fma(p, f, Simd::set(6.9314720e-1f));
  p = Simd::fma(p, f, Simd::set(1.0f));
  return Simd::scale_by_exp2(p, n);
}

// kEdge: some row does not see all tokens of the tile, or a mask applies: scores are blended, never multiplied.
template <class Simd, class Arithmetic, bool kEdge>
void soften_rows(const Tile& tile, float scale, const float* bias, int32_t row, int32_t rows, const Scratch& s) {
  using Float = typename Simd::Float;
  const Float none = Simd::set(-__builtin_inff());
  const Float logit_scale = Simd::set(scale);
  const auto first = Simd::load_word(s.first + row), limit = Simd::load_word(s.limit + row);

  const Float before = Simd::load(s.maximum + row);
  Float most = before;
  for (int32_t t = 0; t < tile.tokens; ++t) {
    float* at = s.score + static_cast<int64_t>(t) * rows + row;
    Float x = Simd::mul(Simd::load(at), logit_scale);
    if constexpr (kEdge) {
      if (bias) {
        const Float b = Simd::load(bias + static_cast<int64_t>(t) * rows + row);
        x = Simd::select_minus_infinity(b, b, Simd::add(x, b));
      }
      x = t < tile.valid ? Simd::select_in_range(tile.begin + t, first, limit, x, none) : none;
    }
    Simd::store(at, x);
    most = Simd::max(most, x);
  }
  // A row that has seen no key yet has maximum -inf: shift by 0, so that its probabilities are exactly 0 and not NaN.
  const Float shift = Simd::select_minus_infinity(most, Simd::zero(), most);
  const Float correction = exp2<Simd>(Simd::sub(before, shift));
  Simd::store(s.maximum + row, most);
  Simd::store(s.correction + row, correction);
  Float sum = Simd::mul(Simd::load(s.sum + row), correction);

  constexpr int kGroup = Arithmetic::kGroup;
  if constexpr (!Arithmetic::kScaled) {
    for (int32_t t = 0; t < tile.tokens; t += kGroup) {
      Float p[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        p[i] = exp2<Simd>(Simd::sub(Simd::load(s.score + static_cast<int64_t>(t + i) * rows + row), shift));
        sum = Simd::add(sum, p[i]);
      }
      Simd::store_word(s.probability + (static_cast<int64_t>(t / kGroup) * rows + row) * 4,
                       Arithmetic::pack_probabilities(p));
    }
  } else {
    // The value scale of each token goes into P before P is quantised, with one scale per (tile, row).
    Float largest = Simd::zero();
    for (int32_t t = 0; t < tile.tokens; ++t) {
      float* at = s.score + static_cast<int64_t>(t) * rows + row;
      float value_scale;
      __builtin_memcpy(&value_scale, tile.value.group[t / kPage] + t % kPage * tile.value.stride + tile.value.scale, 4);
      const Float x = Simd::load(at);
      Float p = exp2<Simd>(Simd::sub(x, shift));
      sum = Simd::add(sum, p);
      p = Simd::mul(p, Simd::set(value_scale));
      if constexpr (kEdge) p = Simd::select_minus_infinity(x, Simd::zero(), p);
      largest = Simd::max(largest, p);
      Simd::store(at, p);
    }
    float inverse[Simd::kLanes];
    Simd::store(inverse, largest);
    for (float& x : inverse) x = x > 1e-36f ? Arithmetic::kProbabilityMax / x : 0.0f;
    Simd::store(s.value_scale + row, Simd::mul(largest, Simd::set(1 / Arithmetic::kProbabilityMax)));
    const Float to_code = Simd::load(inverse);
    for (int32_t t = 0; t < tile.tokens; t += kGroup) {
      Float p[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        p[i] = Simd::mul(to_code, Simd::load(s.score + static_cast<int64_t>(t + i) * rows + row));
      }
      Simd::store_word(s.probability + (static_cast<int64_t>(t / kGroup) * rows + row) * 4,
                       Arithmetic::pack_probabilities(p));
    }
  }
  Simd::store(s.sum + row, sum);
}

// edge: some row does not see the whole tile. bias: [tile][rows], additive mask in log2 units, or null.
template <class Simd, class Arithmetic>
void soften(const Tile& tile, float scale, bool edge, const float* bias, int vectors, const Scratch& s) {
  const int32_t rows = vectors * Simd::kLanes;
  for (int32_t row = 0; row < rows; row += Simd::kLanes) {
    if (edge || bias) {
      soften_rows<Simd, Arithmetic, true>(tile, scale, bias, row, rows, s);
    } else {
      soften_rows<Simd, Arithmetic, false>(tile, scale, nullptr, row, rows, s);
    }
  }
}

}  // namespace
}  // namespace flashmla
