// visible.h: which keys a query row sees. The ops, the planner and the kernels share these few
// lines.
#pragma once
#include <cstdint>

#include "kernels/params.h"
#include "kernels/plan.h"

namespace flashmla {
namespace {

// By length, causality (bottom-right aligned), left padding and window; masks narrow it further.
[[maybe_unused]] inline KeyRange visible_to_token(const AttentionParams& p, int32_t sequence,
                                                  int32_t token) {
  const int32_t length = p.cache_seqlens[sequence];
  const int64_t aligned =
      static_cast<int64_t>(length) - p.q_len + token + 1;  // one past the row's own key
  int64_t begin = p.cache_leftpad ? p.cache_leftpad[sequence] : 0;
  int64_t end = p.causal ? aligned : length;
  if (end > length) end = length;
  if (p.window > 0) {
    const int64_t last = p.causal ? aligned : length;
    if (last - p.window > begin) begin = last - p.window;
  }
  if (end < 0) end = 0;
  if (begin > end) begin = end;
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// Entries of the index list of a sequence that count.
[[maybe_unused]] inline int32_t listed(const AttentionParams& p, int32_t sequence) {
  const int32_t length = p.topk_length ? p.topk_length[sequence] : p.topk;
  return length < p.topk ? length : p.topk;
}

}  // namespace
}  // namespace flashmla
