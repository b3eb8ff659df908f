// tile.h: up to 128 tokens as the algorithm sees them, direct from the cache or staged: codec +
// slots -> Tile.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/formats/row_layout.h"
#include "kernels/formats/slots.h"

namespace flashmla {
namespace {

// One segment of the rows of a tile: token t is at group[t / 16] + (t % 16) * stride.
struct Span {
  const std::byte* group[kTile / kPage];
  int64_t stride;  // bytes
  int32_t words;   // 32-bit groups per row
  int64_t scale;   // bytes from a row to its f32 scale (scaled arithmetics)
};

struct Tile {
  int32_t begin;  // position of token 0
  int32_t valid;  // tokens of the cache
  int32_t
      tokens;   // `valid` rounded up to 16: the last ones may be padding (zero rows), to be masked
  Span key[2];  // latent and rope
  Span value;
  // Pages of the next tile in the cache, to be prefetched meanwhile: as many as this one has.
  const std::byte* next[kTile / kPage];
  int64_t next_bytes;  // per page; 0: there is none, or its rows are not neighbours
};

// Decodes `count` <= kStagedRows rows into neighbours.
constexpr int kStagedRows = 8;
using StageRows = void (*)(const RowAddress* from, int32_t count, const RowLayout& layout,
                           std::byte* rows);

// Makes the tiles of one work item.
class Tiles {
 public:
  // direct: rows of the cache already are rows of the arithmetic and suit the kernels (see
  // suits_direct), as long as a tile is whole runs of `page` tokens.
  Tiles(const CacheView& cache, int32_t sequence, const RowLayout& layout, StageRows stage,
        bool direct, int32_t page, int64_t row_scale, std::byte* scratch)
      : cache_(cache),
        slots_(cache, sequence),
        layout_(layout),
        stage_(stage),
        direct_(direct),
        page_(page),
        row_scale_(row_scale),
        scratch_(scratch) {}

  // The tile of the tokens at `positions`, in that order, as if they stood at [begin, begin +
  // count).
  Tile gather(const int32_t* positions, int32_t begin, int32_t count) const {
    return staged_tile(begin, begin + count, true, [=](int32_t t) { return positions[t - begin]; });
  }

  // The tile of positions [begin, end); the next ones go on to `last`. fetched: the products of the
  // tile before have fetched what it named `next`.
  Tile operator()(int32_t begin, int32_t end, int32_t last, bool fetched) const {
    const bool whole = begin % page_ == 0 && end % page_ == 0;
    Tile tile = direct_ && whole
                    ? direct_tile(begin, end)
                    : staged_tile(begin, end, !fetched || apart(), [](int32_t t) { return t; });
    find_next(tile, end, last);
    return tile;
  }

 private:
  Tile direct_tile(int32_t begin, int32_t end) const {
    Tile tile = {};
    tile.begin = begin;
    tile.valid = tile.tokens = end - begin;
    const int32_t groups = tile.tokens / kPage;
    for (int32_t g = 0; g < groups; ++g) {
      const RowAddress row = slots_[begin + g * kPage];
      tile.key[0].group[g] = row.kv_c;
      tile.key[1].group[g] = row.k_pe;
      tile.value.group[g] = row.v;
    }
    tile.value.stride = cache_.v.token_stride;
    tile.key[0].stride = cache_.kv_c.token_stride;
    tile.key[1].stride = cache_.k_pe.token_stride;
    // Packed rows: the scales follow the codes, one f32 per segment.
    tile.key[0].scale = row_scale_;
    tile.key[1].scale = row_scale_ + 4;
    if (row_scale_ != 0) {
      for (int32_t g = 0; g < groups; ++g)
        tile.key[1].group[g] = tile.key[0].group[g] + layout_.latent;
      tile.key[1].stride = tile.key[0].stride;
      tile.key[1].scale -= layout_.latent;
    }
    return finish(tile);
  }

