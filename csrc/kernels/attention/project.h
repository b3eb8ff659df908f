// project.h: the projections around absorbed attention in decoding: q_latent = q W_UK before it,
// out = out_latent W_UV^T behind it.
//
// Few query tokens meet a weight that comes from memory, so each half of it is read once, in the
// order in which it lies, and all tokens take what they need of a row while it is in the L1 cache.
// W_UK's rows are added up, eight at a time, W_UV's are multiplied one by one, or by twos where
// there are few tokens, so that widening a value serves as many products as there are registers
// for. Lines are fetched ahead in the order of memory: several rows at once are several streams,
// which no hardware follows.
//
// A result is one sum, in an order that depends on P, L and the vector length alone: not on the
// tokens that share the row, nor on who computes the rows beside it. Weights and queries are
// widened to f32, and nothing between them and the result is rounded to less.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/blocks.h"
#include "kernels/call/params.h"
#include "kernels/formats/float.h"
#include "kernels/formats/row_layout.h"
#include "kernels/formats/values.h"

namespace flashmla {
namespace {

constexpr int32_t kTokensAtOnce = 8;  // whose latent rows stay in the L1 cache meanwhile
constexpr int32_t kRowsAtOnce = 8;    // of W_UK: what a sum is loaded and stored for
constexpr int kRowsMultiplied = 2;    // of W_UV with few tokens: sums enough for the FMA's latency
constexpr int kProductSums = 2;       // vectors that a product of rows is added up in

// What a unit reads of a weight: `rows` rows of `count` values.
struct WeightBlock {
  const std::byte* data;
  int32_t rows, count;
};

// Where a part of a range of n begins: at multiples of `multiple`.
inline int32_t part_edge(int32_t n, int32_t multiple, int32_t parts, int32_t part) {
  const int64_t edge = static_cast<int64_t>(round_up(n, multiple)) / multiple * part / parts;
  return edge * multiple < n ? static_cast<int32_t>(edge * multiple) : n;
}

// A unit of W_UK is all rows of a head in some columns, whole cache lines of them; a unit of W_UV
// some rows, whole vectors of results.
constexpr int32_t kColumnMultiple = 64;

template <class Simd>
WeightBlock uk_block(const ProjectionParams& p, int32_t parts, int64_t unit) {
  const auto part = static_cast<int32_t>(unit % parts);
  const int32_t begin = part_edge(p.latent, kColumnMultiple, parts, part),
                end = part_edge(p.latent, kColumnMultiple, parts, part + 1);
  return {p.uk.data + unit / parts * p.uk.stride[0] + begin * p.uk.stride[2], p.nope, end - begin};
}

template <class Simd>
WeightBlock uv_block(const ProjectionParams& p, int32_t parts, int64_t unit) {
  const auto part = static_cast<int32_t>(unit % parts);
  const int32_t begin = part_edge(p.value, Simd::kLanes, parts, part),
                end = part_edge(p.value, Simd::kLanes, parts, part + 1);
  return {p.uv.data + unit / parts * p.uv.stride[0] + begin * p.uv.stride[1], end - begin,
          p.latent};
}

using BlockOfUnit = WeightBlock(const ProjectionParams& p, int32_t parts, int64_t unit);

// The rows of units [begin, end) in the order in which they are read, to be fetched some distance
// ahead. Rows whose values are not neighbours are not fetched.
template <class Simd>
class Ahead {
 public:
  Ahead(const ProjectionParams& p, const WeightRows& weight, BlockOfUnit* block_of, int32_t parts,
        int64_t begin, int64_t end)
      : p_(p), weight_(weight), block_of_(block_of), parts_(parts), next_(begin), end_(end) {
    if (weight.stride[2] != size_of(p.type)) next_ = end_;
    constexpr int64_t kDistance = 16384;  // bytes
    for (int64_t bytes = 0; bytes < kDistance;) {
      const std::byte* row = this->row(nullptr);
      if (row == nullptr) return;
      const int64_t row_bytes = block_.count * weight.stride[2];
      for (int64_t i = 0; i < row_bytes; i += kCacheLine) Simd::prefetch(row + i);
      bytes += row_bytes;
    }
  }

  // The next row; behind the last one, `otherwise`.
  const std::byte* row(const std::byte* otherwise) {
    if (block_.rows > 1) {
      --block_.rows;
      return block_.data += weight_.stride[1];
    }
    while (next_ < end_) {
      block_ = block_of_(p_, parts_, next_++);
      if (block_.rows > 0 && block_.count > 0) return block_.data;
    }
    block_.rows = 0;
    return otherwise;
  }

