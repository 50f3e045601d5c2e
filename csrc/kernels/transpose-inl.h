// out[j][i] = in[i][j], by tiles of a vector's lanes squared; what is left at the edges goes element by element.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

// The elements of rows [i, i_end) and columns [j, j_end).
inline void transpose_edge(const TransposeArgs& a, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
  for (; j < j_end; ++j) {
    for (int64_t row = i; row < i_end; ++row) a.out[j * a.out_stride + row] = a.in[row * a.in_stride + j];
  }
}

void transpose(const TransposeArgs& a) {
  constexpr int64_t kBlock = Vec::kLanes > 1 ? Vec::kLanes : 16;
  for (int64_t i = 0; i < a.rows; i += kBlock) {
    const int64_t i_end = i + kBlock < a.rows ? i + kBlock : a.rows;
    for (int64_t j = 0; j < a.columns; j += kBlock) {
      const int64_t j_end = j + kBlock < a.columns ? j + kBlock : a.columns;
      if (Vec::kLanes > 1 && i_end - i == kBlock && j_end - j == kBlock) {
        transpose_tile(a.in + i * a.in_stride + j, a.in_stride, a.out + j * a.out_stride + i, a.out_stride);
      } else {
        transpose_edge(a, i, i_end, j, j_end);
      }
    }
  }
}

}  // namespace
}  // namespace dynprune
