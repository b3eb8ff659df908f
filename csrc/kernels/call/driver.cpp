// driver.cpp: runs the ops' requests: plan -> items on threads -> merge, and the row-wise work of
// the cache.
#include "kernels/call/driver.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/arithmetic/numeric.h"
#include "kernels/call/kernel_table.h"

namespace flashmla {
namespace {

// parallel_for with a callable.
template <class Body>
void run(const Executor& executor, int64_t count, const Body& body) {
  if (count <= 0) return;
  executor.parallel_for(
      count, [](int64_t i, void* context) { (*static_cast<const Body*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Row-wise work goes to threads in ranges of rows, when there is enough of it.
template <class Body>
void run_rows(const Executor& executor, int64_t rows, const Body& body) {
  constexpr int64_t kLeast = 64;
  const int64_t ranges = std::clamp<int64_t>(rows / kLeast, 1, executor.workers);
  run(executor, ranges, [&](int64_t i) { body(rows * i / ranges, rows * (i + 1) / ranges); });
}

float* row_scratch(const Executor& executor, const CacheView& cache) {
  const size_t floats = static_cast<size_t>(cache.latent) + static_cast<size_t>(cache.rope);
  return reinterpret_cast<float*>(executor.scratch(0, floats * sizeof(float)));
}

float load_scalar(ScalarType type, const std::byte* p, int64_t i) {
  if (type == ScalarType::kF32) return reinterpret_cast<const float*>(p)[i];
  const uint16_t x = reinterpret_cast<const uint16_t*>(p)[i];
  return type == ScalarType::kBf16 ? bf16_to_float(x) : f16_to_float(x);
}

void store_scalar(ScalarType type, std::byte* p, int64_t i, float x) {
  if (type == ScalarType::kF32) {
    reinterpret_cast<float*>(p)[i] = x;
  } else {
    reinterpret_cast<uint16_t*>(p)[i] =
        type == ScalarType::kBf16 ? float_to_bf16(x) : float_to_f16(x);
  }
}

}  // namespace

namespace {

// Executes an item; rows that ask for it, alone (attention.h).
void attend(const KernelTable& table, const AttentionParams& p, BlockShape shape,
            const WorkItem& item, const MatrixEngine* engine, float* partials, std::byte* scratch) {
  const RowSet again = table.attend(p, shape, item, engine, partials, scratch);
  for (int32_t r = 0; !again.empty() && r < item.row_end - item.row_begin; ++r) {
    if (!again.contains(r)) continue;
    WorkItem one = item;
    one.row_begin = item.row_begin + r;
    one.row_end = one.row_begin + 1;
    one.partial_row = r;
    one.alone = true;
    table.attend(p, shape, one, engine, partials, scratch);
  }
}

}  // namespace

void attention(const AttentionParams& p, Plan& plan, const Executor& executor) {
  if (p.batch == 0 || p.q_len == 0 || p.heads == 0) return;
  const KernelTable& table = kernels();
  const BlockShape shape = table.block_shape(p);
  make_plan(p, shape, executor.workers, plan);
  const size_t scratch_bytes = table.scratch_bytes(p, shape);
  const size_t partial_bytes =
      static_cast<size_t>(plan.partials * table.partial_floats(p, shape)) * sizeof(float);
  auto partial_results = [&] {
    return plan.partials == 0 ? nullptr
                              : reinterpret_cast<float*>(executor.scratch(1, partial_bytes));
  };
  float* all_partials = plan.own_partials ? nullptr : partial_results();
  run(executor, static_cast<int64_t>(plan.worker_begin.size()) - 1, [&](int64_t w) {
    const auto begin = static_cast<size_t>(plan.worker_begin[static_cast<size_t>(w)]);
    const auto end = static_cast<size_t>(plan.worker_begin[static_cast<size_t>(w) + 1]);
    if (begin == end) return;
    std::byte* scratch = executor.scratch(0, scratch_bytes);
    float* partials = plan.own_partials ? partial_results() : all_partials;
    for (size_t i = begin; i < end; ++i) {
      const WorkItem& item = plan.items[i];
      attend(table, p, shape, item, executor.engine, partials, scratch);
      const bool last = i + 1 == end || plan.items[i + 1].partial <= item.partial;
      if (plan.own_partials && item.partial >= 0 && last)
        table.merge(p, shape, {item.sequence, item.row_begin, item.row_end, 0, item.partial + 1},
                    partials);
    }
  });
  run(executor, static_cast<int64_t>(plan.merges.size()),
      [&](int64_t i) { table.merge(p, shape, plan.merges[static_cast<size_t>(i)], all_partials); });
}

void append(const AppendParams& p, const Executor& executor) {
  run_rows(executor, p.tokens, [&](int64_t begin, int64_t end) {
    kernels().append_rows(p, begin, end, row_scratch(executor, p.cache));
  });
}

void gather(const GatherParams& p, const Executor& executor) {
  run_rows(executor, p.batch * p.max_seqlen, [&](int64_t begin, int64_t end) {
    kernels().gather_rows(p, begin, end, row_scratch(executor, p.cache));
  });
}

void merge_states(const MergeParams& p, const Executor& executor) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  auto merge_row = [&](int64_t i) {
    const int64_t b = i / p.heads / p.q_len, s = i / p.heads % p.q_len, h = i % p.heads;
    auto at = [&](const QueryRows& q) {
      return q.data + b * q.stride[0] + s * q.stride[1] + h * q.stride[2];
    };
    auto lse_at = [&](const int64_t* stride) {
      return b * stride[0] + h * stride[1] + s * stride[2];
    };
    const float la = p.lse_a[lse_at(p.lse_a_stride)], lb = p.lse_b[lse_at(p.lse_b_stride)];
    const float most = la > lb || lb != lb ? la : lb;
    // A part without keys is left out by selection: its values may be anything.
    const float wa = la == kNone ? 0 : std::exp(la - most),
                wb = lb == kNone ? 0 : std::exp(lb - most);
    const float sum = wa + wb;
    p.lse[lse_at(p.lse_stride)] = sum == 0 ? kNone : most + std::log(sum);
    const float total = p.attn_sink && sum != 0 ? sum + std::exp(p.attn_sink[h] - most) : sum;
    const std::byte *a = at(p.out_a), *c = at(p.out_b);
    std::byte* out = at(p.out);
    for (int32_t d = 0; d < p.width; ++d) {
      float x = 0;
      if (wa != 0) x += wa / total * load_scalar(p.type, a, d);
      if (wb != 0) x += wb / total * load_scalar(p.type, c, d);
      store_scalar(p.out_type, out, d, x);
    }
  };
  run_rows(executor, static_cast<int64_t>(p.batch) * p.q_len * p.heads,
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) merge_row(i);
           });
}

}  // namespace flashmla
