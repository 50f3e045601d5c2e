// Runs C++ code without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace dynprune {

// Where the interpreter ends meanwhile, Python before 3.14 ends a thread that asks for the GIL by unwinding its stack; nothing else comes
// out of this call. Destructors on the way may not be left like that, and would touch Python objects without the GIL: such a thread stays
// here until the process is gone.
inline void take_gil_back(PyThreadState* thread) {
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Not py::gil_scoped_release, which takes the GIL back in a destructor.
template <class Body>
void without_gil(Body&& body) {
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    take_gil_back(thread);
    throw;
  }
  take_gil_back(thread);
}

}  // namespace dynprune
