// Norms of rows and rotation of heads.
#pragma once

#include <cmath>

#include "cpu/generic/fused_vectors.h"

namespace lowbit::cpu {
namespace {

// Sum over n values of f(vector), with the rest of a vector filled by `filler`.
template <typename F>
LOWBIT_INLINE float reduce(const float* x, std::int64_t n, float filler, const F& f) {
  vf a = {}, b = {};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = f(load(x + i), a);
    b = f(load(x + i + kLanes), b);
  }
  for (; i < n; i += kLanes) {
    float rest[kLanes];
    for (int l = 0; l < kLanes; ++l) rest[l] = i + l < n ? x[i + l] : filler;
    a = f(load(rest), a);
  }
  return sum_of(a + b);
}

void norm(const NormSpec& spec, const float* x, std::int64_t n, float* out) {
  if (spec.kind == NormKind::kNone) {
    if (out != x) std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
    return;
  }
  float mean = 0;
  if (spec.kind == NormKind::kLayer) {
    mean = reduce(x, n, 0.0f, [](vf v, vf s) { return s + v; }) / static_cast<float>(n);
  }
  const float square = reduce(x, n, mean, [mean](vf v, vf s) {
    const vf d = v - mean;
    return fma(d, d, s);
  });
  const float factor = 1.0f / std::sqrt(square / static_cast<float>(n) + spec.eps);
  with_dtype(spec.weight_dtype, [&](auto weight_type) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      vf value = (load(x + i) - mean) * factor;
      if (spec.weight != nullptr) {
        value = value * (load_as<weight_type()>(spec.weight, i) + spec.offset);
      }
      store(out + i, value);
    }
    for (; i < n; ++i) {
      float value = (x[i] - mean) * factor;
      if (spec.weight != nullptr) {
        value *= load_float(spec.weight, spec.weight_dtype, i) + spec.offset;
      }
      out[i] = value;
    }
  });
  if (spec.bias == nullptr) return;
  with_dtype(spec.bias_dtype, [&](auto bias_type) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      store(out + i, load(out + i) + load_as<bias_type()>(spec.bias, i));
    }
    for (; i < n; ++i) out[i] += load_float(spec.bias, spec.bias_dtype, i);
  });
}

void rotate(const RopeSpec& rope, const float* cos, const float* sin, float* head) {
  const int half = rope.width / 2;
  const int step = rope.table_step;
  float* x = head + rope.begin;
  if (rope.kind == RopeKind::kHalves) {
    int p = 0;
    if (step == 1) {
      for (; p + kLanes <= half; p += kLanes) {
        const vf a = load(x + p), b = load(x + p + half);
        const vf c = load(cos + p), s = load(sin + p);
        store(x + p, a * c - b * s);
        store(x + p + half, b * c + a * s);
      }
    }
    for (; p < half; ++p) {
      const float a = x[p], b = x[p + half], c = cos[p * step], s = sin[p * step];
      x[p] = a * c - b * s;
      x[p + half] = b * c + a * s;
    }
  } else if (rope.kind == RopeKind::kPairsToHalves) {
    constexpr int kMost = 256;
    float turned[kMost];
    for (int p = 0; p < half; ++p) {
      const float a = x[2 * p], b = x[2 * p + 1], c = cos[p * step], s = sin[p * step];
      turned[p] = a * c - b * s;
      turned[p + half] = b * c + a * s;
    }
    std::memcpy(x, turned, static_cast<std::size_t>(rope.width) * 4);
  } else if (rope.kind == RopeKind::kInterleaved) {
    for (int p = 0; p < half; ++p) {
      const float a = x[2 * p], b = x[2 * p + 1], c = cos[p * step], s = sin[p * step];
      x[2 * p] = a * c - b * s;
      x[2 * p + 1] = b * c + a * s;
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
