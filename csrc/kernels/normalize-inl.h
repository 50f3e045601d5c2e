// Softmax along the rows of each position (columns), and along the positions of each row softmax, layer norm and norm by the root mean
// square; these two along the rows are in column_norm-inl.h.
//
//   layer norm: out = (in - mean) / sqrt(variance + eps) * weight + bias, the variance taken around the mean in a second pass
//   rms norm:   out = in / sqrt(mean of in^2 + eps) * weight
//   softmax:    out = exp(in - max) / sum exp(in - max)
//
// Along the rows everything is vertical: lanes are positions, and the first pass copies the block to `out`, where the later passes find
// it in the cache.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/column_norm-inl.h"
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
