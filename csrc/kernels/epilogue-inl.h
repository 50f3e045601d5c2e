// What follows a product: out[i][p] = act(in[i][p] + bias[i] + residual[i][p]).
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/activation-inl.h"

namespace dynprune {
namespace {

void epilogue(const EpilogueArgs& a) {
  with_activation(a.activation, [&](auto activate) {
    for (int64_t i = 0; i < a.rows; ++i) {
      const float* in = a.in + i * a.in_stride;
      float* out = a.out + i * a.out_stride;
      const Vec bias = a.bias != nullptr ? set1(a.bias[i]) : zero();
      int64_t p = 0;
      if (a.residual != nullptr) {
        const float* residual = a.residual + i * a.residual_stride;
        for (; p + Vec::kLanes <= a.n; p += Vec::kLanes) {
          store(out + p, activate(add(add(load(in + p), bias), load(residual + p))));
        }
        if (p < a.n) {
          const int rest = static_cast<int>(a.n - p);
          store_partial(out + p, activate(add(add(load_partial(in + p, rest), bias), load_partial(residual + p, rest))), rest);
        }
      } else {
        for (; p + Vec::kLanes <= a.n; p += Vec::kLanes) store(out + p, activate(add(load(in + p), bias)));
        if (p < a.n) {
          const int rest = static_cast<int>(a.n - p);
          store_partial(out + p, activate(add(load_partial(in + p, rest), bias)), rest);
        }
      }
    }
  });
}

}  // namespace
}  // namespace dynprune
