// blocks.h: cuts rows or tokens into blocks of registers, whose size the compiler must know.
#pragma once
#include <cstdint>

namespace flashmla {
namespace {

// Calls f<count>(), kLeast <= count <= kMost.
template <int kMost, int kLeast, class F>
[[gnu::always_inline]] inline void with_count(int32_t count, const F& f) {
  if (kMost == kLeast || count == kMost) return f.template operator()<kMost>();
  if constexpr (kMost > kLeast) with_count<kMost - 1, kLeast>(count, f);
}

// Calls block<n>(i) for blocks [i, i + n) of [begin, end), in as few of at most kMost as there can
// be, as even as they come: few products run at less than the full rate. kLeast: the fewest that
// can come of the lengths there are.
template <int kMost, int kLeast, class Block>
[[gnu::always_inline]] inline void in_blocks(int32_t begin, int32_t end, const Block& block) {
  for (int32_t blocks = (end - begin + kMost - 1) / kMost; blocks > 0; --blocks) {
    const int32_t count = (end - begin + blocks - 1) / blocks;
    with_count<kMost, kLeast>(count, [&]<int kCount> { block.template operator()<kCount>(begin); });
    begin += count;
  }
}

}  // namespace
}  // namespace flashmla
