// Register-tiled product for short sums (the expansion of an inverted residual reads 16 to 160 channels), bias and clamp included:
//
//   out[i][p] = clamp(bias[i] + sum_k weight[r_i * weight_stride + weight_offset[k]] * panel[k][p], low, high)
//
// The tiles are those of gather_gemm-inl.h; the sums begin with the bias and are clamped in the registers, so that the result is
// written once.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/gather_gemm-inl.h"

namespace dynprune {
namespace {

template <int MR, int NV>
void pointwise_tile(const PointwiseArgs& a, int64_t first) {
  const float* weight[MR];
  Vec sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const int64_t row = a.row_index != nullptr ? a.row_index[first + i] : a.first_row + first + i;
    weight[i] = a.weight + row * a.weight_stride;
    const Vec bias = set1(a.bias[first + i]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[i][v] = bias;
  }
  const float* panel = a.panel;
  for (int64_t k = 0; k < a.k; ++k, panel += a.panel_stride) {
    const int64_t offset = a.weight_offset[k];
    Vec x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = load(panel + v * Vec::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec w = set1(weight[i][offset]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] = fma(w, x[v], sum[i][v]);
    }
  }
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  float* out = a.out + first * a.out_stride;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + i * a.out_stride + v * Vec::kLanes, clamp(sum[i][v], low, high));
  }
}

template <int NV>
void pointwise_width(const PointwiseArgs& a) {
  if constexpr (NV > 0) {
    if (a.width != NV * Vec::kLanes) return pointwise_width<NV - 1>(a);
    in_tiles_of_rows<NV>(0, a.m, [&a](int64_t first, auto rows) { pointwise_tile<decltype(rows)::value, NV>(a, first); });
  }
}

void pointwise(const PointwiseArgs& a) { pointwise_width<kGemmMaxVectors>(a); }

}  // namespace
}  // namespace dynprune
