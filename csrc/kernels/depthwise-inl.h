// Depthwise convolution of some planes, each by its own kernel:
//
//   out[i][y][x] = clamp(bias_i + sum_rs weight_i[r][s] * in_i[(first_row + y) * stride_y - pad_top + r * dilation_y]
//                                                            [x * stride_x - pad_left + s * dilation_x], low, high)
//
// Kernels of 3x3, 5x5 and 7x7 at stride 1 or 2 read the plane as it lies: a tile is up to seven output rows by one vector, a loaded
// vector serves every row of the tile that sees it, columns outside the plane are masked and rows outside are `zeros`. What does not
// depend on the plane (masks, which rows lie outside) is worked out once for all planes. Anything else goes through `WindowLines`.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/window-inl.h"

namespace dynprune {
namespace {

// The heights that matter (7, 14, 28, 56, 112) are multiples of it, and the sums of a tile fill half the registers of AVX2.
constexpr int kTileRows = 7;
// Vectors of output columns that may see columns outside the plane; wider borders go through `WindowLines`.
constexpr int kMaxPartial = 8;
constexpr int kMaxTaps = 8;

// Which vectors of output columns see columns outside the plane, and the masks of what they load: one for each tap, at stride 2 two
// for each pair of taps (the even and the odd columns of two vectors).
struct ColumnMasks {
  int64_t blocks;       // vectors of output columns
  int64_t whole_begin;  // those in [whole_begin, whole_end) see no column outside
  int64_t whole_end;
  Mask masks[kMaxPartial][kMaxTaps];
};

inline int64_t first_column(const Window& window, int64_t block) { return block * Vec::kLanes * window.stride_x - window.pad_left; }

inline void fill_masks(const Window& window, int64_t block, Mask* masks) {
  for (int64_t s = 0; s < window.kernel_width; s += window.stride_x) {
    const int64_t column = first_column(window, block) + s;
    masks[s] = lane_range(-column, window.in_width - column);
    if (window.stride_x == 2) masks[s + 1] = lane_range(-column - Vec::kLanes, window.in_width - column - Vec::kLanes);
  }
}

// Returns false where there are more partial vectors than the masks have room for.
inline bool make_masks(const Window& window, ColumnMasks* result) {
  const int64_t blocks = (window.out_width + Vec::kLanes - 1) / Vec::kLanes;
  const int64_t reach = window.stride_x * Vec::kLanes + window.kernel_width - 1;
  int64_t begin = 0;
  while (begin < blocks && begin <= kMaxPartial && first_column(window, begin) < 0) ++begin;
  int64_t end = blocks;
  while (end > begin && blocks - end <= kMaxPartial && first_column(window, end - 1) + reach > window.in_width) --end;
  if (begin + blocks - end > kMaxPartial) return false;
  result->blocks = blocks;
  result->whole_begin = begin;
  result->whole_end = end;
  for (int64_t b = 0; b < begin; ++b) fill_masks(window, b, result->masks[b]);
  for (int64_t b = end; b < blocks; ++b) fill_masks(window, b, result->masks[begin + b - end]);
  return true;
}

template <bool MASKED>
inline Vec load_seen(const float* p, Mask mask) {
  if constexpr (MASKED) {
    return load_masked(p, mask);
  } else {
    return load(p);
  }
}

// Adds weight[r] * value to every output row of the tile that sees input row j of the tile.
template <int K, int STRIDE, int ROWS>
inline void add_row(int j, const Vec (&weight)[K], Vec value, Vec (&sum)[ROWS]) {
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (j >= i * STRIDE && j < i * STRIDE + K) sum[i] = fma(weight[j - i * STRIDE], value, sum[i]);
  }
}

// Column s of a K x K kernel.
template <int K>
inline void broadcast_column(const float* weight, int s, Vec (&column)[K]) {
#pragma GCC unroll 8
  for (int r = 0; r < K; ++r) column[r] = set1(weight[r * K + s]);
}

// Taps of stride 1: one load each. Taps of stride 2 come in pairs, the even and the odd lanes of two vectors.
template <int K, int STRIDE, int ROWS, bool MASKED>
inline void add_taps(const float* const* rows, int64_t column, const float* weight, const Mask* masks, Vec (&sum)[ROWS]) {
  constexpr int kRows = (ROWS - 1) * STRIDE + K;
#pragma GCC unroll 8
  for (int s = 0; s < K; s += STRIDE) {
    const Mask mask = MASKED ? masks[s] : Mask{};
    Vec even_weight[K];
    broadcast_column(weight, s, even_weight);
    if constexpr (STRIDE == 1) {
#pragma GCC unroll 32
      for (int j = 0; j < kRows; ++j) add_row<K, STRIDE>(j, even_weight, load_seen<MASKED>(rows[j] + column + s, mask), sum);
    } else {
      const Mask next = MASKED ? masks[s + 1] : Mask{};
      Vec odd_weight[K];
      if (s + 1 < K) broadcast_column(weight, s + 1, odd_weight);
#pragma GCC unroll 32
      for (int j = 0; j < kRows; ++j) {
        const Vec low = load_seen<MASKED>(rows[j] + column + s, mask);
        const Vec high = load_seen<MASKED>(rows[j] + column + s + Vec::kLanes, next);
        add_row<K, STRIDE>(j, even_weight, even_lanes(low, high), sum);
        if (s + 1 < K) add_row<K, STRIDE>(j, odd_weight, odd_lanes(low, high), sum);
      }
    }
  }
}

// One vector of the output rows of a tile; `lanes` of it are inside the plane.
template <int K, int STRIDE, int ROWS, bool MASKED>
inline void depthwise_block(const DepthwiseArgs& a, const float* const* rows, int64_t column, const float* weight, Vec bias,
                            const Mask* masks, float* out, int64_t lanes) {
  const int64_t width = a.window->out_width;
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  Vec sum[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) sum[i] = bias;
  add_taps<K, STRIDE, ROWS, MASKED>(rows, column, weight, masks, sum);
  if (lanes >= Vec::kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) store(out + i * width, clamp(sum[i], low, high));
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) store_partial(out + i * width, clamp(sum[i], low, high), static_cast<int>(lanes));
  }
}

