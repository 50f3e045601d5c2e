// What the executor tells the thread sanitizer; nothing in other builds.
//
// With DYNPRUNE_PATIENT=1 threads wait for late ones for ever: then no chunk is computed twice, and nothing at all may race. Without it
// chunks are overtaken, and the reads of a late thread's computation race by design (see plan/executor.h): those, and only those, are
// not looked at.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <cstdlib>
#include <thread>

extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
#endif

namespace dynprune {

#if defined(__SANITIZE_THREAD__)

// Whether late chunks are computed again.
inline bool overtakes() {
  static const bool patient = std::getenv("DYNPRUNE_PATIENT") != nullptr;
  if (patient) std::this_thread::yield();
  return !patient;
}

// While it lives, what this thread reads may be written by others.
class LateReads {
 public:
  LateReads() {
    if (overtakes()) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~LateReads() {
    if (overtakes()) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

#else

constexpr bool overtakes() { return true; }

class LateReads {
 public:
  LateReads() {}
};

#endif

}  // namespace dynprune
