// score.h: S[t][row] = K[t] . Q[row] for one tile, and the maximum over the tile. Lanes are query
// rows; one word of K is broadcast. Scores of scaled arithmetics come out in log2 units, plus log2
// of the token's value scale (see soften.h).
//
// kResidual: adds to the scores that are there what the residual of the queries brings (refine.h).
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/blocks.h"
#include "kernels/attention/query.h"
#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"
#include "kernels/attention/value_scales.h"

namespace flashmla {
namespace {

template <bool kResidual>
[[gnu::always_inline]] inline const PackedQueries& queries(const Scratch& s) {
  return kResidual ? s.residual : s.query;
}

// kTokens x kVectors accumulators: tokens [t, t + kTokens) of the tile, whose rows are evenly
// spaced (one page, or a staged tile), against one row block. Prefetches `ahead_bytes` from `ahead`
// on meanwhile; 0 for none. Not inlined: what surrounds it has no say in how registers are used.
template <class Simd, class Arithmetic, int kTokens, int kVectors, bool kResidual>
[[gnu::noinline]] void score_block(const Tile& tile, int32_t t, const std::byte* query,
                                   const Scratch& s, int32_t row, int32_t rows,
                                   const std::byte* ahead, int64_t ahead_bytes) {
  const PackedQueries& packed = queries<kResidual>(s);
  using Acc = typename Arithmetic::Acc;
  using Word = typename Simd::Word;
  constexpr int kLanes = Simd::kLanes;
  Acc acc[kTokens][kVectors];
  float* out = s.score + static_cast<int64_t>(t) * rows + row;

  typename Simd::Float most[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) most[v] = Simd::load(s.tile_maximum + row + v * kLanes);

  if constexpr (!Arithmetic::kScaled) {
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Simd::zero();
    }
  }

  // At most one cache line per word, the rest behind the loops.
  const int last = tile.key[1].words > 0 ? 1 : 0;
  const int64_t words = tile.key[0].words + tile.key[1].words;
  const int64_t step =
      ahead_bytes > words * kCacheLine ? kCacheLine : (ahead_bytes + words - 1) / words;
  const std::byte* fetch = ahead;
  for (int seg = 0; seg <= last; ++seg) {
    const Span& span = tile.key[seg];
    const std::byte* key = span.group[t / kPage] + t % kPage * span.stride;
    [[maybe_unused]] typename Simd::Float sum[kTokens][kVectors];
    if constexpr (Arithmetic::kScaled) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Acc start = Arithmetic::kBiased
                              ? Simd::load_word(packed.start[seg] + row + v * kLanes)
                              : Simd::zero_word();
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) acc[i][v] = start;
      }
    }
    if constexpr (Arithmetic::kPartialSums) {
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = Simd::zero();
      }
    }
    for (int32_t begin = 0, end; begin < span.words; begin = end) {
      end = Arithmetic::kPartialSums && packed.words_per_sum < span.words - begin
                ? begin + packed.words_per_sum
                : span.words;
      for (int32_t g = begin; g < end; ++g) {
        Word q[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) q[v] = Simd::load_word(query + v * kLanes * 4);
        query += kVectors * kLanes * 4;
        Simd::prefetch(fetch);
        fetch += step;
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) {
          const std::byte* word = key + i * span.stride + 4 * g;
          if constexpr (kVectors == 1) {
            acc[i][0] = Arithmetic::dot_key_at(acc[i][0], q[0], word);
            continue;
          }
          const Word k = Simd::broadcast_word(word);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[i][v] = Arithmetic::dot_key(acc[i][v], q[v], k);
        }
      }
      if constexpr (Arithmetic::kPartialSums) {
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sum[i][v] = Simd::add(sum[i][v], Simd::to_float(acc[i][v]));
            acc[i][v] = Simd::zero_word();
          }
        }
      }
    }
    if constexpr (Arithmetic::kScaled) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto query_scale = Simd::load(packed.scale[seg] + row + v * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) {
          float key_scale;
          __builtin_memcpy(&key_scale, key + i * span.stride + span.scale, 4);
          float* to = out + i * rows + v * kLanes;
          const auto scale = Simd::mul(query_scale, Simd::set(key_scale));
          const auto before =
              seg == 0 && !kResidual ? Simd::set(s.value_log2[t + i]) : Simd::load(to);
          const auto product = Arithmetic::kPartialSums ? sum[i][v] : Simd::to_float(acc[i][v]);
          const auto x = Simd::fma(product, scale, before);
          Simd::store(to, x);
          if (seg == last) most[v] = Simd::max(most[v], x);
        }
      }
    }
  }
  for (; fetch < ahead + ahead_bytes; fetch += kCacheLine) Simd::prefetch(fetch);
  if constexpr (!Arithmetic::kScaled) {
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Simd::store(out + i * rows + v * kLanes, acc[i][v]);
        most[v] = Simd::max(most[v], acc[i][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) Simd::store(s.tile_maximum + row + v * kLanes, most[v]);
}

// Four tokens against one vector of rows, whose queries are packed by quads: each word of the
// accumulators holds a quarter of a product.
template <class Simd, class Arithmetic, bool kResidual>
[[gnu::noinline]] void score_quads(const Tile& tile, int32_t t, const std::byte* query,
                                   const Scratch& s, int32_t row, int32_t rows,
                                   const std::byte* ahead, int64_t ahead_bytes) {
  const PackedQueries& packed = queries<kResidual>(s);
  using Word = typename Simd::Word;
  constexpr int kTokens = 4, kVectorBytes = Simd::kLanes * 4;
  float* out = s.score + static_cast<int64_t>(t) * rows + row;
  auto most = Simd::load(s.tile_maximum + row);
  const int64_t quads = (tile.key[0].words + tile.key[1].words) / 4;
  const int64_t step = (ahead_bytes + quads - 1) / quads;
  const int last = tile.key[1].words > 0 ? 1 : 0;
  for (int seg = 0; seg <= last; ++seg) {
    const Span& span = tile.key[seg];
    const std::byte* key = span.group[t / kPage] + t % kPage * span.stride;
    Word acc[kTokens][4];
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = Simd::zero_word();
    }
    for (int32_t g = 0; g < span.words; g += 4, query += 4 * kVectorBytes) {
      Word q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) q[j] = Simd::load_word(query + j * kVectorBytes);
      Simd::prefetch(ahead);
      ahead += step;
#pragma GCC unroll 4
      for (int i = 0; i < kTokens; ++i) {
        const Word k = Simd::broadcast_quad(key + i * span.stride + 4 * g);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = Arithmetic::dot_key(acc[i][j], q[j], k);
      }
    }
    const auto query_scale = Simd::load(packed.scale[seg] + row);
    const Word start = Simd::load_word(packed.start[seg] + row);
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
      float key_scale;
      __builtin_memcpy(&key_scale, key + i * span.stride + span.scale, 4);
      float* to = out + i * rows;
      const auto scale = Simd::mul(query_scale, Simd::set(key_scale));
      const auto before = seg == 0 && !kResidual ? Simd::set(s.value_log2[t + i]) : Simd::load(to);
      const auto sum = Simd::to_float(Simd::add_word(start, Simd::sum_quads(acc[i])));
      const auto x = Simd::fma(sum, scale, before);
      Simd::store(to, x);
      if (seg == last) most = Simd::max(most, x);
    }
  }
  Simd::store(s.tile_maximum + row, most);
}

