// Register-tiled product of chosen weight rows and columns with a packed panel of patches.
//
//   out[i][p] = (accumulate ? out[i][p] : 0) + sum_k weight[row_i * weight_stride + weight_offset[k]] * panel[k][p]
//
// Lanes are positions, a weight is broadcast, so a row or a column that is not in its list costs nothing. The tile is MR rows by NV
// vectors; its accumulators, one row of the panel and the broadcast fill the register file (AVX-512: 6x4, 9x3; AVX2: 6x2).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

template <int NV>
constexpr int max_tile_rows() {
  constexpr int fit = (Vec::kRegisters - NV - 1) / NV;
  return fit < 1 ? 1 : fit > 12 ? 12 : fit;
}

#if defined(__AVX512F__)
constexpr int kGemmMaxVectors = 4;
#elif defined(__AVX2__)
constexpr int kGemmMaxVectors = 2;
#else
constexpr int kGemmMaxVectors = 8;
#endif

// Asks for the beginnings of the next tile's weight rows: each row is a new stream, which the hardware only follows once it has begun.
inline void prefetch_rows(const GatherGemmArgs& a, int64_t first, int64_t count) {
  const int64_t last = first + count < a.m ? first + count : a.m;
  if (a.k == 0) return;
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = a.row_index != nullptr ? a.row_index[i] : a.first_row + i;
    const float* weight = a.weight + row * a.weight_stride + a.weight_offset[0];
    for (int line = 0; line < 4; ++line) __builtin_prefetch(weight + 16 * line);
  }
}

template <int MR, int NV>
void gemm_tile(const GatherGemmArgs& a, int64_t first) {
  const float* weight[MR];
  Vec sum[MR][NV];
  for (int i = 0; i < MR; ++i) {
    const int64_t row = a.row_index != nullptr ? a.row_index[first + i] : a.first_row + first + i;
    weight[i] = a.weight + row * a.weight_stride;
  }
  prefetch_rows(a, first + MR, MR);
  float* out = a.out + first * a.out_stride;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[i][v] = a.accumulate ? load(out + i * a.out_stride + v * Vec::kLanes) : zero();
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
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + i * a.out_stride + v * Vec::kLanes, sum[i][v]);
  }
}

template <int MR, int NV>
void gemm_rest(const GatherGemmArgs& a, int64_t first, int64_t rows) {
  if constexpr (MR > 0) {
    if (rows == MR) return gemm_tile<MR, NV>(a, first);
    gemm_rest<MR - 1, NV>(a, first, rows);
  }
}

template <int NV>
void gemm_rows(const GatherGemmArgs& a) {
  constexpr int kRows = max_tile_rows<NV>();
  int64_t i = 0;
  for (; i + kRows <= a.m; i += kRows) gemm_tile<kRows, NV>(a, i);
  gemm_rest<kRows - 1, NV>(a, i, a.m - i);
}

template <int NV>
void gemm_width(const GatherGemmArgs& a) {
  if constexpr (NV > 0) {
    if (a.width == NV * Vec::kLanes) return gemm_rows<NV>(a);
    gemm_width<NV - 1>(a);
  }
}

void gather_gemm(const GatherGemmArgs& a) { gemm_width<kGemmMaxVectors>(a); }

}  // namespace
}  // namespace dynprune
