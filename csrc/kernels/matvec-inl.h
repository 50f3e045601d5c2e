// Matrix-vector products for layers of one position: by row (dot products) and by column (sums of scaled rows of the transpose).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

// Four rows at once: x is loaded once for the four, and four chains of sums hide the latency of the multiply-add.
template <int ROWS>
void dot_tile(const DotRowsArgs& a, int64_t first) {
  const float* weight[ROWS];
  int64_t row[ROWS];
  Vec sum[ROWS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    row[i] = a.row_index != nullptr ? a.row_index[first + i] : a.first_row + first + i;
    weight[i] = a.weight + row[i] * a.weight_stride;
    sum[i] = zero();
  }
  int64_t k = 0;
  for (; k + Vec::kLanes <= a.k; k += Vec::kLanes) {
    const Vec x = load(a.x + k);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] = fma(load(weight[i] + k), x, sum[i]);
  }
  if (k < a.k) {
    const int rest = static_cast<int>(a.k - k);
    const Vec x = load_partial(a.x + k, rest);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] = fma(load_partial(weight[i] + k, rest), x, sum[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) a.out[first + i] = reduce_add(sum[i]) + (a.bias != nullptr ? a.bias[row[i]] : 0.0f);
}

void dot_rows(const DotRowsArgs& a) {
  int64_t i = 0;
  for (; i + 4 <= a.rows; i += 4) dot_tile<4>(a, i);
  for (; i < a.rows; ++i) dot_tile<1>(a, i);
}

// Blocks of eight vectors of outputs stay in registers over all columns.
template <int NV>
void axpy_block(const AxpyRowsArgs& a, int64_t first, int lanes_in_last) {
  Vec sum[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const float* bias = a.bias + first + v * Vec::kLanes;
    sum[v] = a.bias == nullptr ? zero() : v == NV - 1 ? load_partial(bias, lanes_in_last) : load(bias);
  }
  for (int64_t j = 0; j < a.columns; ++j) {
    const int64_t column = a.column_index != nullptr ? a.column_index[j] : j;
    const float* weight = a.weight + column * a.weight_stride + first;
    const Vec x = set1(a.x[j]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const float* w = weight + v * Vec::kLanes;
      sum[v] = fma(v == NV - 1 ? load_partial(w, lanes_in_last) : load(w), x, sum[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    float* out = a.out + first + v * Vec::kLanes;
    if (v == NV - 1) {
      store_partial(out, sum[v], lanes_in_last);
    } else {
      store(out, sum[v]);
    }
  }
}

template <int NV>
void axpy_rest(const AxpyRowsArgs& a, int64_t first, int64_t vectors, int lanes_in_last) {
  if constexpr (NV > 0) {
    if (vectors == NV) return axpy_block<NV>(a, first, lanes_in_last);
    axpy_rest<NV - 1>(a, first, vectors, lanes_in_last);
  }
}

void axpy_rows(const AxpyRowsArgs& a) {
  constexpr int kBlock = 8;
  const int64_t vectors = (a.n + Vec::kLanes - 1) / Vec::kLanes;
  for (int64_t v = 0; v < vectors; v += kBlock) {
    const int64_t here = vectors - v < kBlock ? vectors - v : kBlock;
    const bool last = v + here == vectors;
    const int lanes_in_last = last ? static_cast<int>(a.n - (vectors - 1) * Vec::kLanes) : Vec::kLanes;
    axpy_rest<kBlock>(a, v * Vec::kLanes, here, lanes_in_last);
  }
}

}  // namespace
}  // namespace dynprune
