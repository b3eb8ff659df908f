// codec.h: one row of a cache to and from f32, by the scalar code that defines each format.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/params.h"

namespace flashmla {

struct Codec {
  void (*encode)(const float* latent, int32_t l, const float* rope, int32_t r, std::byte* kv_c, std::byte* k_pe);
  void (*decode)(const std::byte* kv_c, const std::byte* k_pe, int32_t l, int32_t r, float* latent, float* rope);
};

const Codec& codec_of(CacheFormat format);

}  // namespace flashmla
