// Elementary functions and activations on a Vec. `with_activation` turns an ActivationSpec into a function object, so that a loop
// over positions holds no branch.
//
// Accuracy against the exact function: exp, log and erf 2 units in the last place, tanh 3, what is built from them a few more.
// NaN and infinities come out as PyTorch's do: relu(NaN) and clamp(NaN) are NaN, silu(-inf) is NaN. Include after a vec_*.h.
#pragma once

#include <limits>

#include "base/types.h"

namespace dynprune {
namespace {

// c0 + c1 x + c2 x^2 + ...
inline Vec polynomial(Vec, float c0) { return set1(c0); }
template <class... Rest>
inline Vec polynomial(Vec x, float c0, Rest... rest) {
  return fma(polynomial(x, rest...), x, set1(c0));
}

inline Vec clamp(Vec x, Vec low, Vec high) { return min(high, max(low, x)); }  // keeps a NaN in x

// e^x = 2^n (1 + p) with n whole and |p| < 0.42; x in [-104, 89] or NaN. p = e^r - 1 with r = x - n ln 2, a minimax polynomial
// (error 3e-9), where ln 2 is subtracted in two parts so that r is exact.
inline Vec exp_split(Vec x, Vec* n) {
  *n = round(mul(x, set1(1.44269504f)));
  const Vec r = fma(*n, set1(2.12194440e-4f), fma(*n, set1(-0.693359375f), x));
  const Vec q = polynomial(r, 0.5000000095f, 0.1666651896f, 0.04166620641f, 0.008368876245f, 0.001395045522f);
  return fma(mul(q, r), r, r);
}

inline Vec exp(Vec x) {
  Vec n;
  const Vec p = exp_split(clamp(x, set1(-104.0f), set1(89.0f)), &n);
  return scale_by_power_of_2(add(p, set1(1.0f)), n);
}

// e^x - 1 for x <= 0 (or NaN), accurate near 0.
inline Vec expm1_negative(Vec x) {
  Vec n;
  const Vec p = exp_split(max(set1(-104.0f), min(zero(), x)), &n);
  const Vec power = scale_by_power_of_2(set1(1.0f), n);
  return fma(power, p, sub(power, set1(1.0f)));
}

// log m + e ln 2 with m in [sqrt(1/2), sqrt(2)); log m = f - s (f - R(s^2)), f = m - 1, s = f / (2 + f), R the rest of the series of
// log((1 + s) / (1 - s)).
inline Vec log(Vec x) {
  const Vec infinity = set1(std::numeric_limits<float>::infinity());
  Vec e;
  Vec m = split_power_of_2(x, &e);
  const Mask high = greater(m, set1(1.41421356f));
  m = select(high, mul(m, set1(0.5f)), m);
  e = select(high, add(e, set1(1.0f)), e);
  const Vec f = sub(m, set1(1.0f));
  const Vec s = div(f, add(f, set1(2.0f)));
  const Vec z = mul(s, s);
  const Vec rest = mul(z, polynomial(z, 0.666666667f, 0.4f, 0.285714286f, 0.222222222f));
  const Vec low = fma(e, set1(-2.12194440e-4f), mul(s, sub(rest, f)));
  const Vec finite = fma(e, set1(0.693359375f), add(low, f));
  const Vec positive = select(greater(x, set1(std::numeric_limits<float>::max())), x, finite);
  const Vec not_positive = select(greater(zero(), x), set1(std::numeric_limits<float>::quiet_NaN()), sub(x, infinity));
  return select(greater(x, zero()), positive, not_positive);
}

// log(1 + x) for x in [0, 1] or NaN: the rounding error of 1 + x is put back to first order.
inline Vec log1p_unit(Vec x) {
  const Vec u = add(x, set1(1.0f));
  return add(log(u), div(sub(x, sub(u, set1(1.0f))), u));
}

// The odd function that is `inside` for |x| <= limit and 1 beyond; exactly 1, or x (1 - f(x)) of a gelu would not vanish.
inline Vec saturate(Vec x, float limit, Vec inside) {
  const Vec not_above = select(greater(x, set1(limit)), set1(1.0f), inside);
  return select(greater(set1(-limit), x), set1(-1.0f), not_above);
}

// Odd rational functions x P(x^2) / Q(x^2), fitted to a relative error of 7e-9 (tanh) and 2e-8 (erf) up to where f32 rounds to 1.
inline Vec tanh(Vec x) {
  const Vec y = clamp(x, set1(-9.02f), set1(9.02f));
  const Vec z = mul(y, y);
  const Vec p = polynomial(z, 0.9999999933f, 0.1308321031f, 0.003103060156f, 1.114484536e-5f, -2.018619455e-8f, 5.258756073e-11f,
                           -8.438296993e-14f);
  return saturate(x, 9.02f, div(mul(y, p), polynomial(z, 1.0f, 0.464165373f, 0.02449161767f, 0.000254483532f)));
}
inline Vec erf(Vec x) {
  const Vec y = clamp(x, set1(-3.93f), set1(3.93f));
  const Vec z = mul(y, y);
  const Vec p = polynomial(z, 1.128379146f, 0.1907757018f, 0.0527888906f, 0.003779164991f, 0.0002847825147f, 2.041827536e-6f);
  const Vec q = polynomial(z, 1.0f, 0.5024032875f, 0.1142538686f, 0.01499657131f, 0.001165074315f, 3.800121481e-5f);
  return saturate(x, 3.93f, div(mul(y, p), q));
}

inline Vec sigmoid(Vec x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }
inline Vec hard_sigmoid(Vec x) { return mul(clamp(add(x, set1(3.0f)), zero(), set1(6.0f)), set1(1.0f / 6.0f)); }
inline Vec softplus(Vec x) { return add(max(zero(), x), log1p_unit(exp(sub(zero(), abs(x))))); }
inline Vec gelu(Vec x) { return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf(mul(x, set1(0.707106781f))))); }
inline Vec gelu_tanh(Vec x) {
  const Vec inner = mul(mul(x, set1(0.797884561f)), fma(mul(x, x), set1(0.044715f), set1(1.0f)));
  return mul(mul(x, set1(0.5f)), add(set1(1.0f), tanh(inner)));
}
// x tanh(softplus(x)) = x w / (w + 2) with w = e^x (e^x + 2); the quotient is 1 in f32 from x = 20 on.
inline Vec mish(Vec x) {
  const Vec e = exp(min(set1(20.0f), x));
  const Vec w = mul(e, add(e, set1(2.0f)));
  return mul(x, div(w, add(w, set1(2.0f))));
}

