// levels/onednn.cpp: avx512_bf16 with the products of whole tiles lent (lent_products.h). What the
// engine does not compute (f32 and int16, small row blocks) and all else is avx512_bf16's.
#include "kernels/attention/lent_products.h"
#include "kernels/levels/level.h"
#include "kernels/simd/avx512_bf16.h"

namespace flashmla {

extern const KernelTable kernels_avx512_bf16;
extern const KernelTable kernels_onednn;

namespace {

const KernelTable& own() { return kernels_avx512_bf16; }

// Empty where the engine does not compute the format.
template <class Format, ScalarType kQuery>
constexpr Pipeline lent() {
  using Simd = Avx512Bf16;
  constexpr ArithmeticId id = Format::template arithmetic<Simd>(kQuery);
  if constexpr (id == ArithmeticId::kBf16 || id == ArithmeticId::kInt8) {
    return choose<Simd, Format, kQuery, LentProducts>();
  } else {
    return {};
  }
}

template <class List>
struct LentPipelines;
template <class... Formats>
struct LentPipelines<FormatList<Formats...>> {
  static constexpr Pipeline kAll[][3] = {{lent<Formats, ScalarType::kF32>(),   //
                                          lent<Formats, ScalarType::kBf16>(),  //
                                          lent<Formats, ScalarType::kF16>()}...};
};

const Pipeline& lent_pipeline(const AttentionParams& p) {
  return LentPipelines<CacheFormats>::kAll[static_cast<int>(p.cache.format)]
                                          [static_cast<int>(p.q_type)];
}

size_t scratch_bytes(const AttentionParams& p, BlockShape shape) {
  const Pipeline& pipeline = lent_pipeline(p);
  if (pipeline.attend == nullptr) return own().scratch_bytes(p, shape);
  Scratch unused;
  return pipeline.lay_out(pipeline.row_layout(p.cache), shape, nullptr, unused);
}

RowSet attend_lent(const AttentionParams& p, BlockShape shape, const WorkItem& item,
                   const MatrixEngine* engine, float* partials, std::byte* scratch) {
  const Pipeline& pipeline = lent_pipeline(p);
  if (pipeline.attend == nullptr || engine == nullptr || item.alone ||
      item.row_end - item.row_begin < engine->least_rows())
    return own().attend(p, shape, item, engine, partials, scratch);
  const RowSet again = pipeline.attend(p, shape, item, pipeline.stage, pipeline.native,
                                       pipeline.key_max, engine, partials, scratch);
  engine->release();
  return again;
}

// Functions with names: lambdas here would be weak symbols.
BlockShape block_shape(const AttentionParams& p) { return own().block_shape(p); }
int64_t partial_floats(const AttentionParams& p, BlockShape shape) {
  return own().partial_floats(p, shape);
}
void merge_parts(const AttentionParams& p, BlockShape shape, const MergeItem& item,
                 const float* partials) {
  own().merge(p, shape, item, partials);
}
size_t projection_memory(const ProjectionParams& p) { return own().projection_scratch(p); }
void queries(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
             std::byte* scratch) {
  own().project_queries(p, parts, begin, end, scratch);
}
void values(const ProjectionParams& p, int32_t parts, int64_t begin, int64_t end,
            std::byte* scratch) {
  own().project_values(p, parts, begin, end, scratch);
}

constexpr ExpansionPipeline kLentExpansion =
    expansion<Avx512Bf16, Bf16<Avx512Bf16>, LentProducts<Avx512Bf16, Bf16<Avx512Bf16>>>();

size_t expansion_memory(const ExpansionParams& p) {
  return p.type == ScalarType::kBf16 ? kLentExpansion.scratch_bytes(p) : own().expansion_scratch(p);
}
void expand_lent(const ExpansionParams& p, int32_t head, const MatrixEngine* engine,
                 std::byte* scratch) {
  if (p.type != ScalarType::kBf16 || engine == nullptr || p.width < engine->least_rows())
    return own().expand(p, head, engine, scratch);
  kLentExpansion.expand(p, head, engine, scratch);
  engine->release();
}
void append(const AppendParams& p, int64_t begin, int64_t end, float* row) {
  own().append_rows(p, begin, end, row);
}
void gather(const GatherParams& p, int64_t begin, int64_t end, float* row) {
  own().gather_rows(p, begin, end, row);
}
const char* arithmetic(CacheFormat format, ScalarType query) {
  return own().arithmetic(format, query);
}
int64_t roof(ArithmeticId id, int64_t iterations) { return own().spin(id, iterations); }

}  // namespace

const KernelTable kernels_onednn = {"onednn",
                                    block_shape,
                                    scratch_bytes,
                                    partial_floats,
                                    attend_lent,
                                    merge_parts,
                                    projection_memory,
                                    queries,
                                    values,
                                    expansion_memory,
                                    expand_lent,
                                    append,
                                    gather,
                                    arithmetic,
                                    roof};

}  // namespace flashmla
