// parallel.cpp: torch's thread pool and per-thread scratch behind the kernels' Executor.
#include "ops/parallel.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <exception>

#include "ops/interrupt.h"
#include "ops/onednn.h"
#include "ops/ops.h"

namespace flashmla {
namespace {

constexpr size_t kAlignment = 64;  // a cache line
thread_local bool steps_apart = false;
std::atomic<int64_t> total_scratch = 0, all_regions = 0;

// One growing buffer of one thread.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  std::byte* at_least(size_t bytes) {
    if (bytes > size_) {
      release();  // the old contents are never needed
      bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, bytes));
      TORCH_CHECK_WITH(OutOfMemoryError, data_ != nullptr, "scratch memory: cannot allocate ",
                       bytes, " bytes for a thread");
      size_ = bytes;
      total_scratch += static_cast<int64_t>(size_);
    }
    return data_;
  }

 private:
  void release() {
    std::free(data_);
    total_scratch -= static_cast<int64_t>(size_);
    data_ = nullptr;
    size_ = 0;
  }

  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// at::parallel_for would need OpenMP flags and its runtime in this library; the stable interface
// runs the same pool, but makes text of exceptions: they are carried past it.
void parallel_for(int64_t count, void (*body)(int64_t i, void* context), void* context) {
  if (count == 1) return body(0, context);
  all_regions.fetch_add(1, std::memory_order_relaxed);
  std::exception_ptr failure;
  std::atomic<bool> failed = false;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) body(i, context);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

std::byte* thread_scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[kLatentRows + 1];
  return buffers[slot].at_least(bytes);
}

Executor torch_executor() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(), parallel_for, thread_scratch,
          onednn_engine(), interrupted, steps_apart};
}

Plan& thread_plan() {
  thread_local Plan plan;
  return plan;
}

int64_t scratch_bytes() { return total_scratch; }

void set_steps_apart(bool apart) { steps_apart = apart; }
int64_t parallel_regions() { return all_regions; }

}  // namespace flashmla
