// lent_products.h: score() and accumulate() by the products of a matrix engine. The same operands
// and results as score.h and accumulate.h, whose place it takes in attention.h: the packed queries
// are the words of an operand B already, rows of keys are rows of an operand A, and the rows of V
// are interleaved once per tile into another B, in the order of dims that Arithmetic::restore()
// undoes.
//
// Shapes are few, since an engine compiles each: kTokens tokens at a time, query rows in blocks of
// 64, 32 and 16 (row_vectors), and where a tile has sums of its own, values kColumns at a time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/accumulate.h"
#include "kernels/attention/query.h"
#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"
#include "kernels/attention/value_scales.h"
#include "kernels/call/matrix_engine.h"

namespace flashmla {
namespace {

template <class Simd, class Arithmetic>
class LentProducts {
 public:
  static constexpr bool kLent = true;
  static constexpr bool kQuads = false;
  static constexpr int32_t kTokens = kLentTokens;  // evenly spaced in memory

  explicit LentProducts(const MatrixEngine* engine) : engine_(*engine) {}

  // S[t][row] and the maximum of each row, as score() leaves them.
  void score(const Tile& tile, int vectors, const Scratch& s) const {
    if constexpr (kScaled) {
      for (int32_t page = 0; page < tile.tokens / kPage; ++page)
        load_value_scales<Simd>(tile, page, s);
    }
    const int32_t words = tile.key[0].words + tile.key[1].words, rows = vectors * kLanes;
    for (int v = 0; v < vectors;) {
      const int width = row_vectors<Simd>(v, vectors);
      const std::byte* query = s.query.words + static_cast<int64_t>(v) * kLanes * words * 4;
      if (width == 4) score_rows<4>(tile, query, v * kLanes, rows, s);
      if (width == 2) score_rows<2>(tile, query, v * kLanes, rows, s);
      if (width == 1) score_rows<1>(tile, query, v * kLanes, rows, s);
      v += width;
    }
  }

  // O[row][d] = correction[row] * O[row][d] + P[row][t] V[t][d].
  void accumulate(const Tile& tile, const Output& output, int32_t /*used*/, int32_t rows,
                  const Scratch& s) const {
    const int32_t width = output.width;
    // Products add to what is there.
    if (output.first)
      __builtin_memset(output.rows, 0, static_cast<size_t>(rows) * static_cast<size_t>(width) * 4);
    const int32_t depth = round_up(tile.tokens, kTokens);
    interleave_values(tile, depth, width, s);
    transpose_probabilities(tile, depth, rows, s);
    const int vectors = rows / kLanes;
    const int32_t step = kScaled ? kColumns : width;
    for (int32_t d = 0; d < width; d += step) {
      const int32_t n = width - d < step ? width - d : step;
      for (int v = 0; v < vectors;) {
        const int count = row_vectors<Simd>(v, vectors);
        const int32_t row = v * kLanes, m = count * kLanes;
        const std::byte* p = s.weights + static_cast<int64_t>(row) * depth * Arithmetic::kBytes;
        float* out = output.rows + static_cast<int64_t>(row) * width + d;
        if constexpr (kScaled) {
          multiply({m, n, depth, depth, width, n, false}, p, s.values + d * 4, s.product);
          for (int32_t r = 0; r < m; ++r)
            add_product(s.product + static_cast<int64_t>(r) * n * 4, n, row + r,
                        out + static_cast<int64_t>(r) * width, s);
        } else {
          for (int32_t r = 0; r < m; ++r)
            correct(out + static_cast<int64_t>(r) * width, width, s.correction[row + r]);
          multiply({m, width, depth, depth, width, width, true}, p, s.values,
                   reinterpret_cast<std::byte*>(out));
        }
        v += count;
      }
    }
  }

 private:
  using Acc = typename Arithmetic::Acc;
  using Float = typename Simd::Float;
  using Word = typename Simd::Word;
  static constexpr int kLanes = Simd::kLanes, kGroup = Arithmetic::kGroup;
  static constexpr bool kScaled = Arithmetic::kScaled;
  static constexpr int32_t kColumns = kLentColumns;

