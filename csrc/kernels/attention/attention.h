// The room attention/: the algorithm, each step a file, and its working memory (scratch.h). May
// include formats/, call/, arithmetic/ and simd/.
//
// attention.h: flash attention over one work item.   plan -> [attend] -> merge
//
// The algorithm, written once: Simd is the instruction set, Arithmetic the number format of the
// products, `stage` the codec of the cache. Rows of queries stay in scratch, keys pass by in tiles
// of up to 128 tokens, nothing grows with the context.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/accumulate.h"
#include "kernels/attention/mask.h"
#include "kernels/attention/query.h"
#include "kernels/attention/refine.h"
#include "kernels/attention/score.h"
#include "kernels/attention/scratch.h"
#include "kernels/attention/soften.h"
#include "kernels/attention/tile.h"
#include "kernels/call/matrix_engine.h"
#include "kernels/call/params.h"
#include "kernels/call/plan.h"
#include "kernels/call/visible.h"

// The only functions of a C library the kernels call, besides memcpy and memset.
extern "C" float logf(float) noexcept;
extern "C" float expf(float) noexcept;

namespace flashmla {
namespace {

constexpr float kLn2 = 0.69314718055994531f, kLog2e = 1.44269504088896341f;

inline float sink_logit(const AttentionParams& p, int32_t sequence, int32_t head) {
  return p.attn_sink[sequence * p.attn_sink_stride[0] + head * p.attn_sink_stride[1]];
}

// Divides by the sum, puts the dims back in order and writes the rows out; or, for a partial
// result, into its slot: [rows][value] f32 and [rows] log-sum-exp. computed: there was a key to
// compute with. Returns the rows whose results are not finite, or lack keys (see attend()).
template <class Simd, class Arithmetic>
RowSet finish(const AttentionParams& p, BlockShape shape, const WorkItem& item,
              const RowLayout& layout, bool computed, const Scratch& s, float* partials) {
  constexpr int kStep = Simd::kLanes * Arithmetic::kGroup;
  const int32_t width = layout.value_width, first_token = query_tokens(p, item.sequence).begin;
  float* part = item.partial < 0 ? nullptr : partials + item.partial * partial_floats(shape, width);
  RowSet again;
  auto finite = Simd::zero();  // or NaN
  for (int32_t r = 0; item.row_begin + r < item.row_end; ++r) {
    const int32_t token = first_token + (item.row_begin + r) / p.heads,
                  head = (item.row_begin + r) % p.heads, row_of_part = item.partial_row + r;
    const float sum = s.sum[r], maximum = s.maximum[r] * (kLn2 / s.unit);
    // A row that saw a key has a sum, as its largest weight is 1, unless no score was a number. One
    // that is alone saw what was computed.
    const bool none = sum == 0 && !(item.alone && computed);
    if (none && computed && s.first[r] < s.limit[r]) again.insert(r);
    const float lse = none ? -__builtin_inff() : maximum + logf(sum);
    float total = sum;
    if (part) {
      part[static_cast<int64_t>(shape.rows) * width + row_of_part] = lse;
    } else {
      p.lse[item.sequence * p.lse_stride[0] + head * p.lse_stride[1] + token * p.lse_stride[2]] =
          lse;
      if (p.attn_sink && !none) total += expf(sink_logit(p, item.sequence, head) - maximum);
    }
    // A row without keys is 0 by selection, not by multiplication.
    const auto inverse = Simd::set(none ? 0.0f : 1 / total);
    const float* row = s.output + static_cast<int64_t>(r) * layout.value;
    std::byte* to =
        part ? reinterpret_cast<std::byte*>(part + static_cast<int64_t>(row_of_part) * width)
             : p.out.data + item.sequence * p.out.stride[0] + token * p.out.stride[1] +
                   head * p.out.stride[2];
    const ScalarType type = part ? ScalarType::kF32 : p.out_type;
    for (int32_t d = 0; d < width; d += kStep) {
      typename Simd::Float x[Arithmetic::kGroup];
      for (int i = 0; i < Arithmetic::kGroup; ++i) {
        x[i] = none ? Simd::zero() : Simd::mul(Simd::load(row + d + i * Simd::kLanes), inverse);
        finite = Simd::fma(x[i], Simd::zero(), finite);
      }
      Arithmetic::restore(x);
      if (d + kStep <= width) {
        for (int i = 0; i < Arithmetic::kGroup; ++i)
          store_vector<Simd>(type, x[i], d + i * Simd::kLanes, to);
        continue;
      }
      float rest[kStep];
      for (int i = 0; i < Arithmetic::kGroup; ++i) Simd::store(rest + i * Simd::kLanes, x[i]);
      store_values<Simd>(type, rest, width - d, to + d * size_of(type));
    }
  }
  float lanes[Simd::kLanes], all = 0;
  Simd::store(lanes, finite);
  for (const float x : lanes) all += x;
  if (all != all) {
    for (int32_t r = 0; item.row_begin + r < item.row_end; ++r) {
      const float* row = s.output + static_cast<int64_t>(r) * layout.value;
      float sum = s.sum[r] * 0;
      for (int32_t d = 0; d < layout.value; ++d) sum += row[d] * 0;
      if (sum != sum) again.insert(r);
    }
  }
  return again;
}

// The positions among [begin, end) that the rows of an item see: keys of an item of one row, or
// entries of the index list of its query token. What a mask hides is left out where the row is
// alone, and is left to soften() otherwise. Returns their number.
inline int32_t find_positions(const AttentionParams& p, const WorkItem& item, int32_t begin,
                              int32_t end, int32_t* positions) {
  const int32_t token = item.row_begin / p.heads;
  const KeyRange keys = visible_to_token(p, item.sequence, token);
  const int32_t* list =
      p.indices ? p.indices + item.sequence * p.indices_stride[0] +
                      (query_tokens(p, item.sequence).begin + token) * p.indices_stride[1]
                : nullptr;
  const bool masked = item.alone && p.mask_type != MaskType::kNone;
  const MaskRow mask = masked ? mask_row(p, item.sequence, item.row_begin) : MaskRow{};
  int32_t count = 0;
  for (int32_t i = begin; i < end; ++i) {
    // Read once: another thread may write to the list.
    const int32_t position = list ? __atomic_load_n(list + i, __ATOMIC_RELAXED) : i;
    if (position < keys.begin || position >= keys.end) continue;
    if (masked && mask[position] == -__builtin_inff()) continue;
    positions[count++] = position;
  }
  return count;
}

// Who multiplies: the vector instructions of the level itself (score.h, accumulate.h). The other
// choice is LentProducts (lent_products.h).
template <class Simd, class Arithmetic>
class OwnProducts {
 public:
  static constexpr bool kLent = false;
  static constexpr bool kQuads = flashmla::kQuads<Simd, Arithmetic>;  // how queries are packed
  static constexpr int32_t kTokens = kPage;  // that are neighbours in a tile read in place

