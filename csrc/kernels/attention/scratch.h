// scratch.h: the working memory of one work item, laid out in one buffer that the caller lends.
// Independent of the context length.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/plan.h"
#include "kernels/formats/row_layout.h"

namespace flashmla {
namespace {

// How LentProducts (lent_products.h) cuts a tile: tokens of one product of scores, values of one
// product that has sums of its own.
constexpr int32_t kLentTokens = 64;
constexpr int32_t kLentColumns = 128;
constexpr int32_t kLentRows = 64;  // at most, of one product

// The queries of a work item as operands of score().
struct PackedQueries {
  std::byte* words;       // [row vector block][word][row]: 32-bit words
  float* scale[2];        // [rows] per segment (scaled arithmetics)
  int32_t* start[2];      // [rows] per segment: of the accumulators (biased arithmetics)
  int32_t words_per_sum;  // that accumulators take, if they are less than a segment
};

struct Scratch {
  float unit;  // scores, and all that is compared with them, are log2 of weights times this
  PackedQueries query;
  PackedQueries residual;  // what rounding left of them (refine.h)
  std::byte* query_rows;   // [kLanes] rows of the arithmetic, before packing
  std::byte* staged;       // [tile] staged rows
  float* score;            // [tile][rows]
  std::byte* probability;  // [tile / group][rows]: 32-bit words
  std::byte* interleaved;  // [tile / group][group]: vectors of words, of some columns of V
  float* output;           // [rows][value]
  float* bias;             // [tile][rows]: additive mask of one tile
  float* maximum;          // [rows], log2 units
  float* tile_maximum;     // [rows], of the scores of one tile
  float* sum;              // [rows]
  float* correction;       // [rows]: factor of the old output
  float* value_scale;      // [rows]: of the integer accumulators of a tile
  float* value_log2;       // [tile]: log2 of the value scales (scaled arithmetics)
  float* value_inverse;    // [tile]
  int32_t* first;          // [rows]: keys [first, limit) are visible
  int32_t* limit;          // [rows]
  int32_t* positions;      // [tile]: cache positions of the tokens of a tile
  // With lent products only:
  std::byte* product;  // 32-bit sums of one or two products
  std::byte* values;   // [tile / group][value]: 32-bit words of V
  std::byte* weights;  // [rows][tile]: P as rows of the arithmetic
};

// Floats of one partial result: [rows][value] and [rows] log-sum-exp.
inline int64_t partial_floats(BlockShape shape, int32_t value) {
  return static_cast<int64_t>(shape.rows) * (value + 1);
}

// Assigns the pieces from `base` on (which may be null, to measure). Returns the bytes used.
template <class Simd, class Arithmetic, bool kLent>
size_t lay_out(const RowLayout& layout, BlockShape shape, std::byte* base, Scratch& s) {
  size_t used = 0;
  auto take = [&](size_t bytes) {
    std::byte* p = base ? base + used : nullptr;
    used += (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    return p;
  };
  const size_t rows = static_cast<size_t>(round_up(shape.rows, Simd::kLanes)),
               tile = static_cast<size_t>(shape.tile);
  const size_t words =
      static_cast<size_t>(layout.groups[0]) + static_cast<size_t>(layout.groups[1]);
  auto take_floats = [&](size_t n) { return reinterpret_cast<float*>(take(n * 4)); };
  auto take_queries = [&] {
    PackedQueries q = {};
    q.words = take(rows * words * 4);
    for (int i = 0; i < 2; ++i) {
      q.scale[i] = take_floats(rows);
      q.start[i] = reinterpret_cast<int32_t*>(take(rows * 4));
    }
    return q;
  };
  s.query = take_queries();
  if constexpr (Arithmetic::kResidual) s.residual = take_queries();
  s.query_rows = take(static_cast<size_t>(Simd::kLanes) * static_cast<size_t>(layout.stride));
  s.staged = take(tile * static_cast<size_t>(layout.stride));
  s.score = take_floats(tile * rows);
  s.probability = take(tile / Arithmetic::kGroup * rows * 4);
  s.interleaved = take(tile * static_cast<size_t>(Simd::kLanes) * 4);
  s.output = take_floats(rows * static_cast<size_t>(layout.value));
  s.bias = take_floats(tile * rows);
  s.maximum = take_floats(rows);
  s.tile_maximum = take_floats(rows);
  s.value_log2 = take_floats(tile);
  s.value_inverse = take_floats(tile);
  s.sum = take_floats(rows);
  s.correction = take_floats(rows);
  s.value_scale = take_floats(rows);
  s.first = reinterpret_cast<int32_t*>(take(rows * 4));
  s.limit = reinterpret_cast<int32_t*>(take(rows * 4));
  s.positions = reinterpret_cast<int32_t*>(take(tile * 4));
  if constexpr (kLent) {
    static_assert(kLentColumns >= 2 * kLentTokens);  // scores need two products of kLentTokens rows
    s.product = take(size_t{kLentRows} * kLentColumns * 4);
    s.values = take(tile / Arithmetic::kGroup * static_cast<size_t>(layout.value) * 4);
    s.weights = take(rows * tile * Arithmetic::kBytes);
  }
  return used;
}

// The largest block whose working set (query, tile, output, scores, probabilities) stays in a good
// part of a 1 MiB L2 cache: a pure function of the arithmetic and the dimensions.
template <class Simd, class Arithmetic>
BlockShape block_shape(const RowLayout& layout) {
  constexpr int64_t kBudget = 768 * 1024;
  BlockShape shape = {32, 64};
  // Values of their own: rows are query tokens of one head, and a block of them sees a causal edge
  // of its own height. 64 rows waste half as much there as 128 (512 tokens: 169 -> 178 GFLOP/s).
  const int32_t most = layout.value_offset != 0 ? 64 : 128;
  for (const int32_t rows : {128, 64, 32}) {
    if (rows > most) continue;
    for (const int32_t tile : {128, 64}) {
      const int64_t words = layout.groups[0] + layout.groups[1];
      const int64_t bytes = 4 * rows * words + static_cast<int64_t>(tile) * layout.stride +
                            4 * rows * layout.value + 4 * tile * rows +
                            4 * tile / Arithmetic::kGroup * rows;
      if (bytes <= kBudget) {
        shape = {rows, tile};
        return shape;
      }
    }
  }
  return shape;
}

}  // namespace
}  // namespace flashmla
