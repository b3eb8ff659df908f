// parallel.h: the threads and the memory that the operators lend to the kernels (driver.h,
// Executor).
#pragma once
#include "kernels/call/driver.h"

namespace flashmla {

// PyTorch's own thread pool, as torch.set_num_threads sizes it; one worker inside a parallel
// region. Scratch belongs to each thread, grows when needed and is kept: fresh pages can cost more
// than a whole decode call.
Executor torch_executor();

// The calling thread's plan, kept for its memory.
Plan& thread_plan();

}  // namespace flashmla
