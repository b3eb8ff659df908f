// plan.cpp: cuts the work of a call into items of equal cost.
//
// The cost of every (sequence, row block), causal skipping included, lies on a line; the line is
// cut into as many equal parts as there are workers, at tile multiples. A worker gets whole blocks
// and at most two cut ones, so there are at most two partial results per worker. In deterministic
// mode a block is cut by its own length alone.
#include "kernels/call/plan.h"

#include <algorithm>

#include "kernels/call/visible.h"

namespace flashmla {
namespace {

struct Block {
  int32_t sequence, row_begin, row_end;
  KeyRange keys;
};

int32_t tiles_of(const KeyRange& keys, int32_t tile) {
  if (keys.begin >= keys.end) return 0;
  return (keys.end - 1) / tile - keys.begin / tile + 1;
}

// Key position where tile `index` of a block begins (or its end).
int32_t tile_edge(const KeyRange& keys, int32_t tile, int32_t index) {
  return static_cast<int32_t>(
      std::clamp<int64_t>((int64_t{keys.begin} / tile + index) * tile, keys.begin, keys.end));
}

// Appends the items of a block cut at the given tile indices; items stay in order.
class Emitter {
 public:
  Emitter(Plan& plan, int32_t tile) : plan_(plan), tile_(tile) {}

  void piece(const Block& b, int32_t tile_begin, int32_t tile_end, bool whole) {
    plan_.items.push_back({b.sequence, b.row_begin, b.row_end,
                           whole ? b.keys.begin : tile_edge(b.keys, tile_, tile_begin),
                           whole ? b.keys.end : tile_edge(b.keys, tile_, tile_end),
                           whole ? -1 : plan_.partials});
    if (whole) return;
    if (tile_begin == 0)
      plan_.merges.push_back({b.sequence, b.row_begin, b.row_end, plan_.partials, 0});
    ++plan_.merges.back().count;
    ++plan_.partials;
  }

