// query.h: packs a block of query rows so that lanes are rows: [row block][word][row], the operand
// of score().
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/params.h"
#include "kernels/plan.h"
#include "kernels/scratch.h"
#include "kernels/values.h"
#include "kernels/visible.h"

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

template <class Simd>
float add_lanes(typename Simd::Float x) {
  float lanes[Simd::kLanes];
  Simd::store(lanes, x);
  for (int n = Simd::kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

// One segment of one query row, times `sign`, as arithmetic elements. For scaled arithmetics also
// its scale, times `factor`, and the start value of its accumulators. key_max: largest key code.
// kResidual: what rounding leaves of it instead.
template <class Simd, class Arithmetic, bool kResidual>
void encode_query(ScalarType type, const std::byte* from, int32_t count, float sign, float factor,
                  int32_t key_max, std::byte* to, float* scale, int32_t* start) {
  constexpr int kGroup = Arithmetic::kGroup, kVector = Simd::kLanes * kGroup;
  constexpr int kChunk = 512;  // values widened at a time
  float wide[kChunk];
  float multiplier = sign;
  const int64_t size = size_of(type);
  if constexpr (Arithmetic::kScaled) {
    const int32_t per_sum = Arithmetic::values_per_sum(key_max);
    typename Simd::Float most[kGroup], sum[kGroup];
    for (int v = 0; v < kGroup; ++v) most[v] = sum[v] = Simd::zero();
    float total = 0, largest_sum = 0;
    for (int32_t at = 0; at < count; at += kChunk) {
      const int32_t n = count - at < kChunk ? count - at : kChunk;
      load_values<Simd>(type, from + at * size, n, round_up(n, kVector), wide);
      for (int32_t i = 0; i < n; i += kVector) {
        for (int v = 0; v < kGroup; ++v) {
          const auto magnitude = Simd::abs(Simd::load(wide + i + v * Simd::kLanes));
          most[v] = Simd::max(most[v], magnitude);
          // Scaled down, so that it stays finite: 2^20 > 65536 values.
          sum[v] = Simd::fma(magnitude, Simd::set(0x1p-20f), sum[v]);
        }
        if ((at + i + kVector) % per_sum != 0 && at + i + kVector < count) continue;
        for (int v = 1; v < kGroup; ++v) sum[0] = Simd::add(sum[0], sum[v]);
        const float added = add_lanes<Simd>(sum[0]);
        total += added;
        largest_sum = added > largest_sum ? added : largest_sum;
        for (int v = 0; v < kGroup; ++v) sum[v] = Simd::zero();
      }
    }
    for (int v = 1; v < kGroup; ++v) most[0] = Simd::max(most[0], most[v]);
    const float m = Simd::reduce_max(most[0]);
    const float resolution = m > 1e-30f
                                 ? Arithmetic::query_resolution(
                                       m, largest_sum, count < per_sum ? count : per_sum, key_max)
                                 : 0;
    multiplier = sign * resolution;
    *scale = m > 1e-30f ? factor / resolution : 0.0f;
    if constexpr (kResidual) *scale /= Arithmetic::kResidualUnit;
    *scale += 0 * total;  // NaN where a value is not finite
  }
  for (int32_t at = 0; at < count; at += kChunk) {
    const int32_t n = count - at < kChunk ? count - at : kChunk;
    if (!Arithmetic::kScaled || count > kChunk)
      load_values<Simd>(type, from + at * size, n, round_up(n, kVector), wide);
    for (int32_t i = 0; i < n; i += kVector) {
      typename Simd::Float x[kGroup];
      for (int v = 0; v < kGroup; ++v) {
        x[v] = Simd::mul(Simd::load(wide + i + v * Simd::kLanes), Simd::set(multiplier));
        if constexpr (kResidual) {
          x[v] =
              Simd::mul(Simd::sub(x[v], Simd::round(x[v])), Simd::set(Arithmetic::kResidualUnit));
        }
      }
      Arithmetic::store_query(to + (at + i) * Arithmetic::kBytes, x);
    }
  }
  if constexpr (Arithmetic::kBiased) *start = Arithmetic::query_start(to, count);
}

// Queries that already are rows of the arithmetic (of its only type of that size) in whole vectors
// of words need no copy.
template <class Simd, class Arithmetic>
bool packs_directly(const AttentionParams& p, const RowLayout& layout) {
  return !Arithmetic::kScaled && size_of(p.q_type) == Arithmetic::kBytes && p.softmax_scale >= 0 &&
         layout.latent % (Simd::kLanes * Arithmetic::kGroup) == 0 &&
         layout.rope % (Simd::kLanes * Arithmetic::kGroup) == 0;
}

// Packs rows [item.row_begin, item.row_end), zero rows up to `vectors` whole vectors. The sign of
// the softmax scale goes into the query, so that a larger score is a larger logit; `factor`, into
// the scales of scaled arithmetics. query_rows: kLanes rows of the arithmetic, to work in.
template <class Simd, class Arithmetic, bool kByQuads, bool kResidual = false>
void pack_queries(const AttentionParams& p, const WorkItem& item, const RowLayout& layout,
                  int vectors, float factor, int32_t key_max, std::byte* query_rows,
                  PackedQueries& to) {
  const float sign = p.softmax_scale < 0 ? -1.0f : 1.0f;
  const int32_t first_token = query_tokens(p, item.sequence).begin;
  if constexpr (Arithmetic::kPartialSums)
    to.words_per_sum = Arithmetic::values_per_sum(key_max) / Arithmetic::kGroup;
  using Word = typename Simd::Word;
  const int32_t rows = item.row_end - item.row_begin;
  const int32_t words = layout.groups[0] + layout.groups[1];
  const bool direct = packs_directly<Simd, Arithmetic>(p, layout);
  const std::byte* source[2][Simd::kLanes];  // rows of one vector, per segment
  for (int v = 0; v < vectors;) {
    const int width = row_vectors<Simd>(v, vectors);
    std::byte* block = to.words + static_cast<int64_t>(v) * Simd::kLanes * words * 4;
    for (int u = 0; u < width; ++u) {
      for (int i = 0; i < Simd::kLanes; ++i) {
        const int32_t r = (v + u) * Simd::kLanes + i;
        std::byte* row = query_rows + i * layout.stride;
        for (int seg = 0; seg < 2; ++seg) to.scale[seg][r] = 0, to.start[seg][r] = 0;
        source[0][i] = row;
        source[1][i] = row + layout.rope_offset;
        if (r >= rows) {
          __builtin_memset(row, 0, layout.stride);
          continue;
        }
        const int32_t token = first_token + (item.row_begin + r) / p.heads,
                      head = (item.row_begin + r) % p.heads;
        const std::byte* q = query_row(p.q, item.sequence, token, head);
        const std::byte* q_pe = query_row(p.q_pe, item.sequence, token, head);
        if (direct) {
          source[0][i] = q;
          source[1][i] = q_pe;
          continue;
        }
        encode_query<Simd, Arithmetic, kResidual>(p.q_type, q, layout.latent, sign, factor, key_max,
                                                  row, to.scale[0] + r, to.start[0] + r);
        if (layout.rope == 0) continue;
        encode_query<Simd, Arithmetic, kResidual>(p.q_type, q_pe, layout.rope, sign, factor,
                                                  key_max, row + layout.rope_offset,
                                                  to.scale[1] + r, to.start[1] + r);
      }
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
