// The room formats/: how rows are stored, one file per format; how they are found (slots.h),
// appended and gathered (rows.h) and how they look when staged (row_layout.h). May include call/,
// arithmetic/ and simd/.
//
// cache_format.h: the cache formats as one list of types, in the order of CacheFormat. Adding a
// format: its file, one line here, one enumerator in params.h.
#pragma once
#include "kernels/formats/float.h"
#include "kernels/formats/q4_kv.h"
#include "kernels/formats/q6_0.h"
#include "kernels/formats/q8_0.h"
#include "kernels/formats/q8_kv.h"

namespace flashmla {
namespace {

template <class... Formats>
struct FormatList {};

using CacheFormats = FormatList<F32Format,   //
                                Bf16Format,  //
                                F16Format,   //
                                Q8Kv,        //
                                Q8_0,        //
                                Q6_0,        //
                                Q4Kv>;

}  // namespace
}  // namespace flashmla
