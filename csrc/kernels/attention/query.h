// query.h: packs a block of query rows so that lanes are rows: [row block][word][row], the operand
// of score().
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/encode_queries.h"
#include "kernels/attention/scratch.h"
#include "kernels/call/params.h"
#include "kernels/call/plan.h"
#include "kernels/call/visible.h"

namespace flashmla {
namespace {

// Rows are packed in blocks of this many vectors, as many as score() keeps in registers: contiguous
// per block, because with a stride of all rows the words of one row share few L1 sets.
template <class Simd>
constexpr int kMaxRowVectors = Simd::kRegisters == 32 ? 4 : 2;

// Vectors of the row block that starts at vector v of n.
template <class Simd>
[[gnu::always_inline]] inline int row_vectors(int v, int n) {
  int width = kMaxRowVectors<Simd>;
  while (width > n - v) width /= 2;
  return width;
}

// A single vector of rows would take one broadcast per product, more than a CPU loads where 8-bit
// products are fastest. Its queries are packed by quads instead, [quad of words][j][i] being those
// of row 4 i + j: the broadcast of a quad of a key serves 16 rows.
template <class Simd, class Arithmetic>
constexpr bool kQuads = Arithmetic::kGroup == 4 && Simd::kLanes == 16;

[[gnu::always_inline]] inline const std::byte* query_row(const QueryRows& q, int32_t sequence,
                                                         int32_t token, int32_t head) {
  return q.data + sequence * q.stride[0] + token * q.stride[1] + head * q.stride[2];
}

// Queries of `count` values that already are rows of the arithmetic (of its only type of that size)
// in whole vectors of words need no copy.
template <class Simd, class Arithmetic>
bool packs_directly(ScalarType type, int32_t count, float multiplier) {
  return !Arithmetic::kScaled && size_of(type) == Arithmetic::kBytes && multiplier == 1 &&
         count % (Simd::kLanes * Arithmetic::kGroup) == 0;
}

// Packs rows [item.row_begin, item.row_end) times `multiplier`, zero rows up to `vectors` whole
// vectors. The multiplier has the sign of the softmax scale, so that a larger score is a larger
// logit; `factor` goes into the scales of scaled arithmetics. query_rows: kLanes rows of the
// arithmetic, to work in.
template <class Simd, class Arithmetic, bool kByQuads, bool kResidual = false>
void pack_queries(const AttentionParams& p, const WorkItem& item, const RowLayout& layout,
                  int vectors, float multiplier, float factor, int32_t key_max,
                  std::byte* query_rows, PackedQueries& to) {
  const int32_t first_token = query_tokens(p, item.sequence).begin;
  if constexpr (Arithmetic::kPartialSums)
    to.words_per_sum = Arithmetic::values_per_sum(key_max) / Arithmetic::kGroup;
  using Word = typename Simd::Word;
  const int32_t rows = item.row_end - item.row_begin;
  const int32_t words = layout.groups[0] + layout.groups[1];
  const bool direct[2] = {
      packs_directly<Simd, Arithmetic>(p.q_main_type, layout.latent, multiplier),
      packs_directly<Simd, Arithmetic>(p.q_type, layout.rope, multiplier)};
  int32_t token = first_token + item.row_begin / p.heads, head = item.row_begin % p.heads;
  for (int v = 0; v < vectors;) {
    const int width = row_vectors<Simd>(v, vectors);
    std::byte* block = to.words + static_cast<int64_t>(v) * Simd::kLanes * words * 4;
    for (int u = 0; u < width; ++u) {
      const int32_t row = (v + u) * Simd::kLanes;
      const int32_t used = rows - row < Simd::kLanes ? rows - row : Simd::kLanes;
      QuerySegment<Simd> segments[2] = {{p.q_main_type, used, layout.latent, {}},
                                        {p.q_type, used, layout.rope, {}}};
      for (int32_t i = 0; i < used; ++i) {
        segments[0].row[i] = query_row(p.q, item.sequence, token, head);
        segments[1].row[i] = query_row(p.q_pe, item.sequence, token, head);
        if (++head == p.heads) head = 0, ++token;
      }
      const std::byte* source[2][Simd::kLanes];  // rows of the arithmetic
      for (int seg = 0; seg < 2; ++seg) {
        std::byte* encoded = query_rows + (seg == 0 ? 0 : layout.rope_offset);
        for (int32_t i = 0; i < Simd::kLanes; ++i) {
          to.scale[seg][row + i] = 0, to.start[seg][row + i] = 0;
          source[seg][i] =
              direct[seg] && i < used ? segments[seg].row[i] : encoded + i * layout.stride;
        }
        if (direct[seg] || segments[seg].count == 0) continue;
        encode_queries<Simd, Arithmetic, kResidual>(segments[seg], multiplier, factor, key_max,
                                                    encoded, layout.stride, to.scale[seg] + row,
                                                    to.start[seg] + row);
      }
      for (int32_t i = used; i < Simd::kLanes; ++i)
        __builtin_memset(query_rows + i * layout.stride, 0, layout.stride);
      if constexpr (kByQuads) {
        if (width == 1) {
          std::byte* quad = block;
          for (int seg = 0; seg < 2; ++seg) {
            for (int32_t g = 0; g < layout.groups[seg]; g += 4) {
              for (int i = 0; i < 16; ++i, quad += 16)
                __builtin_memcpy(quad, source[seg][i % 4 * 4 + i / 4] + 4 * g, 16);
            }
          }
          continue;
        }
      }
      int32_t done = 0;  // words of the segments before
      for (int seg = 0; seg < 2; done += layout.groups[seg], ++seg) {
        for (int32_t g = 0; g < layout.groups[seg]; g += Simd::kLanes) {
          Word x[Simd::kLanes];
          for (int i = 0; i < Simd::kLanes; ++i) x[i] = Simd::load_word(source[seg][i] + 4 * g);
          Simd::transpose(x);
          const int32_t n =
              layout.groups[seg] - g < Simd::kLanes ? layout.groups[seg] - g : Simd::kLanes;
          for (int i = 0; i < n; ++i) {
            Simd::store_word(
                block + (static_cast<int64_t>(done + g + i) * width + u) * Simd::kLanes * 4, x[i]);
          }
        }
      }
    }
    v += width;
  }
}

}  // namespace
}  // namespace flashmla