 private:
  Plan& plan_;
  int32_t tile_;
};

template <class Visit>
void for_each_block(const AttentionParams& p, BlockShape shape, Visit visit) {
  // Index lists differ from token to token: the rows of a block share one.
  for (int32_t b = 0; b < p.batch; ++b) {
    const int32_t rows = p.heads * query_tokens(p, b).count, span = p.indices ? p.heads : rows;
    for (int32_t r = 0; r < rows; r += span) {
      for (int32_t begin = r; begin < r + span; begin += shape.rows) {
        const int32_t end = std::min(r + span, begin + shape.rows);
        visit(Block{b, begin, end, visible_keys(p, b, begin / p.heads, (end - 1) / p.heads + 1)});
      }
    }
  }
}

// A tile costs its rows (in vectors of 16) and a constant for staging; a block costs its packing
// and output.
int64_t tile_cost(const Block& b) { return (b.row_end - b.row_begin + 15) / 16 + 1; }
int64_t block_overhead(const Block& b) { return tile_cost(b); }

// Pieces of a block depend on its keys alone. Which worker runs them changes no bit of them, nor
// when they are merged: a call of many blocks leaves whole blocks to its workers, so that partial
// results take no more memory than those of one block each.
void plan_deterministic(const AttentionParams& p, BlockShape shape, int32_t workers, Plan& plan) {
  constexpr int64_t kBlocksPerWorker = 8;
  auto splits_of = [](const Block& b) {
    return std::clamp((b.keys.end - b.keys.begin) / 1024, 1, 16);
  };
  int64_t blocks = 0, total = 0;
  for_each_block(p, shape, [&](const Block& b) { ++blocks, total += splits_of(b); });
  plan.own_partials = blocks >= kBlocksPerWorker * workers;
  Emitter emit(plan, shape.tile);
  int32_t worker = 1, most = 0;
  int64_t done = 0;
  auto begin_workers = [&] {  // those whose part begins here
    for (; worker < workers && total * worker / workers <= done; ++worker)
      plan.worker_begin.push_back(static_cast<int32_t>(plan.items.size()));
  };
  for_each_block(p, shape, [&](const Block& b) {
    const int32_t tiles = tiles_of(b.keys, shape.tile), splits = splits_of(b);
    for (int32_t i = 0; i < splits; ++i, ++done) {
      if (i == 0 || !plan.own_partials) begin_workers();
      emit.piece(b, tiles * i / splits, tiles * (i + 1) / splits, splits == 1);
    }
    if (!plan.own_partials) return;
    most = std::max(most, plan.partials);
    plan.partials = 0;
    plan.merges.clear();
  });
  if (plan.own_partials) plan.partials = most;
  begin_workers();
}

void plan_balanced(const AttentionParams& p, BlockShape shape, int32_t workers, Plan& plan) {
  int64_t total = 0;
  for_each_block(p, shape, [&](const Block& b) {
    total += block_overhead(b) + tiles_of(b.keys, shape.tile) * tile_cost(b);
  });
  Emitter emit(plan, shape.tile);
  int64_t done = 0;  // cost before the current block
  int32_t worker = 1;
  auto cut = [&] { return total * worker / workers; };  // where the current worker's part ends
  for_each_block(p, shape, [&](const Block& b) {
    const int32_t tiles = tiles_of(b.keys, shape.tile);
    const int64_t cost = block_overhead(b) + tiles * tile_cost(b);
    int32_t from = 0;
    while (worker < workers && cut() < done + cost) {
      // The tile nearest to the cut; a cut at either end leaves the block whole.
      const int64_t at = (cut() - done - block_overhead(b) + tile_cost(b) / 2) / tile_cost(b);
      const auto to = static_cast<int32_t>(std::clamp<int64_t>(at, from, tiles));
      if (to > from && to < tiles) {
        emit.piece(b, from, to, false);
        from = to;
      }
      if (to == tiles) break;  // this worker takes the rest of the block
      plan.worker_begin.push_back(static_cast<int32_t>(plan.items.size()));
      ++worker;
    }
    emit.piece(b, from, tiles, from == 0);
    done += cost;
    while (worker < workers && cut() <= done) {
      plan.worker_begin.push_back(static_cast<int32_t>(plan.items.size()));
      ++worker;
    }
  });
  while (static_cast<int32_t>(plan.worker_begin.size()) < workers) {
    plan.worker_begin.push_back(static_cast<int32_t>(plan.items.size()));
  }
}

}  // namespace

KeyRange visible_keys(const AttentionParams& p, int32_t sequence, int32_t token_begin,
                      int32_t token_end) {
  if (p.indices) return {0, listed(p, sequence)};
  if (p.key_ranges) {
    KeyRange all = {0, 0};
    for (int32_t token = token_begin; token < token_end; ++token) {
      const KeyRange keys = visible_to_token(p, sequence, token);
      if (keys.begin >= keys.end) continue;
      if (all.begin >= all.end) all = keys;
      all = {std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
    }
    return all;
  }
  // Both ends grow with the token, so the first and the last token bound the block.
  const KeyRange first = visible_to_token(p, sequence, token_begin),
                 last = visible_to_token(p, sequence, token_end - 1);
  if (last.begin >= last.end) return {0, 0};
  return {first.begin < first.end ? first.begin : std::min(first.begin, last.begin), last.end};
}

void make_plan(const AttentionParams& p, BlockShape shape, int32_t workers, Plan& plan) {
  plan.shape = shape;
  plan.items.clear();
  plan.worker_begin.assign(1, 0);
  plan.merges.clear();
  plan.partials = 0;
  plan.own_partials = false;
  if (p.deterministic) {
    plan_deterministic(p, shape, workers, plan);
  } else {
    plan_balanced(p, shape, workers, plan);
  }
  plan.worker_begin.push_back(static_cast<int32_t>(plan.items.size()));
}

}  // namespace flashmla
