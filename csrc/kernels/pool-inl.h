// Pooling of one plane, and means of rows. A window's maximum or sum is taken along x first, once per input row, then along y.
//
//   out[i][x] = max_rs in(first_row + i, x; r, s)    or    sum_rs in(first_row + i, x; r, s) / (row_count[i] * column_count[x])
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"
#include "kernels/window-inl.h"

namespace dynprune {
namespace {

template <class Combine>
void pool_with(const PoolArgs& a, Vec neutral, Combine combine) {
  const Window& window = *a.window;
  const int64_t width = (window.out_width + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
  float* line = a.packed;
  float* sums = a.packed + a.lines->stride;
  const int64_t rows = window_rows(window, a.num_rows);
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t y = a.first_row * window.stride_y - window.pad_top + j;
    float* sum = sums + j * width;
    if (y < 0 || y >= window.in_height) {
      fill_line(sum, width, neutral);
      continue;
    }
    pack_line(window, a.lines->phase_width, a.plane + y * window.in_width, neutral, line);
    for (int64_t x = 0; x < width; x += Vec::kLanes) {
      Vec value = load(line + x + a.lines->tap_offset[0]);
      for (int64_t s = 1; s < window.kernel_width; ++s) value = combine(value, load(line + x + a.lines->tap_offset[s]));
      store(sum + x, value);
    }
  }
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const float* first = sums + i * window.stride_y * width;
    for (int64_t x = 0; x < window.out_width; x += Vec::kLanes) {
      const int64_t lanes = window.out_width - x;
      Vec value = load(first + x);
      for (int64_t r = 1; r < window.kernel_height; ++r) value = combine(value, load(first + r * window.dilation_y * width + x));
      if (a.row_count != nullptr) value = div(value, mul(set1(a.row_count[i]), load_lanes(a.column_count + x, lanes)));
      store_lanes(a.out + i * window.out_width + x, value, lanes);
    }
  }
}

void pool(const PoolArgs& a) {
  if (a.row_count != nullptr) {
    pool_with(a, zero(), [](Vec x, Vec y) { return add(x, y); });
  } else {
    pool_with(a, set1(-std::numeric_limits<float>::infinity()), [](Vec x, Vec y) { return max_keep_nan(x, y); });
  }
}

inline float row_sum(const float* in, int64_t n) {
  constexpr int kUnroll = 4;
  Vec sum[kUnroll] = {zero(), zero(), zero(), zero()};
  int64_t p = 0;
  for (; p + kUnroll * Vec::kLanes <= n; p += kUnroll * Vec::kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kUnroll; ++v) sum[v] = add(sum[v], load(in + p + v * Vec::kLanes));
  }
  for (; p + Vec::kLanes <= n; p += Vec::kLanes) sum[0] = add(sum[0], load(in + p));
  if (p < n) sum[1] = add(sum[1], load_partial(in + p, static_cast<int>(n - p)));
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

void row_means(const RowMeansArgs& a) {
  const float scale = 1.0f / static_cast<float>(a.n);
  for (int64_t i = 0; i < a.rows; ++i) a.out[i] = row_sum(a.in + i * a.in_stride, a.n) * scale;
}

}  // namespace
}  // namespace dynprune
