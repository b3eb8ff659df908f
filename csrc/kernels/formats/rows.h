// rows.h: append and gather, row by row: f32 -> format and back. The codecs are plain C++, the same
// on every level, compiled with each level's flags; floating point contraction is off, so every
// level writes the same bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/params.h"
#include "kernels/formats/cache_format.h"
#include "kernels/formats/slots.h"
#include "kernels/formats/values.h"

namespace flashmla {
namespace {

struct Codec {
  void (*encode)(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* kv_c,
                 std::byte* k_pe);
  void (*decode)(const std::byte* kv_c, const std::byte* k_pe, int32_t l, int32_t r, float* latent,
                 float* rope);
};

template <class List>
struct Codecs;
template <class... Formats>
struct Codecs<FormatList<Formats...>> {
  static constexpr Codec kAll[] = {{&Formats::encode, &Formats::decode}...};
};

// `row`: L + R floats of scratch.
template <class Simd>
void append_rows(const AppendParams& p, int64_t begin, int64_t end, float* row) {
  const CacheView& cache = p.cache;
  const auto encode = Codecs<CacheFormats>::kAll[static_cast<int>(cache.format)].encode;
  float* rope = row + cache.latent;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = p.slot_mapping[i];
    if (slot < 0) continue;
    load_values<Simd>(p.type, p.kv_c + i * p.kv_c_stride, cache.latent, row);
    if (cache.rope > 0) load_values<Simd>(p.type, p.k_pe + i * p.k_pe_stride, cache.rope, rope);
    const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
    encode(row, cache.latent, rope, cache.rope,
           cache.kv_c.data + block * cache.kv_c.block_stride + offset * cache.kv_c.token_stride,
           cache.k_pe.data + block * cache.k_pe.block_stride + offset * cache.k_pe.token_stride);
  }
}

// Rows [begin, end) of B * N. `row`: L + R floats of scratch.
template <class Simd>
void gather_rows(const GatherParams& p, int64_t begin, int64_t end, float* row) {
  const CacheView& cache = p.cache;
  const auto decode = Codecs<CacheFormats>::kAll[static_cast<int>(cache.format)].decode;
  const int32_t width = cache.latent + cache.rope;
  const int64_t out_bytes = static_cast<int64_t>(width) * size_of(p.out_type);
  for (int64_t i = begin; i < end; ++i) {
    const auto sequence = static_cast<int32_t>(i / p.max_seqlen);
    const int64_t token = p.begin + i % p.max_seqlen;
    std::byte* out = p.out + i * out_bytes;
    if (token >= p.cache_seqlens[sequence]) {
      __builtin_memset(out, 0, static_cast<size_t>(out_bytes));
      continue;
    }
    const RowAddress from = Slots(cache, sequence)[static_cast<int32_t>(token)];
    decode(from.kv_c, from.k_pe, cache.latent, cache.rope, row, row + cache.latent);
    store_values<Simd>(p.out_type, row, width, out);
  }
}

}  // namespace
}  // namespace flashmla
