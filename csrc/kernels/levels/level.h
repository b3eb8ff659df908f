// The room levels/: one table of functions per instruction set, each an object with compiler flags
// of its own, and the choice among them (dispatch.h). May include every other room.
//
// level.h: makes the kernel table of one instruction set from its vocabulary. Included by
// levels/*.cpp only.
#pragma once
#include "kernels/attention/attention.h"
#include "kernels/attention/expand.h"
#include "kernels/attention/project.h"
#include "kernels/call/kernel_table.h"
#include "kernels/formats/cache_format.h"
#include "kernels/formats/rows.h"
#include "kernels/levels/roof.h"
#include "kernels/simd/concept.h"

namespace flashmla {
namespace {

// What computes one (format, query type): the kernels of its arithmetic with the codec of the
// format.
struct Pipeline {
  BlockShape (*block_shape)(const RowLayout& layout);
  RowLayout (*row_layout)(const CacheView& cache);
  size_t (*lay_out)(const RowLayout& layout, BlockShape shape, std::byte* base, Scratch& s);
  RowSet (*attend)(const AttentionParams& p, BlockShape shape, const WorkItem& item,
                   StageRows stage, bool native, int32_t key_max, const MatrixEngine* engine,
                   float* partials, std::byte* memory);
  StageRows stage;
  bool native;
  int32_t key_max;  // largest code of staged keys (scaled arithmetics)
  const char* arithmetic;
};

template <class Simd, class Arithmetic, class Format>
void stage_rows(const RowAddress* from, int32_t count, const RowLayout& layout, std::byte* rows) {
  if constexpr (requires { Format::prepare(Arithmetic{}, from->kv_c, layout); }) {
    // What codes wait for is a chain of slow steps: it is taken for all rows before any codes.
    decltype(Format::prepare(Arithmetic{}, from->kv_c, layout)) ready[kStagedRows];
    for (int32_t i = 0; i < count; ++i)
      ready[i] = Format::prepare(Arithmetic{}, from[i].kv_c, layout);
    for (int32_t i = 0; i < count; ++i, rows += layout.stride)
      Format::stage(Arithmetic{}, from[i].kv_c, ready[i], layout, rows);
  } else {
    for (int32_t i = 0; i < count; ++i, rows += layout.stride) {
      Format::stage(Arithmetic{}, from[i].kv_c, from[i].k_pe, layout, rows);
      if constexpr (!Format::kPacked) {
        if (from[i].v) Format::stage_value(Arithmetic{}, from[i].v, layout, rows);
      }
    }
  }
}

// Formats whose codes an arithmetic takes as they are may state a smaller range than its own.
template <class Arithmetic, class Format>
constexpr int32_t key_max() {
  if constexpr (requires { Format::kKeyMax; }) {
    return Format::kKeyMax;
  } else if constexpr (Arithmetic::kScaled) {
    return static_cast<int32_t>(Arithmetic::kKeyMax);
  } else {
    return 0;
  }
}

template <class Simd, class Arithmetic, class Format,
          class Products = OwnProducts<Simd, Arithmetic>>
constexpr Pipeline pipeline(ArithmeticId id, const char* name) {
  return {block_shape<Simd, Arithmetic>,
          row_layout<Simd, Arithmetic>,
          lay_out<Simd, Arithmetic, Products::kLent>,
          attend<Simd, Arithmetic, Products>,
          stage_rows<Simd, Arithmetic, Format>,
          Format::kNative == id,
          key_max<Arithmetic, Format>(),
          name};
}

template <class Simd, class Format, ScalarType kQuery,
          template <class, class> class Products = OwnProducts>
constexpr Pipeline choose() {
  constexpr ArithmeticId id = Format::template arithmetic<Simd>(kQuery);
  auto with = [&]<class Arithmetic>(Arithmetic, const char* name) {
    return pipeline<Simd, Arithmetic, Format, Products<Simd, Arithmetic>>(id, name);
  };
  if constexpr (id == ArithmeticId::kBf16) {
    return with(Bf16<Simd>{}, "bf16");
  } else if constexpr (id == ArithmeticId::kInt8) {
    return with(Int8<Simd>{}, "int8");
  } else if constexpr (id == ArithmeticId::kInt16) {
    return with(Int16<Simd>{}, "int16");
  } else {
    return with(F32<Simd>{}, "f32");
  }
}

// What computes an expansion.
struct ExpansionPipeline {
  size_t (*scratch_bytes)(const ExpansionParams& p);
  void (*expand)(const ExpansionParams& p, int32_t head, const MatrixEngine* engine,
                 std::byte* scratch);
};

template <class Simd, class Arithmetic, class Products = OwnProducts<Simd, Arithmetic>>
constexpr ExpansionPipeline expansion() {
  return {expansion_scratch<Simd, Arithmetic, Products::kLent>, expand<Simd, Arithmetic, Products>};
}

template <class Simd>
constexpr ExpansionPipeline expansion_of(ScalarType type) {
  if constexpr (Simd::kBf16Dot) {
    if (type == ScalarType::kBf16) return expansion<Simd, Bf16<Simd>>();
  }
  return expansion<Simd, F32<Simd>>();
}

template <class Simd, class List>
struct Pipelines;
template <class Simd, class... Formats>
struct Pipelines<Simd, FormatList<Formats...>> {
  static constexpr Pipeline kAll[][3] = {{choose<Simd, Formats, ScalarType::kF32>(),   //
                                          choose<Simd, Formats, ScalarType::kBf16>(),  //
                                          choose<Simd, Formats, ScalarType::kF16>()}...};
};

template <class Simd>
const Pipeline& pipeline_of(CacheFormat format, ScalarType query) {
  return Pipelines<Simd, CacheFormats>::kAll[static_cast<int>(format)][static_cast<int>(query)];
}

template <class Simd>
  requires SimdVocabulary<Simd>
struct Level {
  static const Pipeline& of(const AttentionParams& p) {
    return pipeline_of<Simd>(p.cache.format, p.q_type);
  }

