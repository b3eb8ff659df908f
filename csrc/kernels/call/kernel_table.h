// kernel_table.h: what one instruction set offers, as function pointers. dispatch.cpp picks a table
// once; driver.cpp calls it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/arithmetic_id.h"
#include "kernels/call/matrix_engine.h"
#include "kernels/call/params.h"
#include "kernels/call/plan.h"

namespace flashmla {

struct KernelTable {
  const char* name;
  // Block shape and scratch of a call: pure functions of the dimensions, the format and the query
  // type.
  BlockShape (*block_shape)(const AttentionParams& p);
  size_t (*scratch_bytes)(const AttentionParams& p, BlockShape shape);
  // Floats of one partial result.
  int64_t (*partial_floats)(const AttentionParams& p, BlockShape shape);
  // Executes one item. `partials`: plan.partials * partial_floats; `scratch`: scratch_bytes,
  // private to the thread. `engine`: for levels that use one, may be null. Returns the rows whose
  // results are not finite and may become so when they are computed alone.
  RowSet (*attend)(const AttentionParams& p, BlockShape shape, const WorkItem& item,
                   const MatrixEngine* engine, float* partials, std::byte* scratch);
  void (*merge)(const AttentionParams& p, BlockShape shape, const MergeItem& item,
                const float* partials);
  // The projections of a decode step (project.h), by units of `parts` to a head; `scratch`:
  // projection_scratch bytes, private to the thread.
  size_t (*projection_scratch)(const ProjectionParams& p);
  void (*project_queries)(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
                          std::byte* scratch);
  void (*project_values)(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
                         std::byte* scratch);
  // A head of an expansion (expand.h). `engine` and `scratch`: as for attend.
  size_t (*expansion_scratch)(const ExpansionParams& p);
  void (*expand)(const ExpansionParams& p, int32_t head, const MatrixEngine* engine,
                 std::byte* scratch);
  // Rows [begin, end) of an append or of a gather; `row`: L + R floats of scratch.
  void (*append_rows)(const AppendParams& p, int64_t begin, int64_t end, float* row);
  void (*gather_rows)(const GatherParams& p, int64_t begin, int64_t end, float* row);
  // Name of the arithmetic that computes a format for a query type: f32, bf16, int8, int16.
  const char* (*arithmetic)(CacheFormat format, ScalarType query);
  // Dot products on registers alone, to measure what the instructions can do: the flop done, 0 if
  // there are none (roof.h).
  int64_t (*spin)(ArithmeticId arithmetic, int64_t iterations);
};

// The table in use.
const KernelTable& kernels();

}  // namespace flashmla
