// mask_row.h: one row of attn_mask, as mask_rows.cpp reduces it and the kernels add it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/numeric.h"
#include "kernels/call/params.h"

namespace flashmla {
namespace {

struct MaskRow {
  MaskType type;
  const std::byte* data;

  // Additive value at a column; -inf at and below the lowest finite value of the mask's type.
  float operator[](int32_t column) const {
    constexpr float kNone = -__builtin_inff();
    switch (type) {
      case MaskType::kNone:
        return 0;
      case MaskType::kBool:
        return data[column] != std::byte{0} ? 0 : kNone;
      case MaskType::kF32: {
        float x;
        __builtin_memcpy(&x, data + 4 * static_cast<int64_t>(column), 4);
        return x <= -3.4028234e38f ? kNone : x;
      }
      case MaskType::kBf16: {
        const float x = bf16_to_float(half_at(column));
        return x <= -3.3895313e38f ? kNone : x;
      }
      case MaskType::kF16: {
        const float x = f16_to_float(half_at(column));
        return x <= -65504.0f ? kNone : x;
      }
    }
    return 0;
  }

  uint16_t half_at(int32_t column) const {
    uint16_t x;
    __builtin_memcpy(&x, data + 2 * static_cast<int64_t>(column), 2);
    return x;
  }
};

}  // namespace
}  // namespace flashmla
