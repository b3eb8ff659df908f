// plan.h: lengths + rows + workers -> work items. Pure data: the kernels execute it, tests read it.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/call/params.h"

namespace flashmla {

// Rows and tokens of one step of the algorithm, chosen by the kernels for the dimensions at hand.
struct BlockShape {
  int32_t rows;  // query rows per work item, at most
  int32_t tile;  // tokens per tile
};

// One block of query rows of one sequence against one range of keys. Row r is query token r / H,
// head r % H. With index lists a block belongs to one query token and the range counts entries of
// its list.
struct WorkItem {
  int32_t sequence;
  int32_t row_begin, row_end;
  int32_t key_begin, key_end;
  int32_t partial;  // slot of the partial result, or -1: the item covers all keys and writes the
                    // output itself
  int32_t partial_row = 0;  // row of the slot that row_begin is
  bool alone = false;       // one row, computed over the keys that it sees and no others
};

// Rows of a work item, counted from its first.
struct RowSet {
  uint64_t words[2] = {};

  bool empty() const { return (words[0] | words[1]) == 0; }
  bool contains(int32_t row) const { return (words[row / 64] >> row % 64 & 1) != 0; }
  void insert(int32_t row) { words[row / 64] |= uint64_t{1} << row % 64; }
};

// A row block whose keys were split: merge partials [first, first + count).
struct MergeItem {
  int32_t sequence;
  int32_t row_begin, row_end;
  int32_t first, count;
  int32_t partial_row = 0;  // row of the slots that row_begin is
};

struct Plan {
  BlockShape shape;
  std::vector<WorkItem> items;
  std::vector<int32_t>
      worker_begin;  // worker w executes items [worker_begin[w], worker_begin[w + 1])
  std::vector<MergeItem> merges;
  int32_t partials = 0;  // slots of partial results
  // The slots are each worker's own, for one block at a time: items of a block follow one another,
  // from slot 0 on, and the worker merges them behind the last one. There are no merges then.
  bool own_partials = false;
};

// Keys that at least one row of a block can see by length, causality, left padding and window
// (masks narrow it later); or, with index lists, entries of the list.
struct KeyRange {
  int32_t begin, end;
};
KeyRange visible_keys(const AttentionParams& p, int32_t sequence, int32_t token_begin,
                      int32_t token_end);

// Fills `plan` (reusing its memory). `workers` >= 1.
void make_plan(const AttentionParams& p, BlockShape shape, int32_t workers, Plan& plan);

}  // namespace flashmla