inline int64_t channel_of(const DepthwiseArgs& a, int64_t i) { return a.row_index != nullptr ? a.row_index[i] : a.first_channel + i; }

// Output rows [row, row + ROWS) of every plane; `row` counts from a.first_row.
template <int K, int STRIDE, int ROWS>
void depthwise_tile(const DepthwiseArgs& a, const ColumnMasks& masks, int64_t row) {
  constexpr int kRows = (ROWS - 1) * STRIDE + K;
  const Window& window = *a.window;
  const int64_t top = (a.first_row + row) * STRIDE - window.pad_top;
  const float* rows[kRows];
  int64_t step[kRows];  // to the same row of the next plane
  for (int j = 0; j < kRows; ++j) {
    const bool inside = top + j >= 0 && top + j < window.in_height;
    rows[j] = inside ? a.planes + (top + j) * window.in_width : a.zeros;
    step[j] = inside ? a.plane_stride : 0;
  }
  float* out = a.out + row * window.out_width;
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t channel = channel_of(a, i);
    const float* weight = a.weight + channel * K * K;
    const Vec bias = set1(a.bias[channel]);
    auto masked = [&](int64_t block, const Mask* seen) {
      const int64_t x = block * Vec::kLanes;
      depthwise_block<K, STRIDE, ROWS, true>(a, rows, first_column(window, block), weight, bias, seen, out + x, window.out_width - x);
    };
    for (int64_t block = 0; block < masks.whole_begin; ++block) masked(block, masks.masks[block]);
    for (int64_t block = masks.whole_begin; block < masks.whole_end; ++block) {
      const int64_t x = block * Vec::kLanes;
      depthwise_block<K, STRIDE, ROWS, false>(a, rows, first_column(window, block), weight, bias, nullptr, out + x, window.out_width - x);
    }
    for (int64_t block = masks.whole_end; block < masks.blocks; ++block) {
      masked(block, masks.masks[masks.whole_begin + block - masks.whole_end]);
    }
    for (int j = 0; j < kRows; ++j) rows[j] += step[j];
    out += a.out_stride;
  }
}

