// Layer norm and norm by the root mean square along the rows of each position: lanes are positions. One kernel reads the input once and
// leaves two numbers for each position, another applies them, so that all a chunk holds back until its commit are these numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "kernels/window-inl.h"

namespace dynprune {
namespace {

// Rows whose deviations are taken from their own mean, while the first level of cache holds them.
constexpr int64_t kNormRows = 8;

// Calls block(first, vectors) for blocks of 4, 2 and 1 vectors of positions, `vectors` a std::integral_constant.
template <class Block>
void for_blocks(int64_t n, Block&& block) {
  int64_t p = 0;
  for (; p + 4 * Vec::kLanes <= n; p += 4 * Vec::kLanes) block(p, std::integral_constant<int, 4>());
  for (; p + Vec::kLanes < n; p += 2 * Vec::kLanes) block(p, std::integral_constant<int, 2>());
  if (p < n) block(p, std::integral_constant<int, 1>());
}

// Vector `v` of row `i` of a block of `NV` vectors at `first`; only the last vector may have fewer than all lanes.
template <int NV>
Vec read_column(const ColumnNormArgs& a, int64_t first, int64_t i, int v) {
  const float* in = a.in + i * a.in_stride + first + v * Vec::kLanes;
  return v + 1 < NV ? load(in) : load_lanes(in, a.n - first - v * Vec::kLanes);
}

template <int NV>
void store_column(float* out, int64_t n, int64_t first, int v, Vec value) {
  if (v + 1 < NV) {
    store(out + first + v * Vec::kLanes, value);
  } else {
    store_lanes(out + first + v * Vec::kLanes, value, n - first - v * Vec::kLanes);
  }
}

// Means and sums of squared deviations of a few rows at a time, joined as Chan, Golub and LeVeque do (1983, The American Statistician
// 37(3)): as exact as a second pass around the mean of all rows.
template <int NV>
void layer_norm_block(const ColumnNormArgs& a, int64_t first) {
  Vec mean[NV], squares[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) mean[v] = squares[v] = zero();
  for (int64_t i = 0; i < a.rows; i += kNormRows) {
    const int64_t count = std::min(kNormRows, a.rows - i);
    const Vec inverse = set1(1.0f / static_cast<float>(count));
    const Vec share = set1(static_cast<float>(count) / static_cast<float>(i + count));
    const Vec pairs = set1(static_cast<float>(count) * static_cast<float>(i) / static_cast<float>(i + count));
    Vec sum[NV], deviations[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] = deviations[v] = zero();
    for (int64_t j = i; j < i + count; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v] = add(sum[v], read_column<NV>(a, first, j, v));
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] = mul(sum[v], inverse);
    for (int64_t j = i; j < i + count; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec x = sub(read_column<NV>(a, first, j, v), sum[v]);
        deviations[v] = fma(x, x, deviations[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec apart = sub(sum[v], mean[v]);
      mean[v] = fma(apart, share, mean[v]);
      squares[v] = add(squares[v], fma(mul(apart, apart), pairs, deviations[v]));
    }
  }
  const Vec scale = set1(1.0f / static_cast<float>(a.rows));
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store_column<NV>(a.mean, a.n, first, v, mean[v]);
    store_column<NV>(a.factor, a.n, first, v, div(set1(1.0f), sqrt(fma(squares[v], scale, set1(a.eps)))));
  }
}

template <int NV>
void rms_norm_block(const ColumnNormArgs& a, int64_t first) {
  Vec squares[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) squares[v] = zero();
  for (int64_t i = 0; i < a.rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec x = read_column<NV>(a, first, i, v);
      squares[v] = fma(x, x, squares[v]);
    }
  }
  const Vec scale = set1(1.0f / static_cast<float>(a.rows));
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store_column<NV>(a.mean, a.n, first, v, zero());
    store_column<NV>(a.factor, a.n, first, v, div(set1(1.0f), sqrt(fma(squares[v], scale, set1(a.eps)))));
  }
}

template <int NV>
void apply_norm_block(const ColumnNormArgs& a, int64_t first) {
  Vec mean[NV], factor[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t lanes = a.n - first - v * Vec::kLanes;
    mean[v] = load_lanes(a.mean + first + v * Vec::kLanes, lanes);
    factor[v] = load_lanes(a.factor + first + v * Vec::kLanes, lanes);
  }
  for (int64_t i = 0; i < a.rows; ++i) {
    const Vec weight = set1(a.weight != nullptr ? a.weight[i] : 1.0f);
    const Vec bias = set1(a.bias != nullptr ? a.bias[i] : 0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec x = mul(sub(read_column<NV>(a, first, i, v), mean[v]), factor[v]);
      store_column<NV>(a.out + i * a.out_stride, a.n, first, v, fma(x, weight, bias));
    }
  }
}

void layer_norm_statistics(const ColumnNormArgs& a) {
  for_blocks(a.n, [&a](int64_t first, auto vectors) { layer_norm_block<decltype(vectors)::value>(a, first); });
}

void rms_norm_statistics(const ColumnNormArgs& a) {
  for_blocks(a.n, [&a](int64_t first, auto vectors) { rms_norm_block<decltype(vectors)::value>(a, first); });
}

void apply_column_norm(const ColumnNormArgs& a) {
  for_blocks(a.n, [&a](int64_t first, auto vectors) { apply_norm_block<decltype(vectors)::value>(a, first); });
}

}  // namespace
}  // namespace dynprune
