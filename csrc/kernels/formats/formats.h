// formats.h: the list of cache formats: name, storage and row size.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/params.h"

namespace flashmla {

struct FormatInfo {
  const char* name;  // kv_cache_dtype
  CacheFormat format;
  bool packed;       // uint8 rows holding codes and scales; false: one element per value
  int32_t multiple;  // latent and rope must be multiples of this
  // Bytes of one row of latent + rope values.
  int64_t (*row_bytes)(int32_t latent, int32_t rope);
};

const FormatInfo* format_list(int* count);
const FormatInfo* find_format(const char* name, size_t length);  // null: unknown
const FormatInfo& format_info(CacheFormat format);

}  // namespace flashmla
