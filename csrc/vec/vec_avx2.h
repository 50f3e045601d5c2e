// Eight f32 lanes on AVX2+FMA+F16C. Same functions as the other vec_*.h; include only from isa/avx2.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dynprune {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  __m256 v;
};
struct Mask {
  __m256 m;
};

inline __m256i first_lanes(int n) {  // 0 <= n <= 8
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }  // lanes >= n are 0
// bfloat16
inline Vec load(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
}
inline Vec load_partial(const uint16_t* p, int n) {
  uint16_t values[8] = {};
  for (int i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}
// Lanes [first, last); first and last are clamped to the vector.
inline Mask lane_range(int64_t first, int64_t last) {
  const int begin = first <= 0 ? 0 : first >= 8 ? 8 : static_cast<int>(first);
  const int end = last <= 0 ? 0 : last >= 8 ? 8 : static_cast<int>(last);
  return {_mm256_castsi256_ps(_mm256_andnot_si256(first_lanes(begin), first_lanes(end)))};
}
// Lane i is bit i.
inline Mask lanes_of_bits(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane))};
}
// Reads the lanes of the mask only; the others are 0, or those of `fill`.
inline Mask mask_from_bits(std::uint32_t bits) {  // lane i is bit i
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), places);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, places))};
}
inline Vec load_masked(const float* p, Mask m) { return {_mm256_maskload_ps(p, _mm256_castps_si256(m.m))}; }
inline Vec load_masked(const float* p, uint32_t bits) { return load_masked(p, lanes_of_bits(bits)); }
inline Vec load_masked(const float* p, Mask m, Vec fill) { return {_mm256_blendv_ps(fill.v, load_masked(p, m).v, m.m)}; }
// Lane i is p[index[i]].
inline Vec gather(const float* p, const int32_t* index) {
  return {_mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4)};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_partial(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// min/max hand on a NaN that stands in the second operand, as the instruction does.
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// |a| = mantissa * 2^exponent with a mantissa in [1, 2); for a > 0 and finite.
inline Vec split_power_of_2(Vec a, Vec* exponent) {
  const __m256 denormal = _mm256_cmp_ps(a.v, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);
  const __m256i bits = _mm256_castps_si256(_mm256_blendv_ps(a.v, _mm256_mul_ps(a.v, _mm256_set1_ps(8388608.0f)), denormal));
  const __m256i bias = _mm256_blendv_epi8(_mm256_set1_epi32(127), _mm256_set1_epi32(127 + 23), _mm256_castps_si256(denormal));
  exponent->v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), bias));
  const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x007FFFFF));
  return {_mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3F800000)))};
}
// a * 2^exponent for a whole exponent in [-252, 254]; two half steps so that results near the ends of the range stay exact.
inline Vec scale_by_power_of_2(Vec a, Vec exponent) {
  const __m256i e = _mm256_cvtps_epi32(exponent.v);
  const __m256i half = _mm256_srai_epi32(e, 1);
  const __m256i rest = _mm256_sub_epi32(e, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}

inline Mask greater(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Vec select(Mask m, Vec if_true, Vec if_false) { return {_mm256_blendv_ps(if_false.v, if_true.v, m.m)}; }

inline Vec max_keep_nan(Vec a, Vec b) {  // a NaN in either operand is handed on
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
inline Vec min_keep_nan(Vec a, Vec b) {
  return {_mm256_blendv_ps(_mm256_min_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}

// Lane i is p[index[i]], or 0 where bit i of `lanes` is 0; reads no further than p + 63. `upper` has the lanes whose index is >= 32.
inline Vec gather_lanes(const float* p, const int32_t* index, uint32_t lanes, uint32_t) {
  return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)),
                                   lanes_of_bits(lanes).m, 4)};
}

// The even and the odd elements of the 16 that a and b hold.
inline Vec even_lanes(Vec a, Vec b) {
  const __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, _MM_SHUFFLE(2, 0, 2, 0)));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(halves, _MM_SHUFFLE(3, 1, 2, 0)))};
}
inline Vec odd_lanes(Vec a, Vec b) {
  const __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, _MM_SHUFFLE(3, 1, 3, 1)));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(halves, _MM_SHUFFLE(3, 1, 2, 0)))};
}

// Lanes moved by one: {the last of `before`, a[0], a[1], ...} and {a[1], a[2], ..., the first of `after`}.
inline Vec shifted_up(Vec before, Vec a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i halves = _mm256_permute2x128_si256(_mm256_castps_si256(before.v), x, 0x21);
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(x, halves, 12))};
}
inline Vec shifted_down(Vec a, Vec after) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i halves = _mm256_permute2x128_si256(x, _mm256_castps_si256(after.v), 0x21);
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(halves, x, 4))};
}

// out[j][i] = in[i][j] for i, j < 8: pairs of rows, then fours, are woven inside the 128-bit halves, then the halves change places.
inline void transpose_tile(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 fours[8];  // fours[4 g + c], half h: column 4 h + c of rows 4 g .. 4 g + 3
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g) {
    const float* rows = in + 4 * g * in_stride;
    const __m256 r0 = _mm256_loadu_ps(rows);
    const __m256 r1 = _mm256_loadu_ps(rows + in_stride);
    const __m256 r2 = _mm256_loadu_ps(rows + 2 * in_stride);
    const __m256 r3 = _mm256_loadu_ps(rows + 3 * in_stride);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    fours[4 * g] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    fours[4 * g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    fours[4 * g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    fours[4 * g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * out_stride, _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * out_stride, _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31));
  }
}

inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

}  // namespace
}  // namespace dynprune
