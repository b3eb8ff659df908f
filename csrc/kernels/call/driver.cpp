// driver.cpp: runs the ops' requests: plan -> items on threads -> merge, and the row-wise work of
// the cache.
#include "kernels/call/driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <thread>

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

// Whether the rest of a call is left out: it was interrupted, or a part of it threw.
class LeftOut {
 public:
  explicit LeftOut(const Executor& executor) : interrupted_(executor.interrupted) {}

  bool operator()() {
    if (interrupted_ != nullptr && interrupted_()) set();
    return left_out_.load(std::memory_order_relaxed);
  }
  void set() { left_out_.store(true, std::memory_order_relaxed); }

 private:
  bool (*interrupted_)();
  std::atomic<bool> left_out_ = false;
};

// A part of a call that begins when all before it is complete: so many tasks, in any order.
struct Step {
  int64_t tasks;
  void (*run)(int64_t task, const void* context);
  const void* context;
};

template <class Body>
Step step(int64_t tasks, const Body& body) {
  return {tasks, [](int64_t i, const void* context) { (*static_cast<const Body*>(context))(i); },
          &body};
}

// Runs steps in one parallel region: threads take task after task, in order, so that one that comes
// late keeps nobody waiting, and one with a task of the next step waits for those under way.
class Steps {
 public:
  Steps(std::span<const Step> steps, LeftOut& left_out) : steps_(steps), left_out_(left_out) {}

  void run(const Executor& executor) {
    int64_t most = 0;
    for (const Step& s : steps_) most = std::max(most, s.tasks);
    const int64_t threads = std::min<int64_t>(most, executor.workers);
    if (threads > 1 && executor.steps_apart) {
      for (const Step& s : steps_)
        flashmla::run(executor, s.tasks, [&](int64_t i) { s.run(i, s.context); });
      return;
    }
    if (threads > 1) {
      executor.parallel_for(
          threads, [](int64_t, void* context) { static_cast<Steps*>(context)->take_tasks(); },
          this);
      return;
    }
    for (const Step& s : steps_) {
      for (int64_t i = 0; i < s.tasks && !left_out_(); ++i) s.run(i, s.context);
    }
  }

 private:
  void take_tasks() {
    size_t step = 0;
    int64_t before = 0;  // tasks of the steps before
    for (;;) {
      const int64_t task = taken_.fetch_add(1, std::memory_order_relaxed);
      for (; task - before >= steps_[step].tasks; ++step) {
        before += steps_[step].tasks;
        if (step + 1 == steps_.size()) return;
      }
      wait_for(before);
      const Done done(*this);
      if (!left_out_()) steps_[step].run(task - before, steps_[step].context);
    }
  }

  void wait_for(int64_t tasks) const {
    constexpr int kSpins = 200;
    for (int i = 0; done_.load(std::memory_order_acquire) < tasks; ++i) {
      if (i > kSpins) std::this_thread::yield();
    }
  }

  // Counts a task as done, even one that throws: then the rest is left out.
  struct Done {
    explicit Done(Steps& all) : steps(all), exceptions(std::uncaught_exceptions()) {}
    Done(const Done&) = delete;
    Done& operator=(const Done&) = delete;
    ~Done() {
      if (std::uncaught_exceptions() > exceptions) steps.left_out_.set();
      steps.done_.fetch_add(1, std::memory_order_release);
    }
    Steps& steps;
    int exceptions;
  };

  std::span<const Step> steps_;
  LeftOut& left_out_;
  std::atomic<int64_t> taken_ = 0, done_ = 0;
};

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

// One part of a merge of row blocks, so that there are as many tasks as workers.
MergeItem part_of_merge(MergeItem item, int32_t parts, int32_t part) {
  const int32_t rows = item.row_end - item.row_begin, begin = rows * part / parts;
  item.row_end = item.row_begin + rows * (part + 1) / parts;
  item.row_begin += begin;
  item.partial_row = begin;
  return item;
}

// Units of the projections are heads, or parts of them where there are more workers; tasks are runs
// of units, a few for each worker.
struct ProjectionTasks {
  int32_t parts;
  int64_t units, tasks;

  ProjectionTasks(int32_t heads, int32_t workers)
      : parts((2 * workers + heads - 1) / heads), units(static_cast<int64_t>(heads) * parts) {
    if (workers == 1) parts = 1, units = heads;
    tasks = std::min<int64_t>(units, workers == 1 ? 1 : 4 * workers);
  }
  int64_t begin(int64_t task) const { return units * task / tasks; }
};

