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
constexpr int kMaxTaps = 7;

// The columns that one vector of outputs sees. Tap t of output lane i is column first + t + i * stride. Those of the middle tap (at
// stride 2 of the two middle ones) are loaded; the others are those of a neighbouring tap moved by one lane, with one column filled
// in: a load that crosses a cache line, as nearly all of the moved ones would, costs three times a shuffle.
struct BlockColumns {
  int64_t first;
  int64_t fill[kMaxTaps];  // the column filled in for tap t, clamped to the plane
  Mask inside[kMaxTaps];   // whether it is inside: all lanes or none
  Mask low, high;          // of the loaded columns, those inside
};

// Which vectors of output columns see columns outside the plane.
struct ColumnBlocks {
  int64_t count;
  int64_t whole_begin;  // those in [whole_begin, whole_end) see no column outside
  int64_t whole_end;
  BlockColumns partial[kMaxPartial];
};

inline int64_t first_column(const Window& window, int64_t block) { return block * Vec::kLanes * window.stride_x - window.pad_left; }

template <int K, int STRIDE>
constexpr int64_t fill_column(int tap) {
  return tap < K / 2 ? tap : tap + (Vec::kLanes - 1) * STRIDE;
}

template <int K, int STRIDE>
inline void fill_partial(const Window& window, int64_t block, BlockColumns* result) {
  const int64_t width = window.in_width;
  result->first = first_column(window, block);
  for (int t = 0; t < K; ++t) {
    const int64_t column = result->first + fill_column<K, STRIDE>(t);
    result->inside[t] = lane_range(0, column >= 0 && column < width ? Vec::kLanes : 0);
    result->fill[t] = column < 0 ? 0 : column < width ? column : width - 1;
  }
  const int64_t loaded = result->first + K / 2;
  result->low = lane_range(-loaded, width - loaded);
  result->high = lane_range(-loaded - Vec::kLanes, width - loaded - Vec::kLanes);
}

// Returns false where more vectors than there is room for see columns outside.
template <int K, int STRIDE>
inline bool find_blocks(const Window& window, ColumnBlocks* result) {
  const int64_t count = (window.out_width + Vec::kLanes - 1) / Vec::kLanes;
  const int64_t reach = STRIDE * Vec::kLanes + K - 1;
  int64_t begin = 0;
  while (begin < count && begin <= kMaxPartial && first_column(window, begin) < 0) ++begin;
  int64_t end = count;
  while (end > begin && count - end <= kMaxPartial && first_column(window, end - 1) + reach > window.in_width) --end;
  if (begin + count - end > kMaxPartial) return false;
  result->count = count;
  result->whole_begin = begin;
  result->whole_end = end;
  for (int64_t b = 0; b < begin; ++b) fill_partial<K, STRIDE>(window, b, &result->partial[b]);
  for (int64_t b = end; b < count; ++b) fill_partial<K, STRIDE>(window, b, &result->partial[begin + b - end]);
  return true;
}

template <int K, int STRIDE, bool MASKED>
inline Vec filled(const float* row, const BlockColumns& columns, int tap) {
  if constexpr (MASKED) {
    return select(columns.inside[tap], set1(row[columns.fill[tap]]), zero());
  } else {
    return set1(row[columns.first + fill_column<K, STRIDE>(tap)]);
  }
}

template <bool MASKED>
inline Vec load_seen(const float* p, Mask mask) {
  if constexpr (MASKED) {
    return load_masked(p, mask);
  } else {
    return load(p);
  }
}

// value[t] = what tap t of the kernel sees of one row.
template <int K, int STRIDE, bool MASKED>
inline void load_taps(const float* row, const BlockColumns& columns, Vec (&value)[K]) {
  constexpr int kMiddle = K / 2;
  const float* loaded = row + columns.first + kMiddle;
  if constexpr (STRIDE == 1) {
    value[kMiddle] = load_seen<MASKED>(loaded, columns.low);
  } else {
    const Vec low = load_seen<MASKED>(loaded, columns.low);
    const Vec high = load_seen<MASKED>(loaded + Vec::kLanes, columns.high);
    value[kMiddle] = even_lanes(low, high);
    value[kMiddle + 1] = odd_lanes(low, high);
  }
#pragma GCC unroll 8
  for (int t = kMiddle - 1; t >= 0; --t) value[t] = shifted_up(filled<K, STRIDE, MASKED>(row, columns, t), value[t + STRIDE]);
#pragma GCC unroll 8
  for (int t = kMiddle + STRIDE; t < K; ++t) value[t] = shifted_down(value[t - STRIDE], filled<K, STRIDE, MASKED>(row, columns, t));
}

