// interrupt.cpp: Python's signals, by the functions of the interpreter in this process, if there is
// one (interrupt.h).
#include "ops/interrupt.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <limits>
#include <memory>

#include "ops/parallel.h"

// Null where the program has no Python: the library itself needs none.
extern "C" {
#define FLASHMLA_OF_PYTHON [[gnu::weak, gnu::visibility("default")]]
FLASHMLA_OF_PYTHON int Py_IsInitialized();
FLASHMLA_OF_PYTHON int PyGILState_Ensure();
FLASHMLA_OF_PYTHON void PyGILState_Release(int state);
FLASHMLA_OF_PYTHON int PyErr_CheckSignals();
FLASHMLA_OF_PYTHON void PyErr_Fetch(void** type, void** value, void** traceback);
FLASHMLA_OF_PYTHON void PyErr_Restore(void* type, void* value, void* traceback);
FLASHMLA_OF_PYTHON int Py_AddPendingCall(int (*call)(void*), void* argument);
#undef FLASHMLA_OF_PYTHON
}

namespace flashmla {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPause = std::chrono::milliseconds(100);

struct PythonError {
  void *type, *value, *traceback;
};

bool has_python() {
  return Py_IsInitialized && PyGILState_Ensure && PyGILState_Release && PyErr_CheckSignals &&
         PyErr_Fetch && PyErr_Restore && Py_AddPendingCall && Py_IsInitialized() != 0;
}

// Raises what a handler raised, once Python goes on.
int raise_again(void* error) {
  const std::unique_ptr<PythonError> e(static_cast<PythonError*>(error));
  PyErr_Restore(e->type, e->value, e->traceback);
  return -1;
}

// Lets Python handle its signals. Whether a handler raised.
bool handler_raises() {
  if (!has_python()) return false;
  const int gil = PyGILState_Ensure();
  bool raised = PyErr_CheckSignals() != 0;
  if (raised) {
    auto error = std::make_unique<PythonError>();
    PyErr_Fetch(&error->type, &error->value, &error->traceback);
    if (Py_AddPendingCall(raise_again, error.get()) == 0) {
      error.release();
    } else {  // its queue is full, of calls that do not matter here: the exception is lost
      raised = false;
    }
  }
  PyGILState_Release(gil);
  return raised;
}

// Python handles signals on the main thread alone.
thread_local const bool is_main_thread = getpid() == syscall(SYS_gettid);
thread_local Clock::time_point next_look = Clock::time_point::max();
thread_local bool ends = false;

}  // namespace

InterruptibleCall::InterruptibleCall() {
  if (!is_main_thread) return;
  ends = false;
  next_look = Clock::now() + kPause;
}

void InterruptibleCall::finish(std::initializer_list<at::Tensor> results) {
  if (!ends) return;
  ends = false;
  for (at::Tensor result : results) result.fill_(std::numeric_limits<double>::quiet_NaN());
}

bool interrupted() {
  if (!is_main_thread) return false;
  if (ends) return true;
  if (Clock::now() < next_look) return false;
  ends = among_calls(handler_raises);  // handlers may call operators
  next_look = Clock::now() + kPause;
  return ends;
}

}  // namespace flashmla
