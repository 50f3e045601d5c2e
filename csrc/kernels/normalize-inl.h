// Layer norm, norm by the root mean square, and softmax, along the rows of each position (columns) or along the positions of each row.
//
//   layer norm: out = (in - mean) / sqrt(variance + eps) * weight + bias, the variance taken around the mean in a second pass
//   rms norm:   out = in / sqrt(mean of in^2 + eps) * weight
//   softmax:    out = exp(in - max) / sum exp(in - max)
//
// Along the rows everything is vertical: lanes are positions, and the first pass of layer norm and softmax copies the block to `out`,
// where the later passes find it in the cache.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/pool-inl.h"
#include "kernels/window-inl.h"

namespace dynprune {
namespace {

// Copies the block of `NV` vectors to `out` and combines its rows; only the last vector may have fewer than all lanes.
template <int NV, class Combine>
void combine_rows(const NormalizeArgs& a, int64_t first, Vec neutral, Combine combine, Vec (&result)[NV]) {
  const int64_t lanes_in_last = a.n - first - (NV - 1) * Vec::kLanes;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) result[v] = neutral;
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.in_stride + first;
    float* out = a.out + i * a.out_stride + first;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec x = v + 1 < NV ? load(in + v * Vec::kLanes) : load_lanes(in + v * Vec::kLanes, lanes_in_last);
      store(out + v * Vec::kLanes, x);
      result[v] = combine(result[v], x);
    }
  }
}

template <int NV>
void layer_norm_block(const NormalizeArgs& a, int64_t first) {
  const Vec scale = set1(1.0f / static_cast<float>(a.rows));
  Vec mean[NV];
  combine_rows<NV>(a, first, zero(), [](Vec sum, Vec x) { return add(sum, x); }, mean);
  Vec variance[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    mean[v] = mul(mean[v], scale);
    variance[v] = zero();
  }
  float* out = a.out + first;
  for (int64_t i = 0; i < a.rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec x = sub(load(out + i * a.out_stride + v * Vec::kLanes), mean[v]);
      variance[v] = fma(x, x, variance[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) variance[v] = div(set1(1.0f), sqrt(fma(variance[v], scale, set1(a.eps))));
  for (int64_t i = 0; i < a.rows; ++i) {
    const Vec weight = set1(a.weight != nullptr ? a.weight[i] : 1.0f);
    const Vec bias = set1(a.bias != nullptr ? a.bias[i] : 0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* p = out + i * a.out_stride + v * Vec::kLanes;
      store(p, fma(mul(sub(load(p), mean[v]), variance[v]), weight, bias));
    }
  }
}

template <int NV>
void rms_norm_block(const NormalizeArgs& a, int64_t first) {
  const int64_t lanes_in_last = a.n - first - (NV - 1) * Vec::kLanes;
  const auto read = [&](int64_t i, int v) {
    const float* in = a.in + i * a.in_stride + first + v * Vec::kLanes;
    return v + 1 < NV ? load(in) : load_lanes(in, lanes_in_last);
  };
  Vec factor[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) factor[v] = zero();
  for (int64_t i = 0; i < a.rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec x = read(i, v);
      factor[v] = fma(x, x, factor[v]);
    }
  }
  const Vec scale = set1(1.0f / static_cast<float>(a.rows));
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) factor[v] = div(set1(1.0f), sqrt(fma(factor[v], scale, set1(a.eps))));
  for (int64_t i = 0; i < a.rows; ++i) {
    const Vec weight = set1(a.weight != nullptr ? a.weight[i] : 1.0f);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(a.out + i * a.out_stride + first + v * Vec::kLanes, mul(mul(read(i, v), factor[v]), weight));
  }
}

template <int NV>
void softmax_block(const NormalizeArgs& a, int64_t first) {
  Vec largest[NV];
  combine_rows<NV>(a, first, set1(-std::numeric_limits<float>::infinity()), [](Vec m, Vec x) { return max(m, x); }, largest);
  Vec sum[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) sum[v] = zero();
  float* out = a.out + first;
  for (int64_t i = 0; i < a.rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* p = out + i * a.out_stride + v * Vec::kLanes;
      const Vec e = exp(sub(load(p), largest[v]));
      sum[v] = add(sum[v], e);
      store(p, e);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) sum[v] = div(set1(1.0f), sum[v]);
  for (int64_t i = 0; i < a.rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* p = out + i * a.out_stride + v * Vec::kLanes;
      store(p, mul(load(p), sum[v]));
    }
  }
}