template <int K, int STRIDE, int ROWS>
void depthwise_tile_of(const DepthwiseArgs& a, const ColumnMasks& masks, int64_t rows, int64_t row) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return depthwise_tile<K, STRIDE, ROWS>(a, masks, row);
    depthwise_tile_of<K, STRIDE, ROWS - 1>(a, masks, rows, row);
  }
}

// Tiles whose heights differ by one row at most.
template <int K, int STRIDE>
void depthwise_tiles(const DepthwiseArgs& a, const ColumnMasks& masks) {
  const int64_t tiles = (a.num_rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = a.num_rows * t / tiles;
    const int64_t end = a.num_rows * (t + 1) / tiles;
    depthwise_tile_of<K, STRIDE, kTileRows>(a, masks, end - begin, begin);
  }
}

// Any kernel, stride and dilation: one output row by up to four vectors of packed lines.
template <int VECTORS>
void depthwise_strip(const DepthwiseArgs& a, int64_t channel, const float* lines, float* out, int64_t lanes) {
  const Window& window = *a.window;
  const float* weights = a.weight + channel * window.kernel_height * window.kernel_width;
  Vec sum[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) sum[v] = set1(a.bias[channel]);
  for (int64_t r = 0; r < window.kernel_height; ++r) {
    const float* line = lines + r * window.dilation_y * a.lines->stride;
    for (int64_t s = 0; s < window.kernel_width; ++s) {
      const Vec weight = set1(weights[r * window.kernel_width + s]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[v] = fma(weight, load(line + a.lines->tap_offset[s] + v * Vec::kLanes), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    store_lanes(out + v * Vec::kLanes, clamp(sum[v], set1(a.low), set1(a.high)), lanes - v * Vec::kLanes);
  }
}

void depthwise_any_plane(const DepthwiseArgs& a, int64_t plane) {
  const Window& window = *a.window;
  const int64_t seen = window_rows(window, a.num_rows);
  for (int64_t j = 0; j < seen; ++j) {
    const int64_t y = a.first_row * window.stride_y - window.pad_top + j;
    const float* row = y >= 0 && y < window.in_height ? a.planes + plane * a.plane_stride + y * window.in_width : a.zeros;
    pack_line(window, a.lines->phase_width, row, zero(), a.packed + j * a.lines->stride);
  }
  const int64_t width = window.out_width;
  const int64_t channel = channel_of(a, plane);
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const float* lines = a.packed + i * window.stride_y * a.lines->stride;
    float* out = a.out + plane * a.out_stride + i * width;
    int64_t x = 0;
    for (; x + 4 * Vec::kLanes <= width; x += 4 * Vec::kLanes) depthwise_strip<4>(a, channel, lines + x, out + x, width - x);
    for (; x < width; x += Vec::kLanes) depthwise_strip<1>(a, channel, lines + x, out + x, width - x);
  }
}

void depthwise(const DepthwiseArgs& a) {
  const Window& window = *a.window;
  const bool plain = window.kernel_width == window.kernel_height && window.stride_x == window.stride_y && window.dilation_x == 1 &&
                     window.dilation_y == 1 && window.stride_x <= 2;
  ColumnMasks masks;
  switch (plain && make_masks(window, &masks) ? window.kernel_height * (window.stride_x == 1 ? 1 : -1) : 0) {
    case 3: return depthwise_tiles<3, 1>(a, masks);
    case 5: return depthwise_tiles<5, 1>(a, masks);
    case 7: return depthwise_tiles<7, 1>(a, masks);
    case -3: return depthwise_tiles<3, 2>(a, masks);
    case -5: return depthwise_tiles<5, 2>(a, masks);
    case -7: return depthwise_tiles<7, 2>(a, masks);
    default:
      for (int64_t i = 0; i < a.rows; ++i) depthwise_any_plane(a, i);
  }
}

}  // namespace
}  // namespace dynprune
