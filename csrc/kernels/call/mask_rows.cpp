// mask_rows.cpp: mask rows -> intervals (mask_rows.h).
#include "kernels/call/mask_rows.h"

#include <cstring>
#include <limits>

#include "kernels/call/mask_row.h"

namespace flashmla {
namespace {

// Bool masks are long (a byte per query and key of a prompt), so they are read in words.
bool bool_extent(const std::byte* row, int32_t columns, int32_t extent[2]) {
  constexpr int kBytes = 8;
  auto word = [row](int32_t at) {
    uint64_t x;
    std::memcpy(&x, row + at, kBytes);
    return x;
  };
  int32_t first = 0, limit = columns;
  while (first + kBytes <= limit && word(first) == 0) first += kBytes;
  while (first < limit && row[first] == std::byte{0}) ++first;
  while (limit - kBytes >= first && word(limit - kBytes) == 0) limit -= kBytes;
  while (limit > first && row[limit - 1] == std::byte{0}) --limit;
  extent[0] = first < limit ? first : 0;
  extent[1] = first < limit ? limit : 0;
  int32_t at = first;
  // A byte of 0 borrows in the subtraction; bytes of 0x80 and more are caught by ~x, and are rare.
  for (; at + kBytes <= limit; at += kBytes) {
    const uint64_t x = word(at);
    if (((x - 0x0101010101010101u) & ~x & 0x8080808080808080u) != 0) return true;
  }
  for (; at < limit; ++at) {
    if (row[at] == std::byte{0}) return true;
  }
  return false;
}

}  // namespace

bool mask_extent(MaskType type, const std::byte* row, int32_t columns, int32_t extent[2]) {
  if (type == MaskType::kBool) return bool_extent(row, columns, extent);
  const MaskRow mask = {type, row};
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  int32_t first = 0, limit = columns;
  while (first < limit && mask[first] == kNone) ++first;
  while (limit > first && mask[limit - 1] == kNone) --limit;
  extent[0] = first < limit ? first : 0;
  extent[1] = first < limit ? limit : 0;
  for (int32_t at = first; at < limit; ++at) {
    if (mask[at] != 0) return true;
  }
  return false;
}

}  // namespace flashmla