  explicit OwnProducts(const MatrixEngine*) {}

  void score(const Tile& tile, int vectors, const Scratch& s) const {
    flashmla::score<Simd, Arithmetic>(tile, vectors, s);
  }
  void accumulate(const Tile& tile, const Output& output, int32_t used, int32_t rows,
                  const Scratch& s) const {
    flashmla::accumulate<Simd, Arithmetic>(tile, output, used, rows, s);
  }
};

// Attends to the keys of an item. A block of rows multiplies the weights of all its rows with the
// values of all keys that one of them sees: where a weight is 0 because the row does not see the
// key, a value that is not finite makes NaN of it. Nor is a score beyond the range of float32 a
// number. Both show in results that are not finite, and nowhere else. The rows of such results are
// returned, to be computed alone: over the keys that the row sees, by numbers of a wider range.
template <class Simd, class Arithmetic, class Products>
RowSet attend(const AttentionParams& p, BlockShape shape, const WorkItem& item, StageRows stage,
              bool native, int32_t key_max, const MatrixEngine* engine, float* partials,
              std::byte* memory) {
  const Products products(engine);
  const RowLayout layout = row_layout<Simd, Arithmetic>(p.cache);
  Scratch s;
  lay_out<Simd, Arithmetic, Products::kLent>(layout, shape, memory, s);
  const int32_t used = item.row_end - item.row_begin;
  const int32_t rows = round_up(used, Simd::kLanes), vectors = rows / Simd::kLanes;

  // Of a row alone, queries are multiplied by 2^-64 (as long as the scale can take that back), and
  // scores by 1/4: logits up to the largest float32 fit, in units of log2 too.
  constexpr float kSmaller = 0x1p-64f, kLargest = 3.4028234e38f;
  s.unit = item.alone ? 0.25f : 1.0f;
  float scale = __builtin_fabsf(p.softmax_scale) * kLog2e;
  if (scale > kLargest) scale = kLargest;
  scale *= s.unit;
  float multiplier = p.softmax_scale < 0 ? -1.0f : 1.0f;
  if (!Arithmetic::kScaled && item.alone && scale < 0x1p60f)
    multiplier *= kSmaller, scale /= kSmaller;
  pack_queries<Simd, Arithmetic, Products::kQuads>(p, item, layout, vectors, multiplier, scale,
                                                   key_max, s.query_rows, s.query);
  [[maybe_unused]] const QueryRounding rounding(s.query, Arithmetic::kResidual ? used : 0, s.unit,
                                                layout);
  [[maybe_unused]] bool residual_packed = false;
  const bool listed = p.indices || item.alone;  // tiles hold the tokens of a list
  const bool holes = find_ranges(p, item, rows, listed, s);
  int32_t begin = s.first[0], end = s.limit[0], all_begin = begin,
          all_end = end;  // keys any / every row sees
  for (int32_t r = 0; r < used; ++r) {
    const int32_t first = s.first[r], limit = s.limit[r];
    if (first < limit) {
      if (begin >= end) begin = first, end = limit;
      begin = first < begin ? first : begin;
      end = limit > end ? limit : end;
    }
    all_begin = first > all_begin ? first : all_begin;
    all_end = limit < all_end ? limit : all_end;
  }
  for (int32_t r = 0; r < rows; ++r) s.maximum[r] = -__builtin_inff(), s.sum[r] = 0;

  const bool packed = Arithmetic::kScaled;
  const bool direct = native && suits_direct<Simd, Arithmetic>(p.cache, item.sequence, layout,
                                                               Products::kTokens, rows);
  const int64_t row_scale = packed ? layout.latent + layout.rope : 0;
  const Tiles tiles(p.cache, item.sequence, layout, stage, direct, Products::kTokens, row_scale,
                    s.staged);
  Output output = {s.output, layout.value, true};
  bool fetched = false;
  for (int32_t at = begin; at < end;) {
    // Tiles end at multiples of the tile length, so that their pages of 16 tokens are whole but for
    // the first and the last.
    const int64_t edge_at = (int64_t{at} / shape.tile + 1) * shape.tile;
    const int32_t next = edge_at < end ? static_cast<int32_t>(edge_at) : end;
    const int32_t count = listed ? find_positions(p, item, at, next, s.positions) : next - at;
    if (count == 0) {  // a list whose entries are all skipped
      at = next;
      continue;
    }
    const Tile tile = listed ? tiles.gather(s.positions, at, count) : tiles(at, next, end, fetched);
    const bool edge = (!listed && (at < all_begin || next > all_end)) || tile.tokens != tile.valid;
    if (holes) {
      for (int32_t t = 0; !listed && t < count; ++t) s.positions[t] = at + t;
      fill_bias(p, item, count, tile.tokens, rows, listed, kLog2e * s.unit, s);
    }
    products.score(tile, vectors, s);
    if constexpr (Arithmetic::kResidual) {
      if (rounding.matters(tile)) {
        if (!residual_packed) {
          pack_queries<Simd, Arithmetic, Products::kQuads, true>(
              p, item, layout, vectors, multiplier, scale, key_max, s.query_rows, s.residual);
          residual_packed = true;
        }
        refine<Simd, Arithmetic, Products::kQuads>(tile, rounding, vectors, s);
      }
    }
    soften<Simd, Arithmetic>(tile, Arithmetic::kScaled ? 1.0f : scale, edge,
                             holes ? s.bias : nullptr, vectors, s);
    products.accumulate(tile, output, used, rows, s);
    output.first = false;
    fetched = !Products::kLent && tile.next_bytes != 0 && tile.tokens == shape.tile;
    at = next;
  }
  return finish<Simd, Arithmetic>(p, shape, item, layout, !output.first, s, partials);
}

// Merges the partial results of a row block by their log-sum-exp and writes the output; the sink
// joins here.
template <class Simd>
void merge(const AttentionParams& p, BlockShape shape, const MergeItem& item,
           const float* partials) {
  const int32_t width = p.cache.value, first_token = query_tokens(p, item.sequence).begin;
  const int64_t slot = partial_floats(shape, width);
  const float* first = partials + item.first * slot;
  for (int32_t r = 0; item.row_begin + r < item.row_end; ++r) {
    const int32_t token = first_token + (item.row_begin + r) / p.heads,
                  head = (item.row_begin + r) % p.heads, row = item.partial_row + r;
    const float* lse = first + static_cast<int64_t>(shape.rows) * width + row;
    float most = -__builtin_inff();
    bool nan = false;
    for (int32_t i = 0; i < item.count; ++i) {
      most = lse[i * slot] > most ? lse[i * slot] : most;
      nan |= lse[i * slot] != lse[i * slot];
    }
    const bool none = most == -__builtin_inff() && !nan;
    float sum = 0;
    for (int32_t i = 0; i < item.count; ++i)
      sum += lse[i * slot] == -__builtin_inff() ? 0 : expf(lse[i * slot] - most);
    p.lse[item.sequence * p.lse_stride[0] + head * p.lse_stride[1] + token * p.lse_stride[2]] =
        none ? -__builtin_inff() : most + logf(sum);
    const float total =
        p.attn_sink && !none ? sum + expf(sink_logit(p, item.sequence, head) - most) : sum;
    std::byte* to = p.out.data + item.sequence * p.out.stride[0] + token * p.out.stride[1] +
                    head * p.out.stride[2];
    constexpr int32_t kChunk = 512;
    for (int32_t d0 = 0; d0 < width; d0 += kChunk) {
      float x[kChunk] = {};
      const int32_t n = width - d0 < kChunk ? width - d0 : kChunk;
      for (int32_t i = 0; i < item.count && !none; ++i) {
        if (lse[i * slot] == -__builtin_inff()) continue;
        const float weight = expf(lse[i * slot] - most) / total;
        const float* from = first + i * slot + static_cast<int64_t>(row) * width + d0;
        for (int32_t d = 0; d < n; ++d) x[d] += weight * from[d];
      }
      store_values<Simd>(p.out_type, x, n, to + d0 * size_of(p.out_type));
    }
  }
}

}  // namespace
}  // namespace flashmla
