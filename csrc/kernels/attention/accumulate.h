// accumulate.h: O[row][d] = correction[row] * O[row][d] + P[row][t] V[t][d] for one tile. Lanes are
// value dims; rows of V are interleaved so that one word holds a group of tokens of one dim, and
// one word of P is broadcast. The first tile of a work item finds no O yet.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/blocks.h"
#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"

namespace flashmla {
namespace {

// V of a tile from some column on: pages of `groups` token groups, evenly spaced within a page.
struct ValueColumns {
  const std::byte* page[kTile / kPage];
  int32_t pages, groups;
  int64_t stride;  // bytes from one group to the next
  int64_t row;     // bytes from one token to the next, where groups are not interleaved yet
};

// What to prefetch meanwhile: `step` bytes on with every group of every block.
struct Fetch {
  const std::byte* at;
  int64_t step;
};

// The output of a work item so far.
struct Output {
  float* rows;
  int32_t width;  // values of a row
  bool first;     // there is none
};

// kRows rows from `row` on against kColumns vectors of the output, which starts at value d.
// kInterleave: the columns are rows of V, else words.
template <class Simd, class Arithmetic, int kRows, int kColumns, bool kInterleave>
void accumulate_block(const ValueColumns& values, const Output& output, int32_t d, int32_t row,
                      int32_t rows, const Scratch& s, Fetch& fetch) {
  using Word = typename Simd::Word;
  constexpr int kGroup = Arithmetic::kGroup, kVectorBytes = Simd::kLanes * 4;
  typename Arithmetic::Acc acc[kRows][kColumns];
  float* out = output.rows + static_cast<int64_t>(row) * output.width + d;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) acc[r][c] = typename Arithmetic::Acc{};
  }
  // In registers: what is behind a reference is read and written anew for every group.
  const std::byte *p = s.probability + static_cast<int64_t>(row) * 4, *ahead = fetch.at;
  const int64_t ahead_step = fetch.step, stride = values.stride, value_row = values.row,
                p_step = static_cast<int64_t>(rows) * 4;
  const int32_t groups = values.groups;
  for (int32_t page = 0; page < values.pages; ++page) {
    const std::byte* v = values.page[page];
    for (int32_t g = 0; g < groups; ++g, v += stride, p += p_step) {
      Simd::prefetch(ahead);
      ahead += ahead_step;
      Word value[kColumns];
      if constexpr (kInterleave) {
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; c += kGroup)
          Arithmetic::interleave(v + c / kGroup * kVectorBytes, value_row, value + c);
      } else {
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) value[c] = Simd::load_word(v + c * kVectorBytes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Word probability = Simd::broadcast_word(p + r * 4);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          acc[r][c] = Arithmetic::dot_value(acc[r][c], probability, value[c]);
      }
    }
  }
  fetch.at = ahead;
  // The output so far joins last: the products of the next block do not wait for it.
  auto store = [&]<bool kFirst> {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        float* to = out + r * output.width + c * Simd::kLanes;
        typename Simd::Float sum;
        if constexpr (Arithmetic::kScaled) {
          sum = Simd::mul(Simd::set(s.value_scale[row + r]), Simd::to_float(acc[r][c]));
        } else {
          sum = acc[r][c];
        }
        if constexpr (!kFirst)
          sum = Simd::fma(Simd::set(s.correction[row + r]), Simd::load(to), sum);
        Simd::store(to, sum);
      }
    }
  };
  if (output.first) {
    store.template operator()<true>();
  } else {
    store.template operator()<false>();
  }
}

// All rows that are used: none is computed that nobody asked for.
template <class Simd, class Arithmetic, int kRows, int kColumns, bool kInterleave>
void accumulate_rows(const ValueColumns& values, const Output& output, int32_t d, int32_t used,
                     int32_t rows, const Scratch& s, Fetch& fetch) {
  in_blocks<kRows, 1>(0, used, [&]<int kCount>(int32_t row) {
    accumulate_block<Simd, Arithmetic, kCount, kColumns, kInterleave>(values, output, d, row, rows,
                                                                      s, fetch);
  });
}

