// Depthwise convolution of one plane:
//
//   out[i][x] = clamp(bias + sum_rs weight[r][s] * in[(first_row + i) * stride_y - pad_top + r * dilation_y]
//                                                   [x * stride_x - pad_left + s * dilation_x], low, high)
//
// The input rows are laid out once (`window-inl.h`), so the sums need no borders and no strides. A tile is up to four output rows by
// one vector: a loaded vector serves every row that sees it, which halves the loads or better, and unaligned loads are what limits
// this kernel.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/window-inl.h"

namespace dynprune {
namespace {

template <int KH, int SY, int ROWS>
void depthwise_tile(const DepthwiseArgs& a, const float* lines, float* out) {
  const int64_t width = a.window->out_width;
  const int64_t taps = a.window->kernel_width;
  const int64_t stride = a.lines->stride;
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  for (int64_t x = 0; x < width; x += Vec::kLanes) {
    Vec sum[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) sum[i] = set1(a.bias);
    for (int64_t s = 0; s < taps; ++s) {
      const float* line = lines + x + a.lines->tap_offset[s];
      Vec weight[KH];
#pragma GCC unroll 8
      for (int r = 0; r < KH; ++r) weight[r] = set1(a.weight[r * taps + s]);
#pragma GCC unroll 16
      for (int j = 0; j < (ROWS - 1) * SY + KH; ++j) {
        const Vec value = load(line + j * stride);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          if (j >= i * SY && j < i * SY + KH) sum[i] = fma(weight[j - i * SY], value, sum[i]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) store_lanes(out + i * width + x, clamp(sum[i], low, high), width - x);
  }
}

template <int KH, int SY>
void depthwise_rows(const DepthwiseArgs& a) {
  const float* lines = a.packed;
  float* out = a.out;
  int64_t rows = a.num_rows;
  for (; rows >= 4; rows -= 4) {
    depthwise_tile<KH, SY, 4>(a, lines, out);
    lines += 4 * SY * a.lines->stride;
    out += 4 * a.window->out_width;
  }
  if (rows == 3) depthwise_tile<KH, SY, 3>(a, lines, out);
  if (rows == 2) depthwise_tile<KH, SY, 2>(a, lines, out);
  if (rows == 1) depthwise_tile<KH, SY, 1>(a, lines, out);
}

// Any kernel, stride and dilation: one output row by up to four vectors.
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
  const int64_t width = a.window->out_width;
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const float* lines = a.packed + i * a.window->stride_y * a.lines->stride;
    float* out = a.out + i * width;
    int64_t x = 0;
    for (; x + 4 * Vec::kLanes <= width; x += 4 * Vec::kLanes) depthwise_strip<4>(a, lines + x, out + x, width - x);
    for (; x < width; x += Vec::kLanes) depthwise_strip<1>(a, lines + x, out + x, width - x);
  }
}

void depthwise(const DepthwiseArgs& a) {
  const Window& window = *a.window;
  const int64_t rows = window_rows(window, a.num_rows);
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t y = a.first_row * window.stride_y - window.pad_top + j;
    float* line = a.packed + j * a.lines->stride;
    if (y >= 0 && y < window.in_height) {
      pack_line(window, a.lines->phase_width, a.plane + y * window.in_width, zero(), line);
    } else {
      fill_line(line, a.lines->stride, zero());
    }
  }
  const bool plain = window.dilation_y == 1 && window.stride_y <= 2;
  const int64_t shape = plain ? window.kernel_height * 10 + window.stride_y : 0;
  switch (shape) {
    case 31: return depthwise_rows<3, 1>(a);
    case 32: return depthwise_rows<3, 2>(a);
    case 51: return depthwise_rows<5, 1>(a);
    case 52: return depthwise_rows<5, 2>(a);
    case 71: return depthwise_rows<7, 1>(a);
    case 72: return depthwise_rows<7, 2>(a);
    default: return depthwise_any(a);
  }
}

}  // namespace
}  // namespace dynprune
