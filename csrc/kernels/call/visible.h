// visible.h: which keys a query row sees. The ops, the planner and the kernels share these few
// lines.
#pragma once
#include <cstdint>

#include "kernels/call/params.h"
#include "kernels/call/plan.h"

namespace flashmla {
namespace {

// Query tokens of a sequence: where they begin in tensors of queries, and how many they are.
struct QueryTokens {
  int32_t begin, count;
};
[[maybe_unused]] inline QueryTokens query_tokens(const AttentionParams& p, int32_t sequence) {
  if (!p.cu_seqlens_q) return {0, p.q_len};
  const int32_t begin = p.cu_seqlens_q[sequence];
  return {begin, p.cu_seqlens_q[sequence + 1] - begin};
}

// By length, causality (bottom-right aligned), left padding, window and the ranges of an interval
// mask; other masks narrow it further. `token` counts from the sequence's first.
[[maybe_unused]] inline KeyRange visible_to_token(const AttentionParams& p, int32_t sequence,
                                                  int32_t token) {
  const int32_t length = p.cache_seqlens[sequence];
  const QueryTokens tokens = query_tokens(p, sequence);
  const int64_t aligned =
      static_cast<int64_t>(length) - tokens.count + token + 1;  // one past the row's own key
  int64_t begin = p.cache_leftpad ? p.cache_leftpad[sequence] : 0;
  int64_t end = p.causal ? aligned : length;
  if (end > length) end = length;
  if (p.window > 0) {
    const int64_t last = p.causal ? aligned : length;
    if (last - p.window > begin) begin = last - p.window;
  }
  if (p.key_ranges) {
    const int32_t* range = p.key_ranges + sequence * p.key_ranges_stride[0] +
                           (tokens.begin + token) * p.key_ranges_stride[1];
    if (range[0] > begin) begin = range[0];
    if (range[1] < end) end = range[1];
  }
  if (p.key_begin > begin) begin = p.key_begin;
  if (p.key_end < end) end = p.key_end;
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
