// Per-channel affine maps and binary operations over rows; r is the true channel of row i.
//
//   affine: out[i][p] = clamp(in[i][p] * scale[r] + shift[r], low, high)
//   binary: out[i][p] = clamp(a[i][p] op b[r][p or 0], low, high)
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/activation-inl.h"

namespace dynprune {
namespace {

void affine(const AffineArgs& a) {
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t row = a.row_index != nullptr ? a.row_index[i] : a.first_row + i;
    const Vec scale = set1(a.scale[row]);
    const Vec shift = set1(a.shift[row]);
    const float* in = a.in + i * a.in_stride;
    float* out = a.out + i * a.out_stride;
    int64_t p = 0;
    for (; p + Vec::kLanes <= a.n; p += Vec::kLanes) store(out + p, clamp(fma(load(in + p), scale, shift), low, high));
    if (p < a.n) {
      const int rest = static_cast<int>(a.n - p);
      store_partial(out + p, clamp(fma(load_partial(in + p, rest), scale, shift), low, high), rest);
    }
  }
}

template <class Combine>
void binary_with(const BinaryArgs& a, Combine combine) {
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t row = a.row_index != nullptr ? a.row_index[i] : a.first_row + i;
    const float* x = a.a + i * a.a_stride;
    const float* y = a.b + row * a.b_stride;
    float* out = a.out + i * a.out_stride;
    int64_t p = 0;
    if (a.b_scalar) {
      const Vec value = set1(*y);
      for (; p + Vec::kLanes <= a.n; p += Vec::kLanes) store(out + p, clamp(combine(load(x + p), value), low, high));
      if (p < a.n) {
        const int rest = static_cast<int>(a.n - p);
        store_partial(out + p, clamp(combine(load_partial(x + p, rest), value), low, high), rest);
      }
    } else {
      for (; p + Vec::kLanes <= a.n; p += Vec::kLanes) store(out + p, clamp(combine(load(x + p), load(y + p)), low, high));
      if (p < a.n) {
        const int rest = static_cast<int>(a.n - p);
        store_partial(out + p, clamp(combine(load_partial(x + p, rest), load_partial(y + p, rest)), low, high), rest);
      }
    }
  }
}

void binary(const BinaryArgs& a) {
  switch (a.kind) {
    case Binary::kAdd: return binary_with(a, [](Vec x, Vec y) { return add(x, y); });
    case Binary::kMul: return binary_with(a, [](Vec x, Vec y) { return mul(x, y); });
    case Binary::kMax: return binary_with(a, [](Vec x, Vec y) { return max_keep_nan(x, y); });
    case Binary::kMin: return binary_with(a, [](Vec x, Vec y) { return min_keep_nan(x, y); });
    case Binary::kSub:
      if (a.reverse) return binary_with(a, [](Vec x, Vec y) { return sub(y, x); });
      return binary_with(a, [](Vec x, Vec y) { return sub(x, y); });
    case Binary::kDiv:
      if (a.reverse) return binary_with(a, [](Vec x, Vec y) { return div(y, x); });
      return binary_with(a, [](Vec x, Vec y) { return div(x, y); });
  }
}

}  // namespace
}  // namespace dynprune
