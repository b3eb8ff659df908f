// interrupt.cpp: Python's signals, by the functions of the interpreter in this process, if there is
// one (interrupt.h). They are looked up by name: the library itself needs no Python.
#include "ops/interrupt.h"

#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <limits>
#include <memory>
#include <type_traits>

namespace flashmla {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPause = std::chrono::milliseconds(100);

struct PythonError {
  void *type, *value, *traceback;
};

struct Python {
  int (*is_initialized)();
  int (*gil_ensure)();
  void (*gil_release)(int);
  int (*check_signals)();
  void (*fetch)(void**, void**, void**);
  void (*restore)(void*, void*, void*);
  int (*add_pending_call)(int (*)(void*), void*);
  bool complete = true;

  Python() {
    auto find = [this](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
      complete = complete && function != nullptr;
    };
    find(is_initialized, "Py_IsInitialized");
    find(gil_ensure, "PyGILState_Ensure");
    find(gil_release, "PyGILState_Release");
    find(check_signals, "PyErr_CheckSignals");
    find(fetch, "PyErr_Fetch");
    find(restore, "PyErr_Restore");
    find(add_pending_call, "Py_AddPendingCall");
  }
};

const Python& python() {
  static const Python functions;
  return functions;
}

// Raises what a handler raised, once Python goes on.
int raise_again(void* error) {
  const std::unique_ptr<PythonError> e(static_cast<PythonError*>(error));
  python().restore(e->type, e->value, e->traceback);
  return -1;
}

// Lets Python handle its signals. Whether a handler raised.
bool handler_raises() {
  const Python& py = python();
  if (!py.complete || py.is_initialized() == 0) return false;
  const int gil = py.gil_ensure();
  bool raised = py.check_signals() != 0;
  if (raised) {
    auto error = std::make_unique<PythonError>();
    py.fetch(&error->type, &error->value, &error->traceback);
    if (py.add_pending_call(raise_again, error.get()) == 0) {
      error.release();
    } else {  // its queue is full, of calls that do not matter here: the exception is lost
      raised = false;
    }
  }
  py.gil_release(gil);
  return raised;
}

// Python handles signals on the main thread alone.
thread_local const bool is_main_thread = getpid() == gettid();
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
  const Clock::time_point now = Clock::now();
  if (now < next_look) return false;
  next_look = now + kPause;
  ends = handler_raises();
  return ends;
}

}  // namespace flashmla
