// Products with a sparse weight: every row of it, or every few rows that share their zeros, has a list of the columns that are not zero.
//
//   sparse_gemm: out[i][p] = (accumulate ? out[i][p] : 0) + sum_j value[j][i] * panel[column[j]][p]     lanes are positions
//   sparse_dot:  out[i] = bias[i] + sum_j value[j] * x[column[j]]                                       lanes are nonzeros
//
// The index list takes the place that the list of active columns has in gather_gemm, so what is zero costs nothing. A row alone loads
// every vector of the panel for one multiply-add; rows that share their list load it once for all.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

// Chains of sums that hide the latency of the multiply-add: two units, four cycles.
constexpr int kSparseChains = 8;

template <int MR, int NV>
constexpr int sparse_unroll() {
  constexpr int needed = (kSparseChains + MR * NV - 1) / (MR * NV);
  constexpr int fit = Vec::kRegisters / 2 / (MR * NV);
  constexpr int most = needed < fit ? needed : fit;
  return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

template <int MR, int NV>
void sparse_run(const SparseGemmArgs& a, const SparseRun& run) {
  constexpr int kUnroll = sparse_unroll<MR, NV>();
  Vec sum[kUnroll][MR][NV];
  float* out = a.out + run.out_row * a.out_stride;
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[u][i][v] = u == 0 && a.accumulate ? load(out + i * a.out_stride + v * Vec::kLanes) : zero();
    }
  }
  const int32_t* column = a.column + run.first_column;
  const float* value = a.value + run.first_value;
  int64_t j = 0;
  for (; j + kUnroll <= run.count; j += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const float* panel = a.panel + column[j + u] * a.panel_stride;
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const Vec w = set1(value[(j + u) * run.value_stride + i]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[u][i][v] = fma(w, load(panel + v * Vec::kLanes), sum[u][i][v]);
      }
    }
  }
  for (; j < run.count; ++j) {
    const float* panel = a.panel + column[j] * a.panel_stride;
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const Vec w = set1(value[j * run.value_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[0][i][v] = fma(w, load(panel + v * Vec::kLanes), sum[0][i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Vec total = sum[0][i][v];
#pragma GCC unroll 4
      for (int u = 1; u < kUnroll; ++u) total = add(total, sum[u][i][v]);
      store(out + i * a.out_stride + v * Vec::kLanes, total);
    }
  }
}

template <int NV>
void sparse_runs(const SparseGemmArgs& a) {
  for (int64_t r = 0; r < a.num_runs; ++r) {
    const SparseRun& run = a.runs[r];
    if (run.rows == kSparseMaxRows) {
      sparse_run<kSparseMaxRows, NV>(a, run);
    } else {
      sparse_run<1, NV>(a, run);
    }
  }
}

template <int NV>
void sparse_width(const SparseGemmArgs& a) {
  if constexpr (NV > 0) {
    if (a.width == NV * Vec::kLanes) return sparse_runs<NV>(a);
    sparse_width<NV - 1>(a);
  }
}

void sparse_gemm(const SparseGemmArgs& a) { sparse_width<kGemmMaxVectors>(a); }

void sparse_dot(const SparseDotArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t row = a.row_index != nullptr ? a.row_index[i] : a.first_row + i;
    const int32_t* column = a.column + a.row_start[row];
    const float* value = a.value + a.row_start[row];
    const int64_t count = a.row_start[row + 1] - a.row_start[row];
    Vec sum[2] = {zero(), zero()};
    int64_t j = 0;
    for (; j + 2 * Vec::kLanes <= count; j += 2 * Vec::kLanes) {
      sum[0] = fma(load(value + j), gather(a.x, column + j), sum[0]);
      sum[1] = fma(load(value + j + Vec::kLanes), gather(a.x, column + j + Vec::kLanes), sum[1]);
    }
    for (; j + Vec::kLanes <= count; j += Vec::kLanes) sum[0] = fma(load(value + j), gather(a.x, column + j), sum[0]);
    float total = reduce_add(add(sum[0], sum[1]));
    for (; j < count; ++j) total += value[j] * a.x[column[j]];
    a.out[i] = total + (a.bias != nullptr ? a.bias[row] : 0.0f);
  }
}

}  // namespace
}  // namespace dynprune
