// encode_queries.h: query rows as rows of the arithmetic, before query.h packs them. As many rows
// as there are lanes at a time: what is slow per row (its largest value, divisions) is done for all
// of them together.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/params.h"
#include "kernels/formats/row_layout.h"
#include "kernels/formats/values.h"

namespace flashmla {
namespace {

// One segment of up to kLanes query rows.
template <class Simd>
struct QuerySegment {
  ScalarType type;
  int32_t rows, count;
  const std::byte* row[Simd::kLanes];
};

// Lane i of the result: the lanes of x[i], combined.
template <class Simd, class Combine>
typename Simd::Word across(typename Simd::Word x[Simd::kLanes], Combine combine) {
  Simd::transpose(x);
#pragma GCC unroll 4
  for (int n = Simd::kLanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) x[i] = combine(x[i], x[i + n]);
  }
  return x[0];
}

// Of each row: its largest magnitude, and magnitudes summed over `slice` values, times 2^-20, so
// that they stay finite: the largest of these sums, and all of them. What is not finite shows in
// the latter only.
template <class Simd>
struct Magnitudes {
  float largest[Simd::kLanes], largest_sum[Simd::kLanes] = {}, sum[Simd::kLanes] = {};

  Magnitudes(const QuerySegment<Simd>& q, int32_t slice) {
    using Float = typename Simd::Float;
    using Word = typename Simd::Word;
    constexpr int kLanes = Simd::kLanes, kSums = 4;
    auto add = [](Word a, Word b) {
      return Simd::as_word(Simd::add(Simd::as_float(a), Simd::as_float(b)));
    };
    auto max = [](Word a, Word b) {
      return Simd::as_word(Simd::max(Simd::as_float(a), Simd::as_float(b)));
    };
    Word most[kLanes], sums[kLanes];
    for (int r = 0; r < kLanes; ++r) most[r] = sums[r] = Simd::zero_word();
    for (int32_t at = 0; at < q.count; at += slice) {
      const int32_t n = q.count - at < slice ? q.count - at : slice;
      with_element(q.type, [&](auto element) {
        for (int32_t r = 0; r < q.rows; ++r) {
          Float m[kSums], s[kSums];
#pragma GCC unroll 4
          for (int v = 0; v < kSums; ++v) m[v] = s[v] = Simd::zero();
          for_vectors<Simd, kSums>(element, q.row[r] + at * size_of(q.type), n,
                                   [&](int32_t, const Float* x) {
#pragma GCC unroll 4
                                     for (int v = 0; v < kSums; ++v) {
                                       const Float magnitude = Simd::abs(x[v]);
                                       m[v] = Simd::max(m[v], magnitude);
                                       s[v] = Simd::fma(magnitude, Simd::set(0x1p-20f), s[v]);
                                     }
                                   });
          m[0] = Simd::max(Simd::max(m[0], m[1]), Simd::max(m[2], m[3]));
          most[r] = Simd::as_word(Simd::max(Simd::as_float(most[r]), m[0]));
          sums[r] = Simd::as_word(Simd::add(Simd::add(s[0], s[1]), Simd::add(s[2], s[3])));
        }
      });
      float added[kLanes];
      Simd::store_word(added, across<Simd>(sums, add));
      for (int r = 0; r < kLanes; ++r) {
        sum[r] += added[r];
        largest_sum[r] = added[r] > largest_sum[r] ? added[r] : largest_sum[r];
        sums[r] = Simd::zero_word();
      }
    }
    Simd::store_word(largest, across<Simd>(most, max));
  }
};

// Scaled arithmetics: codes of each row times `by` (1 or -1), as rows `stride` apart, their scales
// times `factor`, and
// where accumulators start. key_max: largest key code. kResidual: what rounding leaves of a query
// instead.
template <class Simd, class Arithmetic, bool kResidual>
  requires(Arithmetic::kScaled)
void encode_queries(const QuerySegment<Simd>& q, float by, float factor, int32_t key_max,
                    std::byte* to, int64_t stride, float* scale, int32_t* start) {
  using Word = typename Simd::Word;
  using Float = typename Simd::Float;
  constexpr int kGroup = Arithmetic::kGroup, kLanes = Simd::kLanes;
  const int32_t per_sum = Arithmetic::values_per_sum(key_max);
  const Magnitudes<Simd> magnitudes(q, per_sum);
  float multiplier[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    const float m = magnitudes.largest[r];
    const float resolution =
        m > 1e-30f ? Arithmetic::query_resolution(m, magnitudes.largest_sum[r],
                                                  q.count < per_sum ? q.count : per_sum, key_max)
                   : 0;
    multiplier[r] = by * resolution;
    scale[r] = m > 1e-30f ? factor / resolution : 0.0f;
    if constexpr (kResidual) scale[r] /= Arithmetic::kResidualUnit;
    scale[r] += 0 * magnitudes.sum[r];  // NaN where a value is not finite
  }

  with_element(q.type, [&](auto element) {
    for (int32_t r = 0; r < q.rows; ++r) {
      const auto codes = Simd::set(multiplier[r]);
      for_vectors<Simd, kGroup>(element, q.row[r], q.count, [&](int32_t i, Float* x) {
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; ++v) {
          x[v] = Simd::mul(x[v], codes);
          if constexpr (kResidual) {
            x[v] =
                Simd::mul(Simd::sub(x[v], Simd::round(x[v])), Simd::set(Arithmetic::kResidualUnit));
          }
        }
        Arithmetic::store_query(to + r * stride + i * Arithmetic::kBytes, x);
      });
    }
  });
  if constexpr (Arithmetic::kBiased) {
    Word sums[kLanes];
    for (int32_t r = 0; r < kLanes; ++r) {
      sums[r] = r < q.rows ? Arithmetic::sum_codes(to + r * stride, q.count) : Simd::zero_word();
    }
    Simd::store_word(start,
                     across<Simd>(sums, [](Word a, Word b) { return Simd::add_word(a, b); }));
    for (int r = 0; r < kLanes; ++r) start[r] *= Arithmetic::kStart;
  }
}

// Other arithmetics: the values of each row times `by`.
template <class Simd, class Arithmetic, bool kResidual>
void encode_queries(const QuerySegment<Simd>& q, float by, float, int32_t, std::byte* to,
                    int64_t stride, float*, int32_t*) {
  constexpr int kGroup = Arithmetic::kGroup;
  with_element(q.type, [&](auto element) {
    for (int32_t r = 0; r < q.rows; ++r) {
      auto store = [&](int32_t i, typename Simd::Float* x) {
#pragma GCC unroll 2
        for (int v = 0; v < kGroup; ++v) x[v] = Simd::mul(x[v], Simd::set(by));
        Arithmetic::store_query(to + r * stride + i * Arithmetic::kBytes, x);
      };
      for_vectors<Simd, kGroup>(element, q.row[r], q.count, store);
    }
  });
}

}  // namespace
}  // namespace flashmla