// Calls `body` with a function object Vec -> Vec that applies `spec`; one instantiation of body per kind.
template <class Body>
inline void with_activation(const ActivationSpec& spec, Body&& body) {
  const Vec low = set1(spec.low);
  const Vec high = set1(spec.high);
  switch (spec.kind) {
    case Activation::kNone: return body([](Vec x) { return x; });
    case Activation::kClamp: return body([=](Vec x) { return clamp(x, low, high); });
    case Activation::kHardSwish: return body([](Vec x) { return mul(x, hard_sigmoid(x)); });
    case Activation::kHardSigmoid: return body([](Vec x) { return hard_sigmoid(x); });
    case Activation::kSigmoid: return body([](Vec x) { return sigmoid(x); });
    case Activation::kSilu: return body([](Vec x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); });
    case Activation::kGelu: return body([](Vec x) { return gelu(x); });
    case Activation::kGeluTanh: return body([](Vec x) { return gelu_tanh(x); });
    case Activation::kTanh: return body([](Vec x) { return tanh(x); });
    case Activation::kLeakyRelu: return body([=](Vec x) { return select(greater(x, zero()), x, mul(x, low)); });
    case Activation::kElu: return body([=](Vec x) { return select(greater(x, zero()), x, mul(low, expm1_negative(x))); });
    case Activation::kExp: return body([](Vec x) { return exp(x); });
    case Activation::kSoftplus: return body([](Vec x) { return softplus(x); });
    case Activation::kMish: return body([](Vec x) { return mish(x); });
    case Activation::kSqrt: return body([](Vec x) { return sqrt(x); });
    case Activation::kRsqrt: return body([](Vec x) { return div(set1(1.0f), sqrt(x)); });
    case Activation::kNeg: return body([](Vec x) { return mul(x, set1(-1.0f)); });
    case Activation::kAbs: return body([](Vec x) { return abs(x); });
    case Activation::kSquare: return body([](Vec x) { return mul(x, x); });
    case Activation::kReciprocal: return body([](Vec x) { return div(set1(1.0f), x); });
    case Activation::kErf: return body([](Vec x) { return erf(x); });
    case Activation::kLog: return body([](Vec x) { return log(x); });
  }
}

}  // namespace
}  // namespace dynprune
