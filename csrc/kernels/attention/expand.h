// expand.h: keys or values of a head from rows of the latent, for the expanded form: a product of
// matrices by the steps that score keys, with rows of the weight in the place of queries. Each
// result is one sum over the latent in the same order, whatever rows there are besides.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/attention.h"
#include "kernels/attention/query.h"
#include "kernels/attention/scratch.h"
#include "kernels/attention/tile.h"
#include "kernels/call/matrix_engine.h"
#include "kernels/call/params.h"
#include "kernels/formats/row_layout.h"
#include "kernels/formats/values.h"

namespace flashmla {
namespace {

template <class Simd, class Arithmetic>
RowLayout latent_layout(const ExpansionParams& p) {
  CacheView cache = {};
  cache.latent = cache.value = p.latent;
  return row_layout<Simd, Arithmetic>(cache);
}

template <class Simd, class Arithmetic, bool kLent>
size_t expansion_scratch(const ExpansionParams& p) {
  const RowLayout layout = latent_layout<Simd, Arithmetic>(p);
  Scratch unused;
  return lay_out<Simd, Arithmetic, kLent>(layout, block_shape<Simd, Arithmetic>(layout), nullptr,
                                          unused);
}

template <class Simd, class Arithmetic, class Products>
void expand(const ExpansionParams& p, int32_t head, const MatrixEngine* engine,
            std::byte* scratch) {
  const Products products(engine);
  const RowLayout layout = latent_layout<Simd, Arithmetic>(p);
  const BlockShape shape = block_shape<Simd, Arithmetic>(layout);
  Scratch s;
  lay_out<Simd, Arithmetic, Products::kLent>(layout, shape, scratch, s);
  s.unit = 1;
  AttentionParams weight = {};  // its rows as those of one query token
  weight.heads = p.width;
  weight.q_len = 1;
  weight.q_type = weight.q_main_type = p.type;
  weight.q.data = const_cast<std::byte*>(p.weight.data + head * p.weight.stride[0]);
  weight.q.stride[2] = p.weight.stride[1];
  weight.q_pe = weight.q;
  const int64_t item = size_of(p.type);
  for (int32_t row = 0; row < p.width; row += shape.rows) {
    const int32_t used = p.width - row < shape.rows ? p.width - row : shape.rows;
    const int32_t rows = round_up(used, Simd::kLanes), vectors = rows / Simd::kLanes;
    pack_queries<Simd, Arithmetic, Products::kQuads>(weight, {0, row, row + used, 0, 0, -1}, layout,
                                                     vectors, 1, 1, 0, s.query_rows, s.query);
    for (int32_t t = 0; t < p.tokens; t += shape.tile) {
      const int32_t count = p.tokens - t < shape.tile ? p.tokens - t : shape.tile;
      Tile tile = {};
      tile.valid = count;
      tile.tokens = round_up(count, kPage);
      Span& span = tile.key[0];
      span.stride = p.row_stride;
      span.words = layout.groups[0];
      const bool last = t + shape.tile >= p.tokens;
      tile.next_bytes = last ? 0 : kPage * p.row_stride;
      for (int32_t g = 0; g < kTile / kPage; ++g) {
        const int32_t page = g * kPage < tile.tokens ? g : 0;
        span.group[g] = p.rows + (t + page * kPage) * p.row_stride;
        tile.next[g] = last ? span.group[g] : span.group[g] + shape.tile * p.row_stride;
      }
      tile.key[1] = tile.value = span;
      tile.key[1].words = 0;
      products.score(tile, vectors, s);
      std::byte* out = p.out + head * p.out_head_stride + t * p.out_token_stride + row * item;
      for (int32_t i = 0; i < count; ++i, out += p.out_token_stride)
        store_values<Simd>(p.type, s.score + static_cast<int64_t>(i) * rows, used, out);
    }
  }
}

}  // namespace
}  // namespace flashmla
