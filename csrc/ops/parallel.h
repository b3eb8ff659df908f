// parallel.h: the threads and the memory that the operators lend to the kernels (driver.h,
// Executor).
#pragma once
#include "kernels/call/driver.h"

namespace flashmla {

// PyTorch's own thread pool, as torch.set_num_threads sizes it; one worker inside a parallel
// region. Scratch belongs to each thread, grows when needed and is kept: fresh pages can cost more
// than a whole decode call.
Executor torch_executor();

// Scratch of the calling thread. The kernels use the slots 0 and 1 (driver.h).
constexpr int kLatentRows = 2;  // between the projections of a decode step
std::byte* thread_scratch(int slot, size_t bytes);

// The calling thread's plan, kept for its memory.
Plan& thread_plan();

}  // namespace flashmla
