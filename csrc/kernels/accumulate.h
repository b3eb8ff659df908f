// accumulate.h: O[row][d] = correction[row] * O[row][d] + P[row][t] V[t][d] for one tile. Lanes are
// value dims; rows of V are interleaved in registers so that one word holds a group of tokens of
// one dim, and one word of P is broadcast.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/scratch.h"
#include "kernels/tile.h"

namespace flashmla {
namespace {

// kRows rows against kVectors * kGroup vectors of the output, from value element d on.
template <class Simd, class Arithmetic, int kRows, int kVectors>
void accumulate_block(const Tile& tile, int32_t d, int32_t row, int32_t rows, int32_t width,
                      const Scratch& s) {
  using Word = typename Simd::Word;
  constexpr int kGroup = Arithmetic::kGroup, kColumns = kVectors * kGroup;
  typename Arithmetic::Acc acc[kRows][kColumns];
  float* out = s.output + static_cast<int64_t>(row) * width + d;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (Arithmetic::kScaled) {
        acc[r][c] = Simd::zero_word();
      } else {
        acc[r][c] = Simd::mul(Simd::set(s.correction[row + r]),
                              Simd::load(out + r * width + c * Simd::kLanes));
      }
    }
  }
  const std::byte* p = s.probability + static_cast<int64_t>(row) * 4;
  const int64_t stride = tile.value.stride;
  for (int32_t page = 0; page < tile.tokens / kPage; ++page) {
    const std::byte* v = tile.value.group[page] + d * Arithmetic::kBytes;
    for (int t = 0; t < kPage; t += kGroup) {
      Word value[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        Arithmetic::interleave(v + c * Simd::kLanes * 4, stride, value + c * kGroup);
      }
      v += kGroup * stride;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Word probability = Simd::broadcast_word(p + r * 4);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          acc[r][c] = Arithmetic::dot_value(acc[r][c], probability, value[c]);
      }
      p += static_cast<int64_t>(rows) * 4;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      float* to = out + r * width + c * Simd::kLanes;
      if constexpr (Arithmetic::kScaled) {
        const auto before = Simd::mul(Simd::set(s.correction[row + r]), Simd::load(to));
        Simd::store(
            to, Simd::fma(Simd::set(s.value_scale[row + r]), Simd::to_float(acc[r][c]), before));
      } else {
        Simd::store(to, acc[r][c]);
      }
    }
  }
}

// Rows [row, used) in blocks of kRows, the rest in halves: no row is computed that nobody asked
// for.
template <class Simd, class Arithmetic, int kRows, int kVectors>
void accumulate_rows(const Tile& tile, int32_t d, int32_t row, int32_t used, int32_t rows,
                     int32_t width, const Scratch& s) {
  for (; row + kRows <= used; row += kRows) {
    accumulate_block<Simd, Arithmetic, kRows, kVectors>(tile, d, row, rows, width, s);
  }
  if constexpr (kRows > 1)
    accumulate_rows<Simd, Arithmetic, kRows / 2, kVectors>(tile, d, row, used, rows, width, s);
}

// used: rows that are not padding; width: values of an output row.
template <class Simd, class Arithmetic>
void accumulate(const Tile& tile, int32_t used, int32_t rows, int32_t width, const Scratch& s) {
  // Half of the registers accumulate: 4 x 4 of 32; 4 x 2 of 16, or 2 x 4 where an interleave makes
  // four vectors.
  constexpr int kGroup = Arithmetic::kGroup;
  constexpr int kColumns = Simd::kRegisters / 8 > kGroup ? Simd::kRegisters / 8 : kGroup;
  constexpr int kRows = Simd::kRegisters / 2 / kColumns;
  constexpr int kVectors = kColumns / kGroup;
  constexpr int kStep = Simd::kLanes * kGroup;
  int32_t d = 0;
  for (; d + kVectors * kStep <= width; d += kVectors * kStep) {
    accumulate_rows<Simd, Arithmetic, kRows, kVectors>(tile, d, 0, used, rows, width, s);
  }
  for (; d < width; d += kStep)
    accumulate_rows<Simd, Arithmetic, kRows, 1>(tile, d, 0, used, rows, width, s);
}

}  // namespace
}  // namespace flashmla