 private:
  const ProjectionParams& p_;
  const WeightRows& weight_;
  BlockOfUnit* block_of_;
  const int32_t parts_;
  int64_t next_;
  const int64_t end_;
  WeightBlock block_ = {};
};

// The first `count` lanes of values, zeros behind them.
template <class Simd, class Element>
typename Simd::Float load_part(const typename Element::Storage* from, int32_t count) {
  typename Element::Storage part[Simd::kLanes] = {};
  __builtin_memcpy(part, from, static_cast<size_t>(count) * sizeof *from);
  return Element::template load<Simd>(part);
}

// Rows of a weight as the steps below read them: in place, or copied value by value where values
// are not neighbours.
template <class Element>
class RowReader {
 public:
  using Storage = typename Element::Storage;

  RowReader(const WeightRows& weight, std::byte* copies) : weight_(weight), copies_(copies) {}

  bool in_place() const { return weight_.stride[2] == sizeof(Storage); }

  // `rows` rows of `count` values from `data` on. Sets the distance from one to the next, in bytes.
  const std::byte* read(const std::byte* data, int32_t rows, int32_t count, int64_t& stride) const {
    stride = weight_.stride[1];
    if (in_place()) return data;
    stride = count * static_cast<int64_t>(sizeof(Storage));
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t i = 0; i < count; ++i) {
        __builtin_memcpy(copies_ + r * stride + i * static_cast<int64_t>(sizeof(Storage)),
                         data + r * weight_.stride[1] + i * weight_.stride[2], sizeof(Storage));
      }
    }
    return copies_;
  }

 private:
  const WeightRows& weight_;
  std::byte* copies_;
};

// Fetches the lines of a few rows, one after the other.
template <class Simd>
class Lines {
 public:
  Lines(const std::byte* const* rows, int count, int64_t row_bytes)
      : row_(rows), last_(rows + count - 1), at_(rows[0]), row_bytes_(row_bytes) {
    end_ = at_ + row_bytes;
  }
  [[gnu::always_inline]] void fetch() {
    Simd::prefetch(at_);
    at_ += kCacheLine;
    if (at_ >= end_) {
      row_ += row_ != last_;
      at_ = *row_;
      end_ = at_ + row_bytes_;
    }
  }

 private:
  const std::byte *const *row_, *const *last_;
  const std::byte *at_, *end_;
  const int64_t row_bytes_;
};

// sums[t][i] += q[t][k] * row k [i], for kRows rows and `tokens` tokens. Fetches as many rows
// `ahead`.
template <class Simd, class Element, int kRows>
void add_rows(const std::byte* rows, int64_t stride, int32_t count, const float* q,
              int64_t q_stride, int32_t tokens, float* sums, int64_t sums_stride,
              const std::byte* const* ahead) {
  using Float = typename Simd::Float;
  using Storage = typename Element::Storage;
  constexpr int kBytes = static_cast<int>(sizeof(Storage)),
                kLines = kRows * Simd::kLanes * kBytes / kCacheLine;
  auto row = [&](int k, int32_t i) {
    return reinterpret_cast<const Storage*>(rows + k * stride) + i;
  };
  auto add = [&](const Float w[kRows], int32_t i) {
    for (int32_t t = 0; t < tokens; ++t) {
      float* to = sums + t * sums_stride + i;
      Float sum = Simd::load(to);
#pragma GCC unroll 8
      for (int k = 0; k < kRows; ++k) sum = Simd::fma_at(w[k], q + t * q_stride + k, sum);
      Simd::store(to, sum);
    }
  };
  Lines<Simd> lines(ahead, kRows, static_cast<int64_t>(count) * kBytes);
  Float w[kRows];
  int32_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) w[k] = Element::template load<Simd>(row(k, i));
    add(w, i);
#pragma GCC unroll 8
    for (int k = 0; k < kLines; ++k) lines.fetch();
  }
  if (i == count) return;
  for (int k = 0; k < kRows; ++k) w[k] = load_part<Simd, Element>(row(k, i), count - i);
  add(w, i);
}

// sum += the products of `count` values, by lane.
template <class Simd, class Element>
[[gnu::noinline]] void add_rest(const typename Element::Storage* weight, const float* x,
                                int32_t count, typename Simd::Float& sum) {
  for (; count > 0; count -= Simd::kLanes, weight += Simd::kLanes, x += Simd::kLanes) {
    if (count >= Simd::kLanes) {
      sum = Simd::fma(Element::template load<Simd>(weight), Simd::load(x), sum);
    } else {  // behind the latent row anything may lie
      sum = Simd::fma(load_part<Simd, Element>(weight, count),
                      load_part<Simd, F32Element>(x, count), sum);
    }
  }
}

