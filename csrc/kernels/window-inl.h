// Lays input rows out as `WindowLines`: padding filled in, columns split by their remainder modulo the stride.
//
//   line[f * phase_width + i] = in[i * stride_x + f - pad_left], or `fill` where that column is outside the plane
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

inline void fill_line(float* line, int64_t length, Vec fill) {
  for (int64_t i = 0; i < length; i += Vec::kLanes) store(line + i, fill);
}

// Input columns [first, first + lanes) of a row of `width` columns.
inline Vec load_columns(const float* in, int64_t width, int64_t first, Vec fill) {
  if (first >= 0 && first + Vec::kLanes <= width) return load(in + first);
  return load_masked(in + first, lane_range(-first, width - first), fill);
}

inline void pack_line_whole(const float* in, int64_t width, int64_t pad_left, int64_t phase_width, Vec fill, float* line) {
  for (int64_t i = 0; i < phase_width; i += Vec::kLanes) store(line + i, load_columns(in, width, i - pad_left, fill));
}

inline void pack_line_halves(const float* in, int64_t width, int64_t pad_left, int64_t phase_width, Vec fill, float* line) {
  for (int64_t i = 0; i < phase_width; i += Vec::kLanes) {
    const Vec low = load_columns(in, width, 2 * i - pad_left, fill);
    const Vec high = load_columns(in, width, 2 * i - pad_left + Vec::kLanes, fill);
    store(line + i, even_lanes(low, high));
    store(line + phase_width + i, odd_lanes(low, high));
  }
}

inline void pack_line(const Window& window, int64_t phase_width, const float* in, Vec fill, float* line) {
  if (window.stride_x == 1) return pack_line_whole(in, window.in_width, window.pad_left, phase_width, fill, line);
  if (window.stride_x == 2) return pack_line_halves(in, window.in_width, window.pad_left, phase_width, fill, line);
  fill_line(line, window.stride_x * phase_width, fill);
  for (int64_t phase = 0; phase < window.stride_x; ++phase) {
    float* target = line + phase * phase_width;
    const int64_t offset = phase - window.pad_left;
    int64_t i = offset >= 0 ? 0 : (window.stride_x - 1 - offset) / window.stride_x;
    for (; i < phase_width && i * window.stride_x + offset < window.in_width; ++i) target[i] = in[i * window.stride_x + offset];
  }
}

// How many input rows the window sees over `num_rows` output rows.
inline int64_t window_rows(const Window& window, int64_t num_rows) {
  return (num_rows - 1) * window.stride_y + (window.kernel_height - 1) * window.dilation_y + 1;
}

inline void store_lanes(float* p, Vec value, int64_t lanes) {
  if (lanes >= Vec::kLanes) {
    store(p, value);
  } else {
    store_partial(p, value, static_cast<int>(lanes));
  }
}

inline Vec load_lanes(const float* p, int64_t lanes) {
  return lanes >= Vec::kLanes ? load(p) : load_partial(p, static_cast<int>(lanes));
}

}  // namespace
}  // namespace dynprune
