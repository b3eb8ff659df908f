// soften.h: running softmax of one tile: S[t][row] -> P in words of a token group, and the factors
// of the output so far.
//
// Lanes are query rows, so maximum, exponential and sum need no horizontal step. Scores are log2 of
// weights, times s.unit. score() has left the maximum of each row in s.tile_maximum; one more pass
// makes P. Where rows carry scales, log2 of a token's value scale has joined its score, so that P
// is a code already when it leaves the exponential: one scale per (tile, row), no second pass.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"

namespace flashmla {
namespace {

// top * 2^x for x <= 0 (minimax of degree 5 on [-1/2, 1/2]: relative error 2e-7 with its rounding):
// exactly `top` at 0, exactly 0 at and below the floor, NaN for NaN. A constant `top` costs
// nothing.
template <class Simd>
typename Simd::Float exp2(typename Simd::Float x, float top = 1.0f) {
  x = Simd::max(Simd::set(Simd::kExp2Floor), x);
  const auto n = Simd::round(x), f = Simd::sub(x, n);
  auto p = Simd::set(top * 1.3398874e-3f);
  p = Simd::fma(p, f, Simd::set(top * 9.6184373e-3f));
  p = Simd::fma(p, f, Simd::set(top * 5.5503324e-2f));
  p = Simd::fma(p, f, Simd::set(top * 2.4022648e-1f));
  p = Simd::fma(p, f, Simd::set(top * 6.9314720e-1f));
  p = Simd::fma(p, f, Simd::set(top));
  return Simd::scale_by_exp2(p, n);
}

// Hides what a row may not see, adds the mask, and takes the maximum anew. Scores are blended,
// never multiplied. bias: [tile][rows], additive mask, or null.
template <class Simd>
void mask_scores(const Tile& tile, float scale, const float* bias, int32_t row, int32_t rows,
                 const Scratch& s) {
  using Float = typename Simd::Float;
  const Float none = Simd::set(-__builtin_inff());
  const auto first = Simd::load_word(s.first + row), limit = Simd::load_word(s.limit + row);
  Float most = none;
  for (int32_t t = 0; t < tile.tokens; ++t) {
    const int64_t at = static_cast<int64_t>(t) * rows + row;
    Float x = Simd::mul(Simd::load(s.score + at), Simd::set(scale));
    if (bias) {
      const Float b = Simd::load(bias + at);
      x = Simd::select_minus_infinity(b, b, Simd::add(x, b));
    }
    x = t < tile.valid ? Simd::select_in_range(tile.begin + t, first, limit, x, none) : none;
    Simd::store(s.score + at, x);
    most = Simd::max(most, x);
  }
  Simd::store(s.tile_maximum + row, most);
}

// scale: what the stored scores still lack. kUnit: s.unit is not 1.
template <class Simd, class Arithmetic, bool kUnit>
void soften_rows(const Tile& tile, float scale, int32_t row, int32_t rows, const Scratch& s) {
  using Float = typename Simd::Float;
  constexpr int kGroup = Arithmetic::kGroup;
  // log2 of weights whose scores differ by `x` <= 0.
  [[maybe_unused]] const Float per_unit = Simd::set(kUnit ? 1 / s.unit : 1.0f);
  auto apart = [&](Float x) { return kUnit ? Simd::mul(x, per_unit) : x; };
  const Float before = Simd::load(s.maximum + row);
  const Float in_tile = Simd::mul(Simd::load(s.tile_maximum + row), Simd::set(scale));
  const Float most = Simd::max(before, in_tile);
  // A row that has seen no key yet has maximum -inf: shift by 0, so that its probabilities are
  // exactly 0 and not NaN.
  const Float shift = Simd::select_minus_infinity(most, Simd::zero(), most);
  const Float correction = exp2<Simd>(apart(Simd::sub(before, shift)));
  Simd::store(s.maximum + row, most);
  Simd::store(s.correction + row, correction);

  // P relative to the row's maximum; or codes: relative to the tile's, times their largest value.
  // Every exponent is 0 or less: a tile of which a row sees nothing has no maximum, and takes that
  // of the row.
  Float reference = shift;
  float top = 1;
  if constexpr (Arithmetic::kScaled) {
    top = Arithmetic::kProbabilityMax;
    reference = Simd::select_minus_infinity(in_tile, shift, in_tile);
    Simd::store(s.value_scale + row, exp2<Simd>(apart(Simd::sub(reference, shift)), 1 / top));
  }
  Float sum = Simd::zero();
  [[maybe_unused]] const Float factor = Simd::set(scale);
  const float* score = s.score + row;
  std::byte* probability = s.probability + static_cast<int64_t>(row) * 4;
  for (int32_t t = 0; t < tile.tokens; t += kGroup) {
    Float p[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      // Multiplied and rounded like the maximum was: fused, huge logits could exceed it by far.
      Float x = Simd::load(score);
      if constexpr (!Arithmetic::kScaled) x = Simd::mul(x, factor);
      p[i] = exp2<Simd>(apart(Simd::sub(x, reference)), top);
      score += rows;
      if constexpr (Arithmetic::kScaled) {
        sum = Simd::fma(p[i], Simd::set(s.value_inverse[t + i]), sum);
      } else {
        sum = Simd::add(sum, p[i]);
      }
    }
    Simd::store_word(probability, Arithmetic::pack_probabilities(p));
    probability += static_cast<int64_t>(rows) * 4;
  }
  if constexpr (Arithmetic::kScaled) sum = Simd::mul(sum, Simd::load(s.value_scale + row));
  Simd::store(s.sum + row, Simd::fma(Simd::load(s.sum + row), correction, sum));
}

// edge: some row does not see the whole tile. bias: additive mask, or null. scale: what the stored
// scores still lack.
template <class Simd, class Arithmetic>
void soften(const Tile& tile, float scale, bool edge, const float* bias, int vectors,
            const Scratch& s) {
  const int32_t rows = vectors * Simd::kLanes;
  for (int32_t row = 0; row < rows; row += Simd::kLanes) {
    if (edge || bias) mask_scores<Simd>(tile, scale, bias, row, rows, s);
    const float rest = edge || bias ? 1.0f : scale;
    if (s.unit == 1) {
      soften_rows<Simd, Arithmetic, false>(tile, rest, row, rows, s);
    } else {
      soften_rows<Simd, Arithmetic, true>(tile, rest, row, rows, s);
    }
  }
}

}  // namespace
}  // namespace flashmla