void run_attention(const AttentionParams& p, const ProjectionParams* projections, Plan& plan,
                   const Executor& executor) {
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
  LeftOut left_out(executor);
  auto attend_items = [&](int64_t w) {
    const auto begin = static_cast<size_t>(plan.worker_begin[static_cast<size_t>(w)]);
    const auto end = static_cast<size_t>(plan.worker_begin[static_cast<size_t>(w) + 1]);
    if (begin == end) return;
    std::byte* scratch = executor.scratch(0, scratch_bytes);
    float* partials = plan.own_partials ? partial_results() : all_partials;
    for (size_t i = begin; i < end && !left_out(); ++i) {
      const WorkItem& item = plan.items[i];
      attend(table, p, shape, item, executor.engine, partials, scratch);
      const bool last = i + 1 == end || plan.items[i + 1].partial <= item.partial;
      if (plan.own_partials && item.partial >= 0 && last)
        table.merge(p, shape, {item.sequence, item.row_begin, item.row_end, 0, item.partial + 1},
                    partials);
    }
  };
  const auto merges = static_cast<int32_t>(plan.merges.size());
  const int32_t merge_parts = merges == 0 ? 1 : (executor.workers + merges - 1) / merges;
  auto merge = [&](int64_t i) {
    const MergeItem& item = plan.merges[static_cast<size_t>(i / merge_parts)];
    table.merge(p, shape, part_of_merge(item, merge_parts, static_cast<int32_t>(i % merge_parts)),
                all_partials);
  };
  const Step attend_step = step(static_cast<int64_t>(plan.worker_begin.size()) - 1, attend_items),
             merge_step = step(int64_t{merges} * merge_parts, merge);
  if (projections == nullptr) {
    const Step steps[] = {attend_step, merge_step};
    return Steps(steps, left_out).run(executor);
  }
  const ProjectionTasks tasks(p.heads, executor.workers);
  const size_t bytes = table.projection_scratch(*projections);
  auto project_queries = [&](int64_t i) {
    table.project_queries(*projections, tasks.parts, tasks.begin(i), tasks.begin(i + 1),
                          executor.scratch(0, bytes));
  };
  auto project_values = [&](int64_t i) {
    table.project_values(*projections, tasks.parts, tasks.begin(i), tasks.begin(i + 1),
                         executor.scratch(0, bytes));
  };
  const Step steps[] = {step(tasks.tasks, project_queries), attend_step, merge_step,
                        step(tasks.tasks, project_values)};
  Steps(steps, left_out).run(executor);
}

}  // namespace

void attention(const AttentionParams& p, Plan& plan, const Executor& executor) {
  if (p.batch == 0 || p.q_len == 0 || p.heads == 0) return;
  run_attention(p, nullptr, plan, executor);
}

void projected_attention(AttentionParams p, const ProjectionParams& projections, Plan& plan,
                         const Executor& executor) {
  if (projections.tokens == 0 || p.heads == 0) return;
  // The latent rows of a head are neighbours, under the numbers that tokens have in the call.
  const int64_t row = static_cast<int64_t>(projections.latent_row) * 4;
  const int64_t before = p.cu_seqlens_q ? p.cu_seqlens_q[0] * row : 0;
  const int64_t sequence = p.cu_seqlens_q ? 0 : projections.q_len * row;
  auto rows = [&](float* latent) {
    return QueryRows{reinterpret_cast<std::byte*>(latent) - before,
                     {sequence, row, projections.tokens * row}};
  };
  p.q = rows(projections.q_latent);
  p.out = rows(projections.out_latent);
  p.q_main_type = p.out_type = ScalarType::kF32;
  run_attention(p, &projections, plan, executor);
}

void expand(std::span<const ExpansionParams> params, const Executor& executor) {
  const KernelTable& table = kernels();
  const auto count = static_cast<int64_t>(params.size());
  run(executor, count * params[0].heads, [&](int64_t i) {
    const ExpansionParams& p = params[static_cast<size_t>(i % count)];
    table.expand(p, static_cast<int32_t>(i / count), executor.engine,
                 executor.scratch(0, table.expansion_scratch(p)));
  });
}

void append(const AppendParams& p, const Executor& executor) {
  run_rows(executor, p.tokens, [&](int64_t begin, int64_t end) {
    kernels().append_rows(p, begin, end, row_scratch(executor, p.cache));
  });
}

void gather(const GatherParams& p, const Executor& executor) {
  constexpr int64_t kRows = 4096;  // between looks
  LeftOut left_out(executor);
  run_rows(executor, p.batch * p.max_seqlen, [&](int64_t begin, int64_t end) {
    float* row = row_scratch(executor, p.cache);
    for (int64_t at = begin; at < end && !left_out(); at += kRows)
      kernels().gather_rows(p, at, std::min(at + kRows, end), row);
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
