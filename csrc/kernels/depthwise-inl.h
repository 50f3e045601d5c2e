// Depthwise convolution of one plane:
//
//   out[i][x] = clamp(bias + sum_rs weight[r][s] * in[(first_row + i) * stride_y - pad_top + r * dilation_y]
//                                                   [x * stride_x - pad_left + s * dilation_x], low, high)
//
// Kernels of 3, 5 and 7 rows at stride 1 or 2 read the plane as it lies: a tile is up to seven output rows by one vector, a loaded
// vector serves every row of the tile that sees it, columns outside the plane are masked and rows outside are `zeros`. Anything else
// goes through `WindowLines`.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/window-inl.h"

namespace dynprune {
namespace {

// The heights that matter (7, 14, 28, 56, 112) are multiples of it, and the sums of a tile fill half the registers of AVX2.
constexpr int kTileRows = 7;

// Adds weight[r][s] * value to every output row of the tile that sees input row j of the tile.
template <int KH, int STRIDE, int ROWS>
inline void add_row(int j, const Vec (&weight)[KH], Vec value, Vec (&sum)[ROWS]) {
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (j >= i * STRIDE && j < i * STRIDE + KH) sum[i] = fma(weight[j - i * STRIDE], value, sum[i]);
  }
}

template <int KH>
inline void broadcast_column(const DepthwiseArgs& a, int64_t s, Vec (&weight)[KH]) {
#pragma GCC unroll 8
  for (int r = 0; r < KH; ++r) weight[r] = set1(a.weight[r * a.window->kernel_width + s]);
}

// Taps of stride 1: one load each. Taps of stride 2 come in pairs, the even and the odd lanes of two vectors.
template <int KH, int STRIDE, int ROWS>
inline void add_taps(const DepthwiseArgs& a, const float* const* rows, int64_t x, Vec (&sum)[ROWS]) {
  constexpr int kRows = (ROWS - 1) * STRIDE + KH;
  const Window& window = *a.window;
  const int64_t taps = window.kernel_width;
  for (int64_t s = 0; s < taps; s += STRIDE) {
    const int64_t column = x * STRIDE - window.pad_left + s * window.dilation_x;
    const Mask mask = lane_range(-column, window.in_width - column);
    Vec weight[KH];
    broadcast_column(a, s, weight);
    if constexpr (STRIDE == 1) {
#pragma GCC unroll 32
      for (int j = 0; j < kRows; ++j) add_row<KH, STRIDE>(j, weight, load_masked(rows[j] + column, mask), sum);
    } else {
      const Mask next = lane_range(-column - Vec::kLanes, window.in_width - column - Vec::kLanes);
      if (s + 1 < taps) {
        Vec odd_weight[KH];
        broadcast_column(a, s + 1, odd_weight);
#pragma GCC unroll 32
        for (int j = 0; j < kRows; ++j) {
          const Vec low = load_masked(rows[j] + column, mask);
          const Vec high = load_masked(rows[j] + column + Vec::kLanes, next);
          add_row<KH, STRIDE>(j, weight, even_lanes(low, high), sum);
          add_row<KH, STRIDE>(j, odd_weight, odd_lanes(low, high), sum);
        }
      } else {
#pragma GCC unroll 32
        for (int j = 0; j < kRows; ++j) {
          const Vec low = load_masked(rows[j] + column, mask);
          const Vec high = load_masked(rows[j] + column + Vec::kLanes, next);
          add_row<KH, STRIDE>(j, weight, even_lanes(low, high), sum);
        }
      }
    }
  }
}

template <int KH, int STRIDE, int ROWS>
void depthwise_tile(const DepthwiseArgs& a, int64_t row, float* out) {
  const Window& window = *a.window;
  const float* rows[(ROWS - 1) * STRIDE + KH];
#pragma GCC unroll 32
  for (int j = 0; j < (ROWS - 1) * STRIDE + KH; ++j) {
    const int64_t y = row * STRIDE - window.pad_top + j;
    rows[j] = y >= 0 && y < window.in_height ? a.plane + y * window.in_width : a.zeros;
  }
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  for (int64_t x = 0; x < window.out_width; x += Vec::kLanes) {
    Vec sum[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) sum[i] = set1(a.bias);
    add_taps<KH, STRIDE>(a, rows, x, sum);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) store_lanes(out + i * window.out_width + x, clamp(sum[i], low, high), window.out_width - x);
  }
}