// Calls block(first, vectors) for blocks of 4, 2 and 1 vectors of positions, `vectors` a std::integral_constant.
template <class Block>
void for_blocks(int64_t n, Block&& block) {
  int64_t p = 0;
  for (; p + 4 * Vec::kLanes <= n; p += 4 * Vec::kLanes) block(p, std::integral_constant<int, 4>());
  for (; p + Vec::kLanes < n; p += 2 * Vec::kLanes) block(p, std::integral_constant<int, 2>());
  if (p < n) block(p, std::integral_constant<int, 1>());
}

void layer_norm_columns(const NormalizeArgs& a) {
  for_blocks(a.n, [&a](int64_t first, auto vectors) { layer_norm_block<decltype(vectors)::value>(a, first); });
}

void rms_norm_columns(const NormalizeArgs& a) {
  for_blocks(a.n, [&a](int64_t first, auto vectors) { rms_norm_block<decltype(vectors)::value>(a, first); });
}

void softmax_columns(const NormalizeArgs& a) {
  for_blocks(a.n, [&a](int64_t first, auto vectors) { softmax_block<decltype(vectors)::value>(a, first); });
}

void layer_norm_rows(const NormalizeArgs& a) {
  const float scale = 1.0f / static_cast<float>(a.n);
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.in_stride;
    float* out = a.out + i * a.out_stride;
    const Vec mean = set1(row_sum(in, a.n) * scale);
    Vec squares = zero();
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) {
      const Vec x = sub(load_masked(in + p, lane_range(0, a.n - p), mean), mean);
      squares = fma(x, x, squares);
    }
    const Vec inverse = div(set1(1.0f), sqrt(set1(reduce_add(squares) * scale + a.eps)));
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) {
      const int64_t lanes = a.n - p;
      const Vec weight = a.weight != nullptr ? load_lanes(a.weight + p, lanes) : set1(1.0f);
      const Vec bias = a.bias != nullptr ? load_lanes(a.bias + p, lanes) : zero();
      store_lanes(out + p, fma(mul(sub(load_lanes(in + p, lanes), mean), inverse), weight, bias), lanes);
    }
  }
}

void rms_norm_rows(const NormalizeArgs& a) {
  const float scale = 1.0f / static_cast<float>(a.n);
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.in_stride;
    float* out = a.out + i * a.out_stride;
    Vec squares = zero();
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) {
      const Vec x = load_lanes(in + p, a.n - p);
      squares = fma(x, x, squares);
    }
    const Vec factor = div(set1(1.0f), sqrt(set1(reduce_add(squares) * scale + a.eps)));
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) {
      const int64_t lanes = a.n - p;
      const Vec weight = a.weight != nullptr ? load_lanes(a.weight + p, lanes) : set1(1.0f);
      store_lanes(out + p, mul(mul(load_lanes(in + p, lanes), factor), weight), lanes);
    }
  }
}

void softmax_rows(const NormalizeArgs& a) {
  const Vec lowest = set1(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.in_stride;
    float* out = a.out + i * a.out_stride;
    Vec largest = lowest;
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) largest = max(largest, load_masked(in + p, lane_range(0, a.n - p), lowest));
    largest = set1(reduce_max(largest));
    Vec sum = zero();
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) {
      const Vec e = exp(sub(load_masked(in + p, lane_range(0, a.n - p), lowest), largest));
      sum = add(sum, e);
      store_lanes(out + p, e, a.n - p);
    }
    const Vec scale = set1(1.0f / reduce_add(sum));
    for (int64_t p = 0; p < a.n; p += Vec::kLanes) {
      const int64_t lanes = a.n - p;
      store_lanes(out + p, mul(load_lanes(out + p, lanes), scale), lanes);
    }
  }
}

}  // namespace
}  // namespace dynprune
