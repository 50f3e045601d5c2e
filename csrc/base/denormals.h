// Treats denormals as zero while it lives: they cost a hundred cycles each and mean nothing in a network. Restores the old state.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstdint>

namespace dynprune {

class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : old_(_mm_getcsr()) { _mm_setcsr(old_ | 0x8040u); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(old_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(old_));
    asm volatile("msr fpcr, %0" ::"r"(old_ | (std::uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(old_)); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE2__)
  unsigned old_;
#elif defined(__aarch64__)
  std::uint64_t old_;
#endif
};

}  // namespace dynprune
