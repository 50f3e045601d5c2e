// One f32 lane in plain C++: the reference that every other instruction set must equal. Include only from isa/scalar.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/bf16.h"

namespace dynprune {
namespace {

struct Vec {
  static constexpr int kLanes = 1;
  static constexpr int kRegisters = 16;
  float v;
};
struct Mask {
  bool m;
};

inline Vec zero() { return {0.0f}; }
inline Vec set1(float x) { return {x}; }
inline Vec load(const float* p) { return {*p}; }
inline Vec load_partial(const float* p, int n) { return {n > 0 ? *p : 0.0f}; }
// bfloat16
inline Vec load(const uint16_t* p) { return {float_of(*p)}; }
inline Vec load_partial(const uint16_t* p, int n) { return {n > 0 ? float_of(*p) : 0.0f}; }
// Lanes [first, last); first and last are clamped to the vector.
inline Mask lane_range(int64_t first, int64_t last) { return {first <= 0 && last > 0}; }
// Lane i is bit i.
inline Mask lanes_of_bits(uint32_t bits) { return {(bits & 1u) != 0}; }
// Reads the lanes of the mask only; the others are 0, or those of `fill`.
inline Mask mask_from_bits(std::uint32_t bits) { return {(bits & 1u) != 0}; }  // lane i is bit i
inline Vec load_masked(const float* p, Mask m) { return {m.m ? *p : 0.0f}; }
inline Vec load_masked(const float* p, uint32_t bits) { return load_masked(p, lanes_of_bits(bits)); }
inline Vec load_masked(const float* p, Mask m, Vec fill) { return {m.m ? *p : fill.v}; }
// Lane i is p[index[i]].
inline Vec gather(const float* p, const int32_t* index) { return {p[*index]}; }
inline void store(float* p, Vec a) { *p = a.v; }
inline void store_partial(float* p, Vec a, int n) {
  if (n > 0) *p = a.v;
}

inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// min/max hand on a NaN that stands in the second operand, as the vector instructions do.
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec sqrt(Vec a) { return {std::sqrt(a.v)}; }
inline Vec abs(Vec a) { return {std::fabs(a.v)}; }
inline Vec round(Vec a) { return {(a.v + 12582912.0f) - 12582912.0f}; }  // 1.5 * 2^23: for |a| < 2^22
// |a| = mantissa * 2^exponent with a mantissa in [1, 2); for a > 0 and finite.
inline Vec split_power_of_2(Vec a, Vec* exponent) {
  int power = 0;
  const float mantissa = std::frexp(a.v, &power);
  exponent->v = static_cast<float>(power - 1);
  return {2.0f * mantissa};
}
inline float power_of_2(int exponent) {  // -127 < exponent < 128
  const int32_t bits = (exponent + 127) << 23;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
// a * 2^exponent for a whole exponent in [-252, 254], in two half steps; a NaN in either is handed on.
inline Vec scale_by_power_of_2(Vec a, Vec exponent) {
  if (exponent.v != exponent.v) return exponent;
  const int whole = static_cast<int>(exponent.v);
  const int half = whole / 2;
  return {a.v * power_of_2(half) * power_of_2(whole - half)};
}

inline Mask greater(Vec a, Vec b) { return {a.v > b.v}; }
inline Vec select(Mask m, Vec if_true, Vec if_false) { return {m.m ? if_true.v : if_false.v}; }

// A NaN in either operand is handed on.
inline Vec max_keep_nan(Vec a, Vec b) { return a.v != a.v ? a : max(a, b); }
inline Vec min_keep_nan(Vec a, Vec b) { return a.v != a.v ? a : min(a, b); }

// Lane i is p[index[i]], or 0 where bit i of `lanes` is 0; reads no further than p + 63. `upper` has the lanes whose index is >= 32.
inline Vec gather_lanes(const float* p, const int32_t* index, uint32_t lanes, uint32_t) { return {(lanes & 1u) != 0 ? p[*index] : 0.0f}; }

// The even and the odd elements of the two that a and b hold.
inline Vec even_lanes(Vec a, Vec) { return a; }
inline Vec odd_lanes(Vec, Vec b) { return b; }

// Lanes moved by one: {the last of `before`, a[0], a[1], ...} and {a[1], a[2], ..., the first of `after`}.
inline Vec shifted_up(Vec before, Vec) { return before; }
inline Vec shifted_down(Vec, Vec after) { return after; }

inline void transpose_tile(const float* in, int64_t, float* out, int64_t) { *out = *in; }

inline float reduce_add(Vec a) { return a.v; }
inline float reduce_max(Vec a) { return a.v; }

}  // namespace
}  // namespace dynprune
