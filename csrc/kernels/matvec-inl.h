// Matrix-vector products for layers of one position: by row (dot products) and by column (sums of scaled rows of the transpose).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

// Four rows at once: x is loaded once for the four, and four chains of sums hide the latency of the multiply-add. Weights are asked of
// the memory kAhead elements (1 KiB) before their use; at the end of a row, from the rows that come next, which only the index list knows.
template <int ROWS, class Weight>
void dot_tile(const DotRows<Weight>& a, int64_t first) {
  constexpr int64_t kAhead = 1024 / sizeof(Weight);
  const Weight* weight[ROWS];
  const Weight* next[ROWS];
  int64_t row[ROWS];
  Vec sum[ROWS];
  const auto row_of = [&a](int64_t i) { return a.row_index != nullptr ? a.row_index[i] : a.first_row + i; };
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    row[i] = row_of(first + i);
    weight[i] = a.weight + row[i] * a.weight_stride;
    next[i] = a.weight + row_of(first + ROWS + i < a.rows ? first + ROWS + i : first + i) * a.weight_stride + kAhead - a.k;
    sum[i] = zero();
  }
  int64_t k = 0;
  for (; k + Vec::kLanes <= a.k; k += Vec::kLanes) {
    const Weight* const* ahead = k + kAhead < a.k ? weight : next;
    const Vec x = load(a.x + k);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      __builtin_prefetch(ahead[i] + k + (ahead == weight ? kAhead : 0));
      sum[i] = fma(load(weight[i] + k), x, sum[i]);
    }
  }
  if (k < a.k) {
    const int rest = static_cast<int>(a.k - k);
    const Vec x = load_partial(a.x + k, rest);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] = fma(load_partial(weight[i] + k, rest), x, sum[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) a.out[first + i] = reduce_add(sum[i]) + (a.bias != nullptr ? a.bias[row[i]] : 0.0f);
}

template <class Weight>
void dot_rows(const DotRows<Weight>& a) {
  int64_t i = 0;
  for (; i + 4 <= a.rows; i += 4) dot_tile<4>(a, i);
  for (; i < a.rows; ++i) dot_tile<1>(a, i);
}

// out += the sum of ROWS rows of the weight, scaled. Which rows come next the hardware cannot know: `next` tells the memory.
template <int ROWS, class Weight>
void axpy_tile(const Weight* const* weight, const Weight* const* next, const float* x, float* out, int64_t n) {
  Vec scale[ROWS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) scale[i] = set1(x[i]);
  int64_t o = 0;
  for (; o + Vec::kLanes <= n; o += Vec::kLanes) {
    Vec sum = load(out + o);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      __builtin_prefetch(next[i] + o);
      sum = fma(load(weight[i] + o), scale[i], sum);
    }
    store(out + o, sum);
  }
  if (o < n) {
    const int rest = static_cast<int>(n - o);
    Vec sum = load_partial(out + o, rest);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum = fma(load_partial(weight[i] + o, rest), scale[i], sum);
    store_partial(out + o, sum, rest);
  }
}

// The outputs stay in the first-level cache while rows of the weight stream by, four at a time.
template <class Weight>
void axpy_rows(const AxpyRows<Weight>& a) {
  if (a.bias == nullptr) {
    for (int64_t o = 0; o < a.n; ++o) a.out[o] = 0.0f;
  } else if (a.bias != a.out) {
    for (int64_t o = 0; o < a.n; ++o) a.out[o] = a.bias[o];
  }
  const auto row = [&a](int64_t j) {
    j = j < a.columns ? j : a.columns - 1;
    return a.weight + (a.column_index != nullptr ? a.column_index[j] : j) * a.weight_stride;
  };
  int64_t j = 0;
  for (; j + 4 <= a.columns; j += 4) {
    const Weight* weight[4] = {row(j), row(j + 1), row(j + 2), row(j + 3)};
    const Weight* next[4] = {row(j + 4), row(j + 5), row(j + 6), row(j + 7)};
    axpy_tile<4>(weight, next, a.x + j, a.out, a.n);
  }
  for (; j < a.columns; ++j) {
    const Weight* weight[1] = {row(j)};
    axpy_tile<1>(weight, weight, a.x + j, a.out, a.n);
  }
}

}  // namespace
}  // namespace dynprune