  static BlockShape block_shape(const AttentionParams& p) {
    return of(p).block_shape(of(p).row_layout(p.cache));
  }
  static size_t scratch_bytes(const AttentionParams& p, BlockShape shape) {
    Scratch unused;
    return of(p).lay_out(of(p).row_layout(p.cache), shape, nullptr, unused);
  }
  static int64_t partial_floats(const AttentionParams& p, BlockShape shape) {
    return flashmla::partial_floats(shape, p.cache.value);
  }
  static RowSet attend(const AttentionParams& p, BlockShape shape, const WorkItem& item,
                       const MatrixEngine* engine, float* partials, std::byte* scratch) {
    return of(p).attend(p, shape, item, of(p).stage, of(p).native, of(p).key_max, engine, partials,
                        scratch);
  }
  static size_t expansion_scratch(const ExpansionParams& p) {
    return expansion_of<Simd>(p.type).scratch_bytes(p);
  }
  static void expand(const ExpansionParams& p, int32_t head, const MatrixEngine* engine,
                     std::byte* scratch) {
    expansion_of<Simd>(p.type).expand(p, head, engine, scratch);
  }
  static const char* arithmetic(CacheFormat format, ScalarType query) {
    return pipeline_of<Simd>(format, query).arithmetic;
  }

  static constexpr KernelTable table(const char* name) {
    return {name,
            block_shape,
            scratch_bytes,
            partial_floats,
            attend,
            merge<Simd>,
            projection_scratch,
            project_queries<Simd>,
            project_values<Simd>,
            expansion_scratch,
            expand,
            append_rows<Simd>,
            gather_rows<Simd>,
            arithmetic,
            spin<Simd>};
  }
};

}  // namespace
}  // namespace flashmla