  // fetch: rows are to be prefetched.
  template <class Position>
  Tile staged_tile(int32_t begin, int32_t end, bool fetch, Position position) const {
    Tile tile = {};
    tile.begin = begin;
    tile.valid = end - begin;
    tile.tokens = round_up(tile.valid, kPage);
    std::byte* row = scratch_;
    RowAddress from[kStagedRows];
    for (int32_t t = begin, count; t < end; t += count, row += count * layout_.stride) {
      count = end - t < kStagedRows ? end - t : kStagedRows;
      for (int32_t i = 0; i < count; ++i) {
        from[i] = slots_[position(t + i)];
        if (fetch && kStagedRows < end - t - i) prefetch_row(slots_[position(t + i + kStagedRows)]);
      }
      stage_(from, count, layout_, row);
    }
    // Padding rows are zero, scales included (0 * NaN would be NaN).
    const int64_t rest = static_cast<int64_t>(tile.tokens - tile.valid) * layout_.stride;
    if (rest > 0) __builtin_memset(row, 0, rest);
    for (int32_t g = 0; g < tile.tokens / kPage; ++g) {
      tile.key[0].group[g] = scratch_ + g * kPage * layout_.stride;
      tile.key[1].group[g] = tile.key[0].group[g] + layout_.rope_offset;
      tile.value.group[g] = tile.key[0].group[g] + layout_.value_offset;
    }
    tile.key[0].stride = tile.key[1].stride = tile.value.stride = layout_.stride;
    tile.key[0].scale = layout_.scale_offset;
    tile.key[1].scale = layout_.scale_offset + 4 - layout_.rope_offset;
    return finish(tile);
  }

  void find_next(Tile& tile, int32_t end, int32_t last) const {
    if (end >= last || end % kPage != 0 || !slots_.whole_pages(kPage)) return;
    if (cache_.kv_c.token_stride > kLongestRow) return;  // mostly gaps
    tile.next_bytes = kPage * cache_.kv_c.token_stride;
    const int32_t last_page = (last - 1) / kPage * kPage;
    for (int32_t g = 0; g < tile.tokens / kPage; ++g) {
      const int64_t token = int64_t{end} + g * kPage;
      tile.next[g] = slots_[token < last_page ? static_cast<int32_t>(token) : last_page].kv_c;
    }
  }

  Tile finish(Tile tile) const {
    tile.key[0].words = layout_.groups[0];
    tile.key[1].words = layout_.groups[1];
    if (layout_.value_offset == 0) tile.value = tile.key[0];
    for (const std::byte*& page : tile.next) page = tile.key[0].group[0];
    return tile;
  }

  void prefetch_row(const RowAddress& row) const {
    prefetch_bytes(row.kv_c, cache_.kv_c.token_stride);
    if (row.v) prefetch_bytes(row.v, cache_.v.token_stride);
    if (rope_apart()) prefetch_bytes(row.k_pe, cache_.k_pe.token_stride);
  }
  // Whether rows of the rope part, or any others, are not those of kv_c.
  bool rope_apart() const {
    return cache_.k_pe.data < cache_.kv_c.data ||
           cache_.k_pe.data >= cache_.kv_c.data + cache_.kv_c.token_stride;
  }
  bool apart() const { return cache_.v.data != nullptr || rope_apart(); }
  static constexpr int64_t kLongestRow = 4096;  // bytes
  static void prefetch_bytes(const std::byte* p, int64_t count) {
    for (int64_t i = 0; i < count && i < kLongestRow; i += kCacheLine) __builtin_prefetch(p + i);
  }

  const CacheView& cache_;
  Slots slots_;
  const RowLayout& layout_;
  StageRows stage_;
  bool direct_;
  int32_t page_;
  int64_t row_scale_;
  std::byte* scratch_;
};

// Whether rows of `stride` bytes spread over the L1 cache well enough to be read in place by `rows`
// query rows: strides that share a large power of two fall into few of its sets, so that rows of
// values are gone before the next few query rows want them.
[[maybe_unused]] inline bool spreads(int64_t stride, int32_t rows) {
  return stride % (8 * kCacheLine) != 0 || rows < 32;
}

// Whether tiles of whole pages can be read in place: the tokens of a page are neighbours in memory,
// every row is whole vectors and words of the arithmetic, and the strides suit the cache.
template <class Simd, class Arithmetic>
bool suits_direct(const CacheView& cache, int32_t sequence, const RowLayout& layout, int32_t page,
                  int32_t rows) {
  return Slots(cache, sequence).whole_pages(page) && layout.value == layout.value_width &&
         layout.latent % Arithmetic::kGroup == 0 && layout.rope % Arithmetic::kGroup == 0 &&
         spreads(cache.kv_c.token_stride, rows) &&
         (layout.value_offset == 0 || spreads(cache.v.token_stride, rows));
}

}  // namespace
}  // namespace flashmla