// Tokens of a block at most: accumulators leave room for the queries, a broadcast and, where they
// are added up elsewhere, as many sums.
template <class Simd, class Arithmetic, int kVectors>
constexpr int kBlockTokens =
    (Simd::kRegisters == 16 || Arithmetic::kPartialSums ? 12 : 16) / kVectors;

// All tokens of the tile against one row block of kVectors vectors.
template <class Simd, class Arithmetic, int kVectors>
void score_rows(const Tile& tile, const std::byte* query, const Scratch& s, int32_t row,
                int32_t rows, bool direct) {
  constexpr int kTokens = kBlockTokens<Simd, Arithmetic, kVectors>;
  // The first half of the next tile's pages; accumulate() fetches the other one.
  const int64_t ahead = row == 0 ? tile.next_bytes / 2 / kPage : 0;  // bytes per token
  auto block = [&]<int kCount>(int32_t t) {
    score_block<Simd, Arithmetic, kCount, kVectors, false>(
        tile, t, query, s, row, rows, tile.next[t / kPage] + t % kPage * ahead, kCount * ahead);
  };
  if constexpr (Arithmetic::kScaled) {
    for (int32_t page = 0; row == 0 && page < tile.tokens / kPage; ++page) {
      load_value_scales<Simd>(tile, page, s);
    }
  }
  int32_t t = 0;
  if constexpr (kVectors == 1 && kQuads<Simd, Arithmetic>) {
    for (; t < tile.tokens; t += 4) {
      score_quads<Simd, Arithmetic, false>(tile, t, query, s, row, rows,
                                           tile.next[t / kPage] + t % kPage * ahead, 4 * ahead);
    }
    return;
  }
  // Rows of a staged tile are neighbours throughout, others within a page.
  constexpr int kLeast = kPage % kTokens == 0 ? kTokens : kTokens * 2 / 3;
  const int32_t run = direct ? kPage : tile.tokens;
  for (; t < tile.tokens; t += run) in_blocks<kTokens, kLeast>(t, t + run, block);
}

template <class Simd, class Arithmetic>
void score(const Tile& tile, int vectors, const Scratch& s) {
  const bool direct = tile.key[0].group[0] != s.staged;
  const int64_t words = tile.key[0].words + tile.key[1].words;
  const int32_t rows = vectors * Simd::kLanes;
  for (int32_t r = 0; r < rows; ++r) s.tile_maximum[r] = -__builtin_inff();
  for (int v = 0; v < vectors;) {
    const int width = row_vectors<Simd>(v, vectors);
    const int32_t row = v * Simd::kLanes;
    const std::byte* query = s.query.words + row * words * 4;
    if constexpr (kMaxRowVectors<Simd> == 4) {
      if (width == 4) score_rows<Simd, Arithmetic, 4>(tile, query, s, row, rows, direct);
    }
    if (width == 2) score_rows<Simd, Arithmetic, 2>(tile, query, s, row, rows, direct);
    if (width == 1) score_rows<Simd, Arithmetic, 1>(tile, query, s, row, rows, direct);
    v += width;
  }
}

}  // namespace
}  // namespace flashmla
