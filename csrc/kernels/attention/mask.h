// mask.h: attn_mask as the kernels use it. An interval of kept keys only narrows a row's [first,
// limit); a mask with holes or values becomes an additive tile [t][row].
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/scratch.h"
#include "kernels/call/mask_row.h"
#include "kernels/call/params.h"
#include "kernels/call/plan.h"
#include "kernels/call/visible.h"

namespace flashmla {
namespace {

inline MaskRow mask_row(const AttentionParams& p, int32_t sequence, int32_t row) {
  const int32_t token = query_tokens(p, sequence).begin + row / p.heads, head = row % p.heads;
  return {p.mask_type, p.mask + sequence * p.mask_stride[0] + head * p.mask_stride[1] +
                           token * p.mask_stride[2]};
}

// Rows of one query token whose heads read the same mask row: they see the same keys.
inline bool same_mask(const AttentionParams& p, const WorkItem& item, int32_t a, int32_t b) {
  return p.mask_stride[1] == 0 && (item.row_begin + a) / p.heads == (item.row_begin + b) / p.heads;
}

// Sets [first, limit) of the rows of an item, within its keys. Returns whether the mask has holes
// or values inside. With lists of positions the rows see every token that is gathered, and a mask
// always applies to them one by one.
inline bool find_ranges(const AttentionParams& p, const WorkItem& item, int32_t padded_rows,
                        bool listed, const Scratch& s) {
  if (listed) {
    for (int32_t r = 0; r < padded_rows; ++r)
      s.first[r] = item.key_begin, s.limit[r] = item.key_end;
    return p.mask_type != MaskType::kNone;
  }
  bool holes = false;
  for (int32_t r = 0; r < padded_rows; ++r) {
    if (item.row_begin + r >= item.row_end) {
      // Padding rows see what the first row sees: they never make a tile an edge.
      s.first[r] = s.first[0];
      s.limit[r] = s.limit[0];
      continue;
    }
    const KeyRange keys = visible_to_token(p, item.sequence, (item.row_begin + r) / p.heads);
    int32_t first = keys.begin > item.key_begin ? keys.begin : item.key_begin;
    int32_t limit = keys.end < item.key_end ? keys.end : item.key_end;
    if (limit < first) limit = first;
    if (p.key_ranges) {
      holes = p.mask_type != MaskType::kNone;  // the ranges of the mask are known
    } else if (p.mask_type != MaskType::kNone) {
      const MaskRow mask = mask_row(p, item.sequence, item.row_begin + r);
      if (r > 0 && same_mask(p, item, r, r - 1)) {
        first = s.first[r - 1];
        limit = s.limit[r - 1];
      } else {
        while (first < limit && mask[first] == -__builtin_inff()) ++first;
        while (first < limit && mask[limit - 1] == -__builtin_inff()) --limit;
        for (int32_t t = first; t < limit && !holes; ++t) holes = mask[t] != 0;
      }
    }
    s.first[r] = first;
    s.limit[r] = limit;
  }
  return holes;
}

// The additive tile of the `count` tokens at s.positions, times `factor`; rows and positions
// outside the ranges are left to soften().
inline void fill_bias(const AttentionParams& p, const WorkItem& item, int32_t count, int32_t tokens,
                      int32_t padded_rows, bool listed, float factor, const Scratch& s) {
  for (int32_t r = 0; r < padded_rows; ++r) {
    float* to = s.bias + r;
    if (item.row_begin + r >= item.row_end) {
      for (int32_t t = 0; t < tokens; ++t) to[static_cast<int64_t>(t) * padded_rows] = 0;
      continue;
    }
    const MaskRow mask = mask_row(p, item.sequence, item.row_begin + r);
    if (r > 0 &&
        same_mask(p, item, r, r - 1)) {  // heads that share a mask row copy their neighbour
      for (int32_t t = 0; t < tokens; ++t) {
        to[static_cast<int64_t>(t) * padded_rows] = to[static_cast<int64_t>(t) * padded_rows - 1];
      }
      continue;
    }
    for (int32_t t = 0; t < tokens; ++t) {
      const int32_t position = t < count ? s.positions[t] : -1;
      const bool in = listed ? t < count : position >= s.first[r] && position < s.limit[r];
      to[static_cast<int64_t>(t) * padded_rows] = in ? mask[position] * factor : 0;
    }
  }
}

}  // namespace
}  // namespace flashmla