// One vector of the output rows of a tile; `lanes` of it are inside the plane. A row serves every output row that sees it.
template <int K, int STRIDE, int ROWS, bool MASKED>
inline void depthwise_block(const DepthwiseArgs& a, const float* const* rows, const BlockColumns& columns, const float* weight, Vec bias,
                            float* out, int64_t lanes) {
  const int64_t width = a.window->out_width;
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  Vec sum[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) sum[i] = bias;
#pragma GCC unroll 32
  for (int j = 0; j < (ROWS - 1) * STRIDE + K; ++j) {
    Vec value[K];
    load_taps<K, STRIDE, MASKED>(rows[j], columns, value);
#pragma GCC unroll 8
    for (int s = 0; s < K; ++s) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        if (j >= i * STRIDE && j < i * STRIDE + K) sum[i] = fma(set1(weight[(j - i * STRIDE) * K + s]), value[s], sum[i]);
      }
    }
  }
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
void depthwise_tile(const DepthwiseArgs& a, const ColumnBlocks& blocks, int64_t row) {
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
    auto run_partial = [&](int64_t block, const BlockColumns& columns) {
      const int64_t x = block * Vec::kLanes;
      depthwise_block<K, STRIDE, ROWS, true>(a, rows, columns, weight, bias, out + x, window.out_width - x);
    };
    for (int64_t block = 0; block < blocks.whole_begin; ++block) run_partial(block, blocks.partial[block]);
    for (int64_t block = blocks.whole_begin; block < blocks.whole_end; ++block) {
      const int64_t x = block * Vec::kLanes;
      BlockColumns columns;
      columns.first = first_column(window, block);
      depthwise_block<K, STRIDE, ROWS, false>(a, rows, columns, weight, bias, out + x, window.out_width - x);
    }
    for (int64_t block = blocks.whole_end; block < blocks.count; ++block) {
      run_partial(block, blocks.partial[blocks.whole_begin + block - blocks.whole_end]);
    }
    for (int j = 0; j < kRows; ++j) rows[j] += step[j];
    out += a.out_stride;
  }
}

template <int K, int STRIDE, int ROWS>
void depthwise_tile_of(const DepthwiseArgs& a, const ColumnBlocks& blocks, int64_t rows, int64_t row) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return depthwise_tile<K, STRIDE, ROWS>(a, blocks, row);
    depthwise_tile_of<K, STRIDE, ROWS - 1>(a, blocks, rows, row);
  }
}

// Tiles whose heights differ by one row at most. Returns false where the planes have to go through `WindowLines`.
template <int K, int STRIDE>
bool depthwise_tiles(const DepthwiseArgs& a) {
  ColumnBlocks blocks;
  if (!find_blocks<K, STRIDE>(*a.window, &blocks)) return false;
  const int64_t tiles = (a.num_rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = a.num_rows * t / tiles;
    const int64_t end = a.num_rows * (t + 1) / tiles;
    depthwise_tile_of<K, STRIDE, kTileRows>(a, blocks, end - begin, begin);
  }
  return true;
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

bool depthwise_plain(const DepthwiseArgs& a) {
  const Window& window = *a.window;
  const bool square = window.kernel_width == window.kernel_height && window.stride_x == window.stride_y;
  if (!square || window.dilation_x != 1 || window.dilation_y != 1 || window.stride_x > 2) return false;
  switch (window.kernel_height * (window.stride_x == 1 ? 1 : -1)) {
    case 3: return depthwise_tiles<3, 1>(a);
    case 5: return depthwise_tiles<5, 1>(a);
    case 7: return depthwise_tiles<7, 1>(a);
    case -3: return depthwise_tiles<3, 2>(a);
    case -5: return depthwise_tiles<5, 2>(a);
    case -7: return depthwise_tiles<7, 2>(a);
    default: return false;
  }
}

void depthwise(const DepthwiseArgs& a) {
  if (depthwise_plain(a)) return;
  for (int64_t i = 0; i < a.rows; ++i) depthwise_any_plane(a, i);
}

}  // namespace
}  // namespace dynprune
