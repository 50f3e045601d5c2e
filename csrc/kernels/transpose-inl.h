// out[j][i] = in[i][j], by blocks that stay in the first-level cache.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

void transpose(const TransposeArgs& a) {
  constexpr int64_t kBlock = 16;  // one cache line of columns
  for (int64_t i = 0; i < a.rows; i += kBlock) {
    const int64_t rows = a.rows - i < kBlock ? a.rows - i : kBlock;
    for (int64_t j = 0; j < a.columns; j += kBlock) {
      const int64_t columns = a.columns - j < kBlock ? a.columns - j : kBlock;
      for (int64_t y = 0; y < columns; ++y) {
        for (int64_t x = 0; x < rows; ++x) a.out[(j + y) * a.out_stride + i + x] = a.in[(i + x) * a.in_stride + j + y];
      }
    }
  }
}

}  // namespace
}  // namespace dynprune
