// refine.h: scores that rounding the queries to eight bits leaves too coarse. They are computed
// twice: what rounding left of a query, in 254ths of its step, makes another packed query, whose
// products are added. That is done where it matters, for keys that may get a large logit.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/numeric.h"
#include "kernels/attention/query.h"
#include "kernels/attention/score.h"
#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"

namespace flashmla {
namespace {

// Which tokens of a tile have logits that rounding is expected to move by more than the tolerance:
// the error of a query code has variance 1/12, key codes count with the root of their mean square,
// and errors are taken as independent. The largest query scale of the row block stands for all of
// its rows. Normal noise of 512 values and logits of standard deviation 1.7 stays at half of the
// tolerance.
class QueryRounding {
 public:
  QueryRounding(const PackedQueries& query, int32_t rows, float unit, const RowLayout& layout) {
    constexpr float kKeyRms = 40, kTolerance = 0.05f;  // log2 units
    const float per_value = kKeyRms * kKeyRms / 12 / (kTolerance * kTolerance * unit * unit);
    for (int seg = 0; seg < 2; ++seg) {
      float most = 0;
      for (int32_t r = 0; r < rows; ++r)
        most = query.scale[seg][r] > most ? query.scale[seg][r] : most;
      weight_[seg] =
          most * most * per_value * static_cast<float>(seg ? layout.rope : layout.latent);
    }
  }

  bool matters(const Tile& tile) const {
    for (int32_t t = 0; t < tile.tokens; t += kPage) {
      if (matters(tile, t, t + kPage)) return true;
    }
    return false;
  }

  // Whether it matters for one of tokens [begin, end) of a page.
  bool matters(const Tile& tile, int32_t begin, int32_t end) const {
    float error = 0;
    for (int seg = 0; seg < 2; ++seg) {
      const Span& span = tile.key[seg];
      if (span.words == 0) continue;
      const float most = bits_float(largest_scale(span, begin, end));
      error += weight_[seg] * most * most;
    }
    return !(error <= 1);
  }

 private:
  // Scales are not negative: they order as integers do, for which compilers have a maximum.
  static uint32_t largest_scale(const Span& span, int32_t begin, int32_t end) {
    const std::byte* scale = span.group[begin / kPage] + begin % kPage * span.stride + span.scale;
    uint32_t most = 0;
    for (int32_t t = begin; t < end; ++t, scale += span.stride) {
      uint32_t x;
      __builtin_memcpy(&x, scale, 4);
      most = most > x ? most : x;
    }
    return most;
  }

  float weight_[2];
};

template <class Simd, class Arithmetic, bool kByQuads, int kVectors>
void refine_rows(const Tile& tile, const QueryRounding& rounding, int32_t row, int32_t rows,
                 const std::byte* query, const Scratch& s) {
  // Which tokens are refined depends on the instruction set alone, not on how queries are packed.
  constexpr bool kFew = flashmla::kQuads<Simd, Arithmetic> && kVectors == 1;
  constexpr bool kQuad = kByQuads && kFew;
  constexpr int kTokens = kFew ? 4 : Simd::kRegisters / 2 / kVectors;
  for (int32_t t = 0; t < tile.tokens; t += kTokens) {
    if (!rounding.matters(tile, t, t + kTokens)) continue;
    if constexpr (kQuad) {
      score_quads<Simd, Arithmetic, true>(tile, t, query, s, row, rows, query, 0);
    } else {
      score_block<Simd, Arithmetic, kTokens, kVectors, true>(tile, t, query, s, row, rows, query,
                                                             0);
    }
  }
}

// Adds the products of s.residual to the scores for which they matter.
template <class Simd, class Arithmetic, bool kByQuads>
void refine(const Tile& tile, const QueryRounding& rounding, int vectors, const Scratch& s) {
  const int64_t words = tile.key[0].words + tile.key[1].words;
  const int32_t rows = vectors * Simd::kLanes;
  for (int v = 0; v < vectors;) {
    const int width = row_vectors<Simd>(v, vectors);
    const int32_t row = v * Simd::kLanes;
    const std::byte* query = s.residual.words + row * words * 4;
    auto refine_some = [&]<int kVectors>() {
      refine_rows<Simd, Arithmetic, kByQuads, kVectors>(tile, rounding, row, rows, query, s);
    };
    if constexpr (kMaxRowVectors<Simd> == 4) {
      if (width == 4) refine_some.template operator()<4>();
    }
    if (width == 2) refine_some.template operator()<2>();
    if (width == 1) refine_some.template operator()<1>();
    v += width;
  }
  // Scores may have fallen, and a maximum that none of them reaches would leave no weights where
  // logits are huge.
  for (int32_t row = 0; row < rows; row += Simd::kLanes) {
    auto most = Simd::set(-__builtin_inff());
    for (int32_t t = 0; t < tile.tokens; ++t)
      most = Simd::max(most, Simd::load(s.score + static_cast<int64_t>(t) * rows + row));
    Simd::store(s.tile_maximum + row, most);
  }
}

}  // namespace
}  // namespace flashmla