// sums[t][lane + r]: the products of row r with the latent rows of kTokens tokens, before their
// lanes are added up. Fetches as many rows `ahead`.
template <class Simd, class Element, int kRows, int kTokens>
void multiply_rows(const std::byte* rows, int64_t stride, int32_t count, const float* x,
                   int64_t x_stride, typename Simd::Float (*sums)[Simd::kLanes], int32_t lane,
                   const std::byte* const* ahead) {
  using Float = typename Simd::Float;
  using Storage = typename Element::Storage;
  constexpr int kStep = kProductSums * Simd::kLanes;
  constexpr int kBytes = static_cast<int>(sizeof(Storage)), kStepBytes = kRows * kStep * kBytes,
                kLines = kStepBytes / kCacheLine;
  auto row = [&](int r, int32_t i) {
    return reinterpret_cast<const Storage*>(rows + r * stride) + i;
  };
  Lines<Simd> lines(ahead, kRows, static_cast<int64_t>(count) * kBytes);
  Float sum[kRows][kTokens][kProductSums];
  for (auto& of_row : sum) {
    for (auto& of_token : of_row) {
      for (Float& x : of_token) x = Simd::zero();
    }
  }
  int32_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kProductSums; ++j) {
      const int32_t at = i + j * Simd::kLanes;
      Float w[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) w[r] = Element::template load<Simd>(row(r, at));
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const Float y = Simd::load(x + t * x_stride + at);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r][t][j] = Simd::fma(w[r], y, sum[r][t][j]);
      }
    }
    if constexpr (kLines == 0) {
      if (i * kRows * kBytes % kCacheLine < kStepBytes) lines.fetch();
    }
#pragma GCC unroll 4
    for (int k = 0; k < kLines; ++k) lines.fetch();
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sums[t][lane + r] = Simd::add(sum[r][t][0], sum[r][t][1]);
  }
  if (i == count) return;
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t)
      add_rest<Simd, Element>(row(r, i), x + t * x_stride + i, count - i, sums[t][lane + r]);
  }
}

inline const std::byte* token_row(const QueryRows& rows, const ProjectionParams& p, int32_t token,
                                  int64_t head) {
  return rows.data + token / p.q_len * rows.stride[0] + token % p.q_len * rows.stride[1] +
         head * rows.stride[2];
}

// Scratch of a task: queries as f32, and copies of rows whose values are not neighbours.
inline int64_t query_floats(const ProjectionParams& p) { return round_up(p.nope, kCacheLine / 4); }

inline size_t projection_scratch(const ProjectionParams& p) {
  const int64_t item = size_of(p.type);
  const bool in_place = p.uk.stride[2] == item && p.uv.stride[2] == item;
  const int64_t copies = in_place ? 0 : kRowsAtOnce * p.latent * item;
  return static_cast<size_t>(kTokensAtOnce * query_floats(p) * 4 + copies);
}

// Units [begin, end) of q_latent = q W_UK.
template <class Simd, class Element>
void project_queries_of(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
                        std::byte* scratch) {
  auto* q = reinterpret_cast<float*>(scratch);
  const int64_t q_stride = query_floats(p), latent_row = p.latent_row;
  const RowReader<Element> reader(p.uk, scratch + kTokensAtOnce * q_stride * 4);
  Ahead<Simd> ahead(p, p.uk, uk_block<Simd>, parts, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    const WeightBlock block = uk_block<Simd>(p, parts, unit);
    const int64_t head = unit / parts;
    const int32_t column = part_edge(p.latent, kColumnMultiple, parts, unit % parts);
    for (int32_t token = 0; block.count > 0 && token < p.tokens; token += kTokensAtOnce) {
      const int32_t tokens = p.tokens - token < kTokensAtOnce ? p.tokens - token : kTokensAtOnce;
      float* sums = p.q_latent + (head * p.tokens + token) * latent_row + column;
      for (int32_t t = 0; t < tokens; ++t) {
        load_values<Simd>(p.type, token_row(p.q, p, token + t, head), p.nope, q + t * q_stride);
        __builtin_memset(sums + t * latent_row, 0,
                         static_cast<size_t>(round_up(block.count, Simd::kLanes)) * 4);
      }
      // The tokens behind the first ones find the rows in the L2 cache.
      const std::byte* fetched[kRowsAtOnce];
      auto fetch = [&](int32_t r, int32_t rows) {
        const std::byte* here = block.data + r * p.uk.stride[1];
        for (int32_t k = 0; k < rows; ++k) fetched[k] = token == 0 ? ahead.row(here) : here;
        return here;
      };
      int64_t stride;
      int32_t r = 0;
      for (; r + kRowsAtOnce <= block.rows; r += kRowsAtOnce) {
        const std::byte* rows =
            reader.read(fetch(r, kRowsAtOnce), kRowsAtOnce, block.count, stride);
        add_rows<Simd, Element, kRowsAtOnce>(rows, stride, block.count, q + r, q_stride, tokens,
                                             sums, latent_row, fetched);
      }
      for (; r < block.rows; ++r) {
        const std::byte* row = reader.read(fetch(r, 1), 1, block.count, stride);
        add_rows<Simd, Element, 1>(row, stride, block.count, q + r, q_stride, tokens, sums,
                                   latent_row, fetched);
      }
    }
  }
}

