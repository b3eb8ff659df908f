// formats.cpp: the list of formats as data.
#include "kernels/formats/formats.h"

#include "kernels/formats/cache_format.h"

namespace flashmla {
namespace {

template <class Format>
constexpr FormatInfo info() {
  return {Format::kName, Format::kFormat, Format::kPacked, Format::kMultiple, &Format::row_bytes};
}

template <class List>
struct Tables;
template <class... Formats>
struct Tables<FormatList<Formats...>> {
  static constexpr int kCount = sizeof...(Formats);
  static constexpr FormatInfo kInfo[kCount] = {info<Formats>()...};

  static constexpr bool in_order() {
    for (int i = 0; i < kCount; ++i) {
      if (kInfo[i].format != static_cast<CacheFormat>(i)) return false;
    }
    return true;
  }
};
using All = Tables<CacheFormats>;
static_assert(All::in_order(), "CacheFormats and CacheFormat must have the same order");

}  // namespace

const FormatInfo* format_list(int* count) {
  *count = All::kCount;
  return All::kInfo;
}

const FormatInfo* find_format(const char* name, size_t length) {
  for (const FormatInfo& f : All::kInfo) {
    if (__builtin_strlen(f.name) == length && __builtin_memcmp(f.name, name, length) == 0)
      return &f;
  }
  return nullptr;
}

const FormatInfo& format_info(CacheFormat format) { return All::kInfo[static_cast<int>(format)]; }

}  // namespace flashmla