  void multiply(const ProductShape& shape, const std::byte* a, const std::byte* b,
                std::byte* c) const {
    if constexpr (kScaled) {
      engine_.multiply_u8s8(shape, a, b, reinterpret_cast<int32_t*>(c));
    } else {
      engine_.multiply_bf16(shape, a, b, reinterpret_cast<float*>(c));
    }
  }

  // A tile against one row block. The rows of a staged tile behind its tokens are multiplied too,
  // whatever they hold: no one reads their results.
  template <int kVectors>
  void score_rows(const Tile& tile, const std::byte* query, int32_t row, int32_t rows,
                  const Scratch& s) const {
    constexpr int32_t n = kVectors * kLanes;
    const Span &latent = tile.key[0], &rope = tile.key[1];
    // One product, if both segments have one scale and are neighbours.
    const bool joined = !kScaled && tile.tokens > 0 && rope.words > 0 &&
                        rope.stride == latent.stride &&
                        rope.group[0] == latent.group[0] + 4 * latent.words;
    std::byte* second = kScaled ? s.product + kTokens * n * 4 : s.product;
    Float most[kVectors];
    for (int v = 0; v < kVectors; ++v) most[v] = Simd::set(-__builtin_inff());
    for (int32_t t = 0; t < tile.tokens; t += kTokens) {
      auto product = [&](const Span& span, int32_t words, const std::byte* b, std::byte* c,
                         bool add) {
        const auto lda = static_cast<int32_t>(span.stride / Arithmetic::kBytes);
        multiply({kTokens, n, words * kGroup, lda, n, n, add}, span.group[t / kPage], b, c);
      };
      product(latent, latent.words + (joined ? rope.words : 0), query, s.product, false);
      if (rope.words > 0 && !joined)
        product(rope, rope.words, query + static_cast<int64_t>(latent.words) * n * 4, second,
                !kScaled);
      const int32_t count = tile.tokens - t < kTokens ? tile.tokens - t : kTokens;
      settle<kVectors>(tile, t, count, row, rows, most, s);
    }
    for (int v = 0; v < kVectors; ++v) Simd::store(s.tile_maximum + row + v * kLanes, most[v]);
  }

