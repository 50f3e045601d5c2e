// Sixteen f32 lanes on AVX-512 F+CD+BW+DQ+VL. Same functions as the other vec_*.h; include only from isa/avx512.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12's own intrinsics start from a register they leave undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace dynprune {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  __m512 v;
};
struct Mask {
  __mmask16 m;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }  // 0 <= n <= 16

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }  // lanes >= n are 0
inline Vec widen_bf16(__m256i halves) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))}; }
// bfloat16
inline Vec load(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load_partial(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
// Lanes [first, last); first and last are clamped to the vector.
inline Mask lane_range(int64_t first, int64_t last) {
  const unsigned below_last = last <= 0 ? 0u : last >= 16 ? 0xFFFFu : (1u << last) - 1u;
  const unsigned below_first = first <= 0 ? 0u : first >= 16 ? 0xFFFFu : (1u << first) - 1u;
  return {static_cast<__mmask16>(below_last & ~below_first)};
}
// Lane i is bit i.
inline Mask lanes_of_bits(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
// Reads the lanes of the mask only; the others are 0, or those of `fill`.
inline Mask mask_from_bits(std::uint32_t bits) { return {static_cast<__mmask16>(bits)}; }  // lane i is bit i
inline Vec load_masked(const float* p, Mask m) { return {_mm512_maskz_loadu_ps(m.m, p)}; }
inline Vec load_masked(const float* p, uint32_t bits) { return load_masked(p, lanes_of_bits(bits)); }
inline Vec load_masked(const float* p, Mask m, Vec fill) { return {_mm512_mask_loadu_ps(fill.v, m.m, p)}; }
// Lane i is p[index[i]].
inline Vec gather(const float* p, const int32_t* index) { return {_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_partial(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// min/max hand on a NaN that stands in the second operand, as the instruction does.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// |a| = mantissa * 2^exponent with a mantissa in [1, 2); for a > 0 and finite.
inline Vec split_power_of_2(Vec a, Vec* exponent) {
  exponent->v = _mm512_getexp_ps(a.v);
  return {_mm512_getmant_ps(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero)};
}
inline Vec scale_by_power_of_2(Vec a, Vec exponent) { return {_mm512_scalef_ps(a.v, exponent.v)}; }  // a * 2^exponent

inline Mask greater(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Vec select(Mask m, Vec if_true, Vec if_false) { return {_mm512_mask_blend_ps(m.m, if_false.v, if_true.v)}; }

inline Vec max_keep_nan(Vec a, Vec b) {  // a NaN in either operand is handed on
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
inline Vec min_keep_nan(Vec a, Vec b) {
  return {_mm512_mask_mov_ps(_mm512_min_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}

// Lane i is p[index[i]], or 0 where bit i of `lanes` is 0; reads no further than p + 63. `upper` has the lanes whose index is >= 32.
inline Vec gather_lanes(const float* p, const int32_t* index, uint32_t lanes, uint32_t upper) {
  const __m512i chosen = _mm512_loadu_si512(index);
  __m512 v = _mm512_permutex2var_ps(_mm512_loadu_ps(p), chosen, _mm512_loadu_ps(p + 16));
  if (upper != 0) {
    const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(p + 32), chosen, _mm512_loadu_ps(p + 48));
    v = _mm512_mask_mov_ps(v, static_cast<__mmask16>(upper), high);
  }
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), v)};
}

// The even and the odd elements of the 32 that a and b hold.
inline Vec even_lanes(Vec a, Vec b) {
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}
inline Vec odd_lanes(Vec a, Vec b) {
  const __m512i index = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}

// Lanes moved by one: {the last of `before`, a[0], a[1], ...} and {a[1], a[2], ..., the first of `after`}.
inline Vec shifted_up(Vec before, Vec a) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(before.v), 15))};
}
inline Vec shifted_down(Vec a, Vec after) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(after.v), _mm512_castps_si512(a.v), 1))};
}

// out[j][i] = in[i][j] for i, j < 16: pairs of rows, then fours, are woven inside the 128-bit quarters, then the quarters change places.
inline void transpose_tile(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 fours[16];  // fours[4 g + c], quarter q: column 4 q + c of rows 4 g .. 4 g + 3
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const float* rows = in + 4 * g * in_stride;
    const __m512 r0 = _mm512_loadu_ps(rows);
    const __m512 r1 = _mm512_loadu_ps(rows + in_stride);
    const __m512 r2 = _mm512_loadu_ps(rows + 2 * in_stride);
    const __m512 r3 = _mm512_loadu_ps(rows + 3 * in_stride);
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
    fours[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    fours[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    fours[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    fours[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 first = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x44);
    const __m512 second = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x44);
    const __m512 third = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xEE);
    const __m512 fourth = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xEE);
    _mm512_storeu_ps(out + c * out_stride, _mm512_shuffle_f32x4(first, second, 0x88));
    _mm512_storeu_ps(out + (4 + c) * out_stride, _mm512_shuffle_f32x4(first, second, 0xDD));
    _mm512_storeu_ps(out + (8 + c) * out_stride, _mm512_shuffle_f32x4(third, fourth, 0x88));
    _mm512_storeu_ps(out + (12 + c) * out_stride, _mm512_shuffle_f32x4(third, fourth, 0xDD));
  }
}

inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace
}  // namespace dynprune