// Units [begin, end) of out = out_latent W_UV^T.
template <class Simd, class Element>
void project_values_of(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
                       std::byte* scratch) {
  using Float = typename Simd::Float;
  constexpr int kLanes = Simd::kLanes, kProducts = Simd::kRegisters / 2 / kProductSums;
  const int64_t latent_row = p.latent_row;
  const RowReader<Element> reader(p.uv, scratch + kTokensAtOnce * query_floats(p) * 4);
  Ahead<Simd> ahead(p, p.uv, uv_block<Simd>, parts, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    const WeightBlock block = uv_block<Simd>(p, parts, unit);
    const int64_t head = unit / parts;
    const int32_t first_row = part_edge(p.value, kLanes, parts, unit % parts);
    for (int32_t token = 0; token < p.tokens; token += kTokensAtOnce) {
      const int32_t tokens = p.tokens - token < kTokensAtOnce ? p.tokens - token : kTokensAtOnce;
      const float* x = p.out_latent + (head * p.tokens + token) * latent_row;
      for (int32_t r = 0; r < block.rows; r += kLanes) {
        const int32_t rows = block.rows - r < kLanes ? block.rows - r : kLanes;
        Float sums[kTokensAtOnce][kLanes];
        for (int32_t t = 0; t < tokens; ++t) {
          for (int32_t i = rows; i < kLanes; ++i) sums[t][i] = Simd::zero();
        }
        auto multiply = [&]<int kRows>(int32_t i) {
          const std::byte* here = block.data + (r + i) * p.uv.stride[1];
          const std::byte* fetched[kRows];
          for (const std::byte*& row : fetched) row = token == 0 ? ahead.row(here) : here;
          int64_t stride;
          const std::byte* from = reader.read(here, kRows, block.count, stride);
          in_blocks<kProducts / kRows, 1>(0, tokens, [&]<int kTokens>(int32_t t) {
            multiply_rows<Simd, Element, kRows, kTokens>(
                from, stride, block.count, x + t * latent_row, latent_row, sums + t, i, fetched);
          });
        };
        int32_t i = 0;
        const int32_t by_twos = tokens <= kProducts / kRowsMultiplied ? rows : 0;
        for (; i + kRowsMultiplied <= by_twos; i += kRowsMultiplied)
          multiply.template operator()<kRowsMultiplied>(i);
        for (; i < rows; ++i) multiply.template operator()<1>(i);
        for (int32_t t = 0; t < tokens; ++t) {
          const Float result = Simd::sum_lanes(sums[t]);
          auto* to = const_cast<std::byte*>(token_row(p.out, p, token + t, head));
          if (rows == kLanes) {
            store_vector<Simd>(p.type, result, first_row + r, to);
          } else {
            float rest[kLanes];
            Simd::store(rest, result);
            store_values<Simd>(p.type, rest, rows, to + (first_row + r) * size_of(p.type));
          }
        }
      }
    }
  }
}

template <class Simd>
void project_queries(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
                     std::byte* scratch) {
  with_element(p.type, [&]<class Element>(Element) {
    project_queries_of<Simd, Element>(p, parts, begin, end, scratch);
  });
}

template <class Simd>
void project_values(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
                    std::byte* scratch) {
  with_element(p.type, [&]<class Element>(Element) {
    project_values_of<Simd, Element>(p, parts, begin, end, scratch);
  });
}

}  // namespace
}  // namespace flashmla
