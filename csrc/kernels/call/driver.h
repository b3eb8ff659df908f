// driver.h: the entry points the ops call. Plans the work and runs it on the caller's threads, in
// the caller's memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/call/matrix_engine.h"
#include "kernels/call/params.h"
#include "kernels/call/plan.h"

namespace flashmla {

// Threads, memory and matrix products, lent by the caller.
struct Executor {
  int32_t workers;  // threads that parallel_for can use at once
  // Calls body(i, context) once for each i in [0, count), on any thread.
  void (*parallel_for)(int64_t count, void (*body)(int64_t i, void* context), void* context);
  // At least `bytes` bytes, 64-byte aligned, private to the calling thread, kept and reused between
  // calls. `slot`, 0 or 1, tells apart the two buffers that the driver holds at once.
  std::byte* (*scratch)(int slot, size_t bytes);
  const MatrixEngine* engine = nullptr;  // or null: levels that would use one do without
  // Whether the rest of the work is to be left out, results being whatever they are; or null.
  // Asked between items, on every thread.
  bool (*interrupted)() = nullptr;
  // Each step of a call in a region of its own, whose tasks are dealt out evenly: every thread gets
  // one where there are as many. For warming up.
  bool steps_apart = false;
};

void attention(const AttentionParams& params, Plan& plan, const Executor& executor);
// The same between projections: p lacks the main part of queries, and the output.
void projected_attention(AttentionParams p, const ProjectionParams& projections, Plan& plan,
                         const Executor& executor);
// Several expansions of as many heads.
void expand(std::span<const ExpansionParams> params, const Executor& executor);
void append(const AppendParams& params, const Executor& executor);
void gather(const GatherParams& params, const Executor& executor);
void merge_states(const MergeParams& params, const Executor& executor);

}  // namespace flashmla