// Interleaves one vector of V of every token, from value d on, into scratch: kGroup columns.
template <class Simd, class Arithmetic>
ValueColumns interleave_columns(const Tile& tile, int32_t d, const Scratch& s) {
  constexpr int kGroup = Arithmetic::kGroup, kVectorBytes = Simd::kLanes * 4;
  std::byte* to = s.interleaved;
  for (int32_t page = 0; page < tile.tokens / kPage; ++page) {
    const std::byte* v = tile.value.group[page] + d * Arithmetic::kBytes;
    for (int t = 0; t < kPage; t += kGroup, v += kGroup * tile.value.stride) {
      typename Simd::Word word[kGroup];
      Arithmetic::interleave(v, tile.value.stride, word);
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i, to += kVectorBytes) Simd::store_word(to, word[i]);
    }
  }
  return {{s.interleaved}, 1, tile.tokens / kGroup, kGroup * kVectorBytes, 0};
}

// V as it lies in the tile, from value d on. Rows of a staged tile are neighbours throughout.
template <class Arithmetic>
ValueColumns columns_in_place(const Tile& tile, int32_t d, const Scratch& s) {
  constexpr int kGroup = Arithmetic::kGroup;
  const bool staged = tile.key[0].group[0] == s.staged;
  ValueColumns values;
  values.pages = staged ? 1 : tile.tokens / kPage;
  values.groups = (staged ? tile.tokens : kPage) / kGroup;
  for (int32_t page = 0; page < values.pages; ++page)
    values.page[page] = tile.value.group[page] + d * Arithmetic::kBytes;
  values.stride = kGroup * tile.value.stride;
  values.row = tile.value.stride;
  return values;
}

// The part of the next tile to fetch with the columns from d on: of the second halves of its pages,
// the first ones being fetched by score().
template <class Arithmetic, int kRows, int kColumns>
Fetch fetch_next(const Tile& tile, int32_t d, int32_t used, int32_t width, int lanes) {
  const int32_t pages = tile.tokens / kPage;
  const int64_t half = tile.next_bytes / 2;
  if (half == 0) return {tile.value.group[0], 0};
  const int64_t steps = static_cast<int64_t>(round_up(width, kColumns * lanes)) /
                        (kColumns * lanes) * (round_up(used, kRows) / kRows) * tile.tokens /
                        Arithmetic::kGroup;
  const int64_t at = half * pages * d / width;
  const int64_t step = half * pages / steps + 1;
  return {tile.next[at / half] + half + at % half, step < kCacheLine ? step : kCacheLine};
}

// used: rows that are not padding.
template <class Simd, class Arithmetic>
void accumulate(const Tile& tile, const Output& output, int32_t used, int32_t rows,
                const Scratch& s) {
  // Accumulators leave room for the values, a broadcast and a constant: 6 x 4 of 32 registers, 6 x
  // 2 of 16.
  constexpr int kGroup = Arithmetic::kGroup, kLanes = Simd::kLanes;
  constexpr bool kMany = Simd::kRegisters == 32;
  constexpr int kRows = 6, kColumns = kMany ? 4 : 2;
  const int32_t width = output.width;
  // Interleaving on the fly takes registers that AVX2 has not to spare, and many instructions where
  // groups are of four tokens: then V is interleaved once for all rows, if there are enough of
  // them.
  if constexpr (kGroup == 4 || (kGroup == 2 && !kMany)) {
    if (used > 16 || (kGroup == 4 && !kMany)) {
      for (int32_t d = 0; d < width; d += kGroup * kLanes) {
        Fetch fetch = fetch_next<Arithmetic, kRows, kColumns>(tile, d, used, width, kLanes);
        ValueColumns values = interleave_columns<Simd, Arithmetic>(tile, d, s);
        for (int c = 0; c < kGroup; c += kColumns) {
          accumulate_rows<Simd, Arithmetic, kRows, kColumns, false>(values, output, d + c * kLanes,
                                                                    used, rows, s, fetch);
          values.page[0] += kColumns * kLanes * 4;
        }
      }
      return;
    }
  }
  constexpr bool kInterleave = kGroup > 1;
  constexpr int kWide = kColumns > kGroup ? kColumns : kGroup;
  int32_t d = 0;
  for (; d + kWide * kLanes <= width; d += kWide * kLanes) {
    Fetch fetch = fetch_next<Arithmetic, kRows, kWide>(tile, d, used, width, kLanes);
    accumulate_rows<Simd, Arithmetic, kRows, kWide, kInterleave>(
        columns_in_place<Arithmetic>(tile, d, s), output, d, used, rows, s, fetch);
  }
  for (; d < width; d += kGroup * kLanes) {
    Fetch fetch = {tile.value.group[0], 0};
    accumulate_rows<Simd, Arithmetic, kRows, kGroup, kInterleave>(
        columns_in_place<Arithmetic>(tile, d, s), output, d, used, rows, s, fetch);
  }
}

}  // namespace
}  // namespace flashmla