template <int KH, int STRIDE, int ROWS>
void depthwise_tile_of(const DepthwiseArgs& a, int64_t rows, int64_t row, float* out) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return depthwise_tile<KH, STRIDE, ROWS>(a, row, out);
    depthwise_tile_of<KH, STRIDE, ROWS - 1>(a, rows, row, out);
  }
}

// Tiles whose heights differ by one row at most.
template <int KH, int STRIDE>
void depthwise_tiles(const DepthwiseArgs& a) {
  const int64_t tiles = (a.num_rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = a.num_rows * t / tiles;
    const int64_t end = a.num_rows * (t + 1) / tiles;
    depthwise_tile_of<KH, STRIDE, kTileRows>(a, end - begin, a.first_row + begin, a.out + begin * a.window->out_width);
  }
}

// Any kernel, stride and dilation: one output row by up to four vectors of packed lines.
template <int VECTORS>
void depthwise_strip(const DepthwiseArgs& a, const float* lines, float* out, int64_t lanes) {
  const Window& window = *a.window;
  Vec sum[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) sum[v] = set1(a.bias);
  for (int64_t r = 0; r < window.kernel_height; ++r) {
    const float* line = lines + r * window.dilation_y * a.lines->stride;
    for (int64_t s = 0; s < window.kernel_width; ++s) {
      const Vec weight = set1(a.weight[r * window.kernel_width + s]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[v] = fma(weight, load(line + a.lines->tap_offset[s] + v * Vec::kLanes), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    store_lanes(out + v * Vec::kLanes, clamp(sum[v], set1(a.low), set1(a.high)), lanes - v * Vec::kLanes);
  }
}

void depthwise_any(const DepthwiseArgs& a) {
  const Window& window = *a.window;
  const int64_t seen = window_rows(window, a.num_rows);
  for (int64_t j = 0; j < seen; ++j) {
    const int64_t y = a.first_row * window.stride_y - window.pad_top + j;
    const float* row = y >= 0 && y < window.in_height ? a.plane + y * window.in_width : a.zeros;
    pack_line(window, a.lines->phase_width, row, zero(), a.packed + j * a.lines->stride);
  }
  const int64_t width = window.out_width;
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const float* lines = a.packed + i * window.stride_y * a.lines->stride;
    float* out = a.out + i * width;
    int64_t x = 0;
    for (; x + 4 * Vec::kLanes <= width; x += 4 * Vec::kLanes) depthwise_strip<4>(a, lines + x, out + x, width - x);
    for (; x < width; x += Vec::kLanes) depthwise_strip<1>(a, lines + x, out + x, width - x);
  }
}

void depthwise(const DepthwiseArgs& a) {
  const Window& window = *a.window;
  const bool unit = window.stride_y == 1 && window.stride_x == 1 && window.dilation_y == 1;
  const bool halves = window.stride_y == 2 && window.stride_x == 2 && window.dilation_y == 1 && window.dilation_x == 1;
  switch (unit ? window.kernel_height : halves ? -window.kernel_height : 0) {
    case 3: return depthwise_tiles<3, 1>(a);
    case 5: return depthwise_tiles<5, 1>(a);
    case 7: return depthwise_tiles<7, 1>(a);
    case -3: return depthwise_tiles<3, 2>(a);
    case -5: return depthwise_tiles<5, 2>(a);
    case -7: return depthwise_tiles<7, 2>(a);
    default: return depthwise_any(a);
  }
}

}  // namespace
}  // namespace dynprune
