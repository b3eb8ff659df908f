// The room arithmetic/: the number formats that products are computed in, one file each, and
// conversions of single numbers (numeric.h). Includes nothing of other rooms.
//
// arithmetic_id.h: names of the arithmetics, for tables and choices.
#pragma once
#include <cstdint>

namespace flashmla {

enum class ArithmeticId : int32_t { kNone, kF32, kBf16, kInt8, kInt16 };

}  // namespace flashmla