  // The products of tokens [t, t + count) become scores: the same steps as in score.h.
  template <int kVectors>
  void settle(const Tile& tile, int32_t t, int32_t count, int32_t row, int32_t rows, Float* most,
              const Scratch& s) const {
    constexpr int32_t n = kVectors * kLanes;
    [[maybe_unused]] const int segments = tile.key[1].words > 0 ? 2 : 1;
    [[maybe_unused]] Float query_scale[2][kVectors];
    [[maybe_unused]] Word start[2][kVectors];
    if constexpr (kScaled) {
      for (int seg = 0; seg < segments; ++seg) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          query_scale[seg][v] = Simd::load(s.query.scale[seg] + row + v * kLanes);
          start[seg][v] = Simd::load_word(s.query.start[seg] + row + v * kLanes);
        }
      }
    }
    for (int32_t i = 0; i < count; ++i) {
      const std::byte* from = s.product + i * n * 4;
      float* to = s.score + static_cast<int64_t>(t + i) * rows + row;
      Float x[kVectors];
      if constexpr (kScaled) {
        const std::byte* key[2];
        for (int seg = 0; seg < segments; ++seg) {
          const Span& span = tile.key[seg];
          key[seg] = span.group[(t + i) / kPage] + (t + i) % kPage * span.stride + span.scale;
        }
        const Float before = Simd::set(s.value_log2[t + i]);
        for (int v = 0; v < kVectors; ++v) x[v] = before;
        for (int seg = 0; seg < segments; ++seg, from += kTokens * n * 4) {
          float key_scale;
          __builtin_memcpy(&key_scale, key[seg], 4);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const Word sum = Simd::add_word(Simd::load_word(from + v * kLanes * 4), start[seg][v]);
            const Float scale = Simd::mul(query_scale[seg][v], Simd::set(key_scale));
            x[v] = Simd::fma(Simd::to_float(sum), scale, x[v]);
          }
        }
      } else {
        for (int v = 0; v < kVectors; ++v)
          x[v] = Simd::load(reinterpret_cast<const float*>(from) + v * kLanes);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Simd::store(to + v * kLanes, x[v]);
        most[v] = Simd::max(most[v], x[v]);
      }
    }
  }

  // Rows of V as words of a group of tokens: s.values [depth / group][width], zeros behind the
  // tile's tokens.
  void interleave_values(const Tile& tile, int32_t depth, int32_t width, const Scratch& s) const {
    std::byte* to = s.values;
    const bool direct = tile.key[0].group[0] != s.staged;  // staging prefetches for itself
    const int64_t stride = tile.value.stride;
    for (int32_t t = 0; t < tile.tokens; t += kGroup) {
      const std::byte* from = tile.value.group[t / kPage] + t % kPage * stride;
      for (int i = 0; direct && i < kGroup; ++i) prefetch_next(tile, t + i);
      for (int32_t d = 0; d < width; d += kLanes * kGroup) {
        Word x[kGroup];
        Arithmetic::interleave(from + d * Arithmetic::kBytes, stride, x);
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) Simd::store_word(to + i * kLanes * 4, x[i]);
        to += kGroup * kLanes * 4;
      }
    }
    __builtin_memset(
        to, 0,
        static_cast<size_t>((depth - tile.tokens) / kGroup) * static_cast<size_t>(width) * 4);
  }

  // The row of the next tile that corresponds to row t: products do not prefetch, and a page is no
  // neighbour of the next. Every second line, the hardware brings the other one: all of them stall
  // at memory's pace what comes next.
  static void prefetch_next(const Tile& tile, int32_t t) {
    const int64_t bytes = tile.next_bytes / kPage;
    const std::byte* row = tile.next[t / kPage] + t % kPage * bytes;
    for (int64_t i = 0; i < bytes; i += 2 * kCacheLine) Simd::prefetch(row + i);
  }

  // s.weights [rows][depth], from words [token group][row]; zeros behind the tile's tokens.
  void transpose_probabilities(const Tile& tile, int32_t depth, int32_t rows,
                               const Scratch& s) const {
    const int32_t words = depth / kGroup, filled = tile.tokens / kGroup;
    for (int32_t row = 0; row < rows; row += kLanes) {
      std::byte* to = s.weights + static_cast<int64_t>(row) * words * 4;
      for (int32_t w = 0; w < words; w += kLanes) {
        Word x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          x[i] =
              w + i < filled
                  ? Simd::load_word(s.probability + (static_cast<int64_t>(w + i) * rows + row) * 4)
                  : Simd::zero_word();
        }
        Simd::transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          Simd::store_word(to + (static_cast<int64_t>(i) * words + w) * 4, x[i]);
      }
    }
  }

  // Most tiles do not change the maximum of most rows.
  static void correct(float* out, int32_t width, float correction) {
    if (correction == 1) return;
    const Float factor = Simd::set(correction);
    for (int32_t d = 0; d < width; d += kLanes)
      Simd::store(out + d, Simd::mul(factor, Simd::load(out + d)));
  }

  // The same steps as in accumulate.h.
  static void add_product(const std::byte* sums, int32_t n, int32_t row, float* out,
                          const Scratch& s) {
    const Float factor = Simd::set(s.correction[row]), scale = Simd::set(s.value_scale[row]);
    for (int32_t d = 0; d < n; d += kLanes) {
      const Float sum = Simd::mul(scale, Simd::to_float(Simd::load_word(sums + d * 4)));
      Simd::store(out + d, Simd::fma(factor, Simd::load(out + d), sum));
    }
  }

  const MatrixEngine& engine_;
};

}  // namespace
}  // namespace flashmla
