// interrupt.h: Ctrl-C in a long call. Work is cut into items; between them the thread that made the
// call looks whether Python has a signal to handle.
//
// Python runs signal handlers between its own instructions, on its main thread, so a long call
// would keep one waiting. Here the handler runs early. If it raises (KeyboardInterrupt), the call
// ends: its results, which nobody gets to see, are NaN, and the exception is raised as soon as
// Python goes on. A program without Python notices nothing.
#pragma once
#include <ATen/core/Tensor.h>

namespace flashmla {

// One call of an operator. Scopes do not nest.
class InterruptibleCall {
 public:
  InterruptibleCall();
  InterruptibleCall(const InterruptibleCall&) = delete;
  InterruptibleCall& operator=(const InterruptibleCall&) = delete;

  // Spoils results that are not complete.
  static void finish(std::initializer_list<at::Tensor> results);
};

// Whether the call in progress is to end. Looks for signals on the calling thread, a few times a
// second; on other threads false.
bool interrupted();

}  // namespace flashmla
