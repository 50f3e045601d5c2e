// One pause of a waiting loop, and the engine's clock.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <chrono>
#include <cstdint>

namespace dynprune {

inline void pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Nanoseconds of the steady clock; Python's time.monotonic_ns() reads the same one.
inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace dynprune
