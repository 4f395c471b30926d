// exp, tanh, erf and what MLPs and gates make of them, over vectors and rows; sums of rows.
#pragma once

#include "cpu/generic/fused_vectors.h"

namespace lowbit::cpu {
namespace {

// exp(x) to about 2 units in the last place; 0 below -87.3, where the result would be subnormal.
LOWBIT_INLINE vf vexp(vf x) {
  const vf low = splat(-87.3f), high = splat(88.7f);
  const vf clamped = x > high ? high : (x < low ? low : x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = fma(clamped, splat(1.44269504f), splat(kRound)) - kRound;
  vf r = fma(n, splat(-0.693145752f), clamped);
  r = fma(n, splat(-1.42860677e-6f), r);
  vf p = splat(1.9875691500e-4f);  // Cephes expf
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &power, sizeof scale);
  const vf value = x < low ? vf{} : p * scale;
  return x == x ? value : x;  // NaN stays NaN
}

LOWBIT_INLINE vf vsigmoid(vf x) {
  return 1.0f / (1.0f + vexp(-x));
}

LOWBIT_INLINE vf vtanh(vf x) {
  // Near zero 1 - 2 / (e^2x + 1) would cancel: there the odd Taylor terms are exact enough.
  const vf x2 = x * x;
  const vf small = x * (1.0f + x2 * (-0.333333333f + x2 * (0.133333333f + x2 * -0.0539682540f)));
  const vf large = 1.0f - 2.0f / (vexp(x + x) + 1.0f);
  return x2 < splat(0.01f) ? small : large;
}

// Abramowitz and Stegun 7.1.26: absolute error below 2e-7.
LOWBIT_INLINE vf verf(vf x) {
  const vf a = x < vf{} ? -x : x;
  const vf t = 1.0f / (1.0f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const vf value = 1.0f - p * t * vexp(-a * a);
  return x < vf{} ? -value : value;
}

// log(1 + e^x)
LOWBIT_INLINE vf vsoftplus(vf x) {
  const vf zero = {};
  const vf e = vexp(x < zero ? x : -x);
  // log(1 + e) = 2 atanh(e / (2 + e)), whose argument is at most 1 / 3.
  const vf z = e / (2.0f + e), z2 = z * z;
  vf p = splat(1.0f / 13);
  p = fma(p, z2, splat(1.0f / 11));
  p = fma(p, z2, splat(1.0f / 9));
  p = fma(p, z2, splat(1.0f / 7));
  p = fma(p, z2, splat(1.0f / 5));
  p = fma(p, z2, splat(1.0f / 3));
  p = fma(p, z2, splat(1.0f));
  return (x > zero ? x : x * 0.0f) + 2.0f * z * p;
}

// e^x - 1 - x for x <= 0
LOWBIT_INLINE vf vexpm1_minus(vf x) {
  vf p = splat(1.0f / 5040);
  p = fma(p, x, splat(1.0f / 720));
  p = fma(p, x, splat(1.0f / 120));
  p = fma(p, x, splat(1.0f / 24));
  p = fma(p, x, splat(1.0f / 6));
  p = fma(p, x, splat(0.5f));
  return x > splat(-0.5f) ? p * x * x : vexp(x) - 1.0f - x;
}

template <Activation kKind>
LOWBIT_INLINE vf act(vf x, const ActivationNumbers& numbers) {
  if constexpr (kKind == Activation::kSilu) return x * vsigmoid(x);
  if constexpr (kKind == Activation::kGelu) return 0.5f * x * (1.0f + verf(x * 0.707106781f));
  if constexpr (kKind == Activation::kGeluTanh) {
    return 0.5f * x * (1.0f + vtanh(0.797884561f * (x + 0.044715f * x * x * x)));
  }
  if constexpr (kKind == Activation::kRelu) return x > vf{} ? x : x * 0.0f;
  if constexpr (kKind == Activation::kRelu2) return x > vf{} ? x * x : x * 0.0f;
  if constexpr (kKind == Activation::kQuickGelu) return x * vsigmoid(1.702f * x);
  if constexpr (kKind == Activation::kSigmoid) return vsigmoid(x);
  if constexpr (kKind == Activation::kTanh) return vtanh(x);
  if constexpr (kKind == Activation::kSoftplus) return vsoftplus(x);
  if constexpr (kKind == Activation::kSwish) return x * vsigmoid(numbers.alpha * x);
  if constexpr (kKind == Activation::kXielu) {
    const vf below = vexpm1_minus(x < vf{} ? x : x * 0.0f) * numbers.negative;
    return (x > vf{} ? numbers.positive * x * x : below) + numbers.beta * x;
  }
  return x;
}

template <Activation kKind>
void activate_as(const ActivationNumbers& numbers, const float* gate, const float* up,
                 std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf value = act<kKind>(load(gate + i), numbers);
    store(out + i, up == nullptr ? value : value * load(up + i));
  }
  if (i == n) return;
  float g[kLanes] = {}, u[kLanes] = {};
  for (std::int64_t j = i; j < n; ++j) {
    g[j - i] = gate[j];
    u[j - i] = up == nullptr ? 1.0f : up[j];
  }
  store(g, act<kKind>(load(g), numbers) * load(u));
  for (std::int64_t j = i; j < n; ++j) out[j] = g[j - i];
}

void activate(Activation kind, const ActivationNumbers& numbers, const float* gate, const float* up,
              std::int64_t n, float* out) {
  switch (kind) {
    case Activation::kIdentity:
      return activate_as<Activation::kIdentity>(numbers, gate, up, n, out);
    case Activation::kSilu:
      return activate_as<Activation::kSilu>(numbers, gate, up, n, out);
    case Activation::kGelu:
      return activate_as<Activation::kGelu>(numbers, gate, up, n, out);
    case Activation::kGeluTanh:
      return activate_as<Activation::kGeluTanh>(numbers, gate, up, n, out);
    case Activation::kRelu:
      return activate_as<Activation::kRelu>(numbers, gate, up, n, out);
    case Activation::kRelu2:
      return activate_as<Activation::kRelu2>(numbers, gate, up, n, out);
    case Activation::kQuickGelu:
      return activate_as<Activation::kQuickGelu>(numbers, gate, up, n, out);
    case Activation::kSigmoid:
      return activate_as<Activation::kSigmoid>(numbers, gate, up, n, out);
    case Activation::kTanh:
      return activate_as<Activation::kTanh>(numbers, gate, up, n, out);
    case Activation::kSoftplus:
      return activate_as<Activation::kSoftplus>(numbers, gate, up, n, out);
    case Activation::kSwish:
      return activate_as<Activation::kSwish>(numbers, gate, up, n, out);
    case Activation::kXielu:
      return activate_as<Activation::kXielu>(numbers, gate, up, n, out);
  }
}

void add_scaled(const float* from, float factor, std::int64_t n, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(to + i, fma(load(from + i), splat(factor), load(to + i)));
  }
  for (; i < n; ++i) to[i] += factor * from[i];
}

// Two rows at a time: the vector is read once for both.
void dots(const float* matrix, std::int64_t rows, std::int64_t n, const float* x, float* out) {
  const std::int64_t whole = n / kLanes * kLanes;
  for (std::int64_t r = 0; r < rows; r += 2) {
    const float* a = matrix + r * n;
    const float* b = r + 1 < rows ? a + n : a;
    vf sum_a = {}, sum_b = {};
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      const vf v = load(x + i);
      sum_a = fma(load(a + i), v, sum_a);
      sum_b = fma(load(b + i), v, sum_b);
    }
    float total_a = sum_of(sum_a), total_b = sum_of(sum_b);
    for (std::int64_t i = whole; i < n; ++i) {
      total_a += a[i] * x[i];
      total_b += b[i] * x[i];
    }
    out[r] = total_a;
    if (r + 1 < rows) out[r + 1] = total_b;
  }
}

}  // namespace
}  // namespace lowbit::cpu
