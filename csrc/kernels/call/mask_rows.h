// mask_rows.h: the extent of a mask row. Most masks only hide keys at the ends of a row (causality,
// padding, windows); such a row is an interval, which is all that planner and kernels need of it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/params.h"

namespace flashmla {

// Writes the first kept key and one past the last (0, 0: none) among `columns` of a row. Returns
// whether anything between them is hidden, or any kept key has a value to add.
bool mask_extent(MaskType type, const std::byte* row, int32_t columns, int32_t extent[2]);

}  // namespace flashmla
