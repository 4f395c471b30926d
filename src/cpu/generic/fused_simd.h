// The kernels of fused_kernels.h, written once over vectors of the widest float registers that the
// including file is compiled for. Everything is in an anonymous namespace (linear_kernels.h).
//
// Attention of R query rows that share a key/value head, 64 positions at a time:
//   1. the 64 keys are transposed to [d, 64] floats in L1, so that a score is a column: no
//      horizontal sums, and R rows use the transposed block R times;
//   2. scores = q Kt, a register-blocked product of 6 rows x 4 vectors;
//   3. the running softmax: new maximum, exponentials, rescaled accumulators;
//   4. acc += p V by the same product; values are converted while they are loaded.
// With grouped queries R is at least the size of the group, also for a single token.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/fused_kernels.h"
#include "cpu/generic/convert.h"

namespace lowbit::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kColumns = 4;  // vectors per row of a product: 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kColumns = 2;  // 6 x 2 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kColumns = 2;
#endif
constexpr int kRowsPerProduct = 6;
constexpr int kPositions = 64;  // per block: d = 64 transposed keys are 16 KiB, half of an L1

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t vh __attribute__((vector_size(2 * kLanes)));

#define LOWBIT_INLINE inline __attribute__((always_inline))

LOWBIT_INLINE vf splat(float value) {
  return vf{} + value;
}

LOWBIT_INLINE vf load(const float* from) {
  vf value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

LOWBIT_INLINE void store(float* to, vf value) {
  std::memcpy(to, &value, sizeof value);
}

LOWBIT_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

LOWBIT_INLINE vf vmax(vf a, vf b) {
  return a > b ? a : b;
}

LOWBIT_INLINE float sum_of(vf value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(value);
#endif
  float parts[kLanes];
  store(parts, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

LOWBIT_INLINE float max_of(vf value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(value);
#endif
  float parts[kLanes];
  store(parts, value);
  float best = parts[0];
  for (int i = 1; i < kLanes; ++i) best = parts[i] > best ? parts[i] : best;
  return best;
}

// One vector of a 16- or 32-bit type.
template <DType kType>
LOWBIT_INLINE vf load_as(const void* from, std::int64_t i) {
  if constexpr (kType == DType::kFloat32) {
    return load(static_cast<const float*>(from) + i);
  } else {
    const std::uint16_t* halves = static_cast<const std::uint16_t*>(from) + i;
#if defined(__AVX512F__)
    if constexpr (kType == DType::kFloat16) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    }
#elif defined(__AVX2__)
    if constexpr (kType == DType::kFloat16) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
    }
#else
    if constexpr (kType == DType::kFloat16) {
      vf value = {};
      for (int l = 0; l < kLanes; ++l) value[l] = fast_half_to_float(halves[l]);
      return value;
    }
#endif
    vh raw;
    std::memcpy(&raw, halves, sizeof raw);
    const vu wide = __builtin_convertvector(raw, vu) << 16;
    vf value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
}

// Calls body with the type as a constant.
template <typename Body>
LOWBIT_INLINE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      body([] { return DType::kFloat16; });
      return;
    case DType::kBFloat16:
      body([] { return DType::kBFloat16; });
      return;
    default:
      body([] { return DType::kFloat32; });
      return;
  }
}

void load_floats(const void* from, DType dtype, std::int64_t n, float* to) {
  with_dtype(dtype, [&](auto type) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load_as<type()>(from, i));
    for (; i < n; ++i) to[i] = load_float(from, dtype, i);
  });
}

void store_floats(const float* from, DType dtype, std::int64_t n, void* to) {
  std::int64_t i = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * 4);
    return;
  }
  std::uint16_t* halves = static_cast<std::uint16_t*>(to);
  if (dtype == DType::kBFloat16) {
    for (; i + kLanes <= n; i += kLanes) {
      vu bits;
      std::memcpy(&bits, from + i, sizeof bits);
      // Nearest, ties to even; NaN keeps its top bits and gains the quiet one.
      const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const vu quiet = (bits >> 16) | 0x40u;
      const vh narrow =
          __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, vh);
      std::memcpy(halves + i, &narrow, sizeof narrow);
    }
  } else {
#if defined(__AVX512F__)
    for (; i + kLanes <= n; i += kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves + i),
                          _mm512_cvtps_ph(load(from + i), 0));
    }
#elif defined(__AVX2__)
    for (; i + kLanes <= n; i += kLanes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), _mm256_cvtps_ph(load(from + i), 0));
    }
#endif
  }
  for (; i < n; ++i) store_float(to, dtype, i, from[i]);
}

// ---- elementwise functions ----------------------------------------------------------------------

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

// ---- norms --------------------------------------------------------------------------------------

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

// ---- rotation -----------------------------------------------------------------------------------

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

// ---- attention ----------------------------------------------------------------------------------

#if defined(__GNUC__) && !defined(__clang__)
// One step of the transposition: swaps the off-diagonal blocks of kStep lanes of two rows.
template <int kStep>
LOWBIT_INLINE void exchange(vf* rows) {
  vi first = {}, second = {};
  for (int l = 0; l < kLanes; ++l) {
    first[l] = (l & kStep) == 0 ? l : kLanes + l - kStep;
    second[l] = (l & kStep) == 0 ? l + kStep : kLanes + l;
  }
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) != 0) continue;
    const vf a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, first);
    rows[i + kStep] = __builtin_shuffle(a, b, second);
  }
}
#endif

LOWBIT_INLINE void transpose(vf* rows) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (kLanes >= 16) exchange<8>(rows);
  if constexpr (kLanes >= 8) exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
#else
  vf out[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) out[j][i] = rows[i][j];
  }
  for (int i = 0; i < kLanes; ++i) rows[i] = out[i];
#endif
}

// Whether the two halves of a lane become floats where they are.
template <DType kType>
constexpr bool kPaired =
#if defined(__AVX512F__)
    kType != DType::kFloat32;
#else
    kType == DType::kBFloat16;
#endif

// The first (0) or second element of the pair of 16-bit elements in every lane.
template <DType kType, int kSecond>
LOWBIT_INLINE vf half_of_pair(vf pair) {
  vu bits;
  std::memcpy(&bits, &pair, sizeof bits);
#if defined(__AVX512F__)
  if constexpr (kType == DType::kFloat16) {
    const vu shifted = bits >> (16 * kSecond);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(shifted)));
  }
#endif
  constexpr bool kHigh = (std::endian::native == std::endian::little) == (kSecond != 0);
  const vu wide = kHigh ? bits & 0xffff0000u : bits << 16;
  vf value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Keys of `count` positions to [d, kPositions] floats; columns of absent positions are zero.
template <DType kType>
void transpose_keys(const void* keys, std::int64_t stride, std::int64_t first, int count, int d,
                    float* to) {
  for (int p = 0; p < kPositions; p += kLanes) {
    int i = 0;
    if constexpr (kPaired<kType>) {
      // Two elements at a time are turned as one: half the shuffles, which are most of the work.
      for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
        vf rows[kLanes];
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          rows[l] = vf{};
          if (p + l < count) {
            std::memcpy(&rows[l],
                        static_cast<const std::uint16_t*>(keys) + (first + p + l) * stride + i,
                        sizeof(vf));
          }
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          float* column = to + (i + 2 * l) * kPositions + p;
          store(column, half_of_pair<kType, 0>(rows[l]));
          store(column + kPositions, half_of_pair<kType, 1>(rows[l]));
        }
      }
    }
    for (; i + kLanes <= d; i += kLanes) {
      vf rows[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = p + l < count ? load_as<kType>(keys, (first + p + l) * stride + i) : vf{};
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(to + (i + l) * kPositions + p, rows[l]);
    }
    for (; i < d; ++i) {
      for (int l = 0; l < kLanes; ++l) {
        to[i * kPositions + p + l] =
            p + l < count ? load_float(keys, kType, (first + p + l) * stride + i) : 0.0f;
      }
    }
  }
}

// c[r][0..vectors) (+)= sum over i of a[r][i] * b[i][...]. b(i, v) is vector v of row i.
template <int kRows, int kVectors, bool kAdd, typename B>
LOWBIT_INLINE void product(const float* a, std::int64_t a_stride, const B& b, int inner, float* c,
                           std::int64_t c_stride) {
  vf sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = kAdd ? load(c + r * c_stride + v * kLanes) : vf{};
    }
  }
  for (int i = 0; i < inner; ++i) {
    vf row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = b(i, v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf factor = splat(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

template <int kVectors, bool kAdd, typename B>
void product_rows(int rows, const float* a, std::int64_t a_stride, const B& b, int inner, float* c,
                  std::int64_t c_stride) {
  int r = 0;
  for (; r + kRowsPerProduct <= rows; r += kRowsPerProduct) {
    product<kRowsPerProduct, kVectors, kAdd>(a + r * a_stride, a_stride, b, inner, c + r * c_stride,
                                             c_stride);
  }
  a += r * a_stride;
  c += r * c_stride;
  switch (rows - r) {
    case 1:
      return product<1, kVectors, kAdd>(a, a_stride, b, inner, c, c_stride);
    case 2:
      return product<2, kVectors, kAdd>(a, a_stride, b, inner, c, c_stride);
    case 3:
      return product<3, kVectors, kAdd>(a, a_stride, b, inner, c, c_stride);
    case 4:
      return product<4, kVectors, kAdd>(a, a_stride, b, inner, c, c_stride);
    case 5:
      return product<5, kVectors, kAdd>(a, a_stride, b, inner, c, c_stride);
  }
}

std::int64_t round_to_lanes(std::int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

}  // namespace
}  // namespace lowbit::cpu

#include "cpu/generic/fused_cache.h"
#include "cpu/generic/fused_int8.h"

namespace lowbit::cpu {
namespace {

// Whether accumulators hold, of every two vectors of channels, the even ones and then the odd ones,
// as they come out of one load.
template <DType kType>
constexpr bool kSplitChannels = kType == DType::kBFloat16;

LOWBIT_INLINE bool splits_channels(DType dtype, int d) {
  return dtype == DType::kBFloat16 && d % (kColumns * kLanes) == 0;
}

// Puts accumulators [rows, d] of add_values back in order.
void join_channels(int rows, int d, float* acc) {
  for (std::int64_t at = 0; at < std::int64_t{rows} * d; at += 2 * kLanes) {
    float even[kLanes], odd[kLanes];
    std::memcpy(even, acc + at, sizeof even);
    std::memcpy(odd, acc + at + kLanes, sizeof odd);
    for (int l = 0; l < kLanes; ++l) {
      acc[at + 2 * l] = even[l];
      acc[at + 2 * l + 1] = odd[l];
    }
  }
}

// Lines of `count` rows are on their way while something else is computed.
LOWBIT_INLINE void prefetch_rows(const void* rows, std::int64_t stride, std::int64_t bytes,
                                 int count) {
  for (int r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(rows) + r * stride;
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// acc[rows][d] += p[rows][count] * values. d is a multiple of kLanes.
template <DType kType>
void add_values(int rows, const float* p, const void* values, std::int64_t stride, int count, int d,
                float* acc) {
  int column = 0;
  if (kSplitChannels<kType> && splits_channels(kType, d)) {
    for (; column < d; column += kColumns * kLanes) {
      const auto b = [&](int i, int v) __attribute__((always_inline)) {
        vf pair;
        std::memcpy(
            &pair,
            static_cast<const std::uint16_t*>(values) + i * stride + column + v / 2 * 2 * kLanes,
            sizeof pair);
        return v % 2 == 0 ? half_of_pair<DType::kBFloat16, 0>(pair)
                          : half_of_pair<DType::kBFloat16, 1>(pair);
      };
      product_rows<kColumns, true>(rows, p, kPositions, b, count, acc + column, d);
    }
    return;
  }
  for (; column + kColumns * kLanes <= d; column += kColumns * kLanes) {
    const auto b = [&](int i, int v) __attribute__((always_inline)) {
      return load_as<kType>(values, i * stride + column + v * kLanes);
    };
    product_rows<kColumns, true>(rows, p, kPositions, b, count, acc + column, d);
  }
  for (; column < d; column += kLanes) {
    const auto b = [&](int i, int) __attribute__((always_inline)) {
      return load_as<kType>(values, i * stride + column);
    };
    product_rows<1, true>(rows, p, kPositions, b, count, acc + column, d);
  }
}

// Transposed keys, scores, padded values and accumulators (where the head size is no multiple of
// the vectors, or the cache is quantized), and what byte products need.
std::int64_t attend_scratch(int rows, int d, int values_d) {
  const std::int64_t padded = cache_padded(values_d);
  std::int64_t floats = std::int64_t{kPositions} * d + std::int64_t{rows} * kPositions;
  floats += (kPositions + rows) * padded;
#if defined(LOWBIT_ATTEND_INT8)
  floats += Int8Work::floats(rows, d);
#endif
  return floats;
}

// The additive mask of one row and position.
LOWBIT_INLINE float mask_value(MaskKind kind, const void* mask, std::int64_t p) {
  switch (kind) {
    case MaskKind::kBool:
      return static_cast<const std::uint8_t*>(mask)[p] != 0 ? 0.0f : -INFINITY;
    case MaskKind::kFloat32:
      return static_cast<const float*>(mask)[p];
    case MaskKind::kFloat16:
      return load_float(mask, DType::kFloat16, p);
    case MaskKind::kBFloat16:
      return load_float(mask, DType::kBFloat16, p);
    default:
      return 0.0f;
  }
}

void attend(const AttendRows& args) {
  const int rows = args.rows, d = args.d, values_d = args.values_d;
  const bool cached = args.format != CacheFormat::kFloat;
  // Quantized channels are stored up to a multiple of 16, whatever the vectors.
  const std::int64_t padded = cached ? cache_padded(values_d) : round_to_lanes(values_d);
  const bool pad = padded != values_d;
  float* transposed = args.scratch;
  float* scores = transposed + std::int64_t{kPositions} * d;
  float* padded_values = scores + std::int64_t{rows} * kPositions;
  float* padded_acc = padded_values + kPositions * padded;
  float* acc = pad ? padded_acc : args.acc;
#if defined(LOWBIT_ATTEND_INT8)
  const bool bytewise = args.format == CacheFormat::kInt8;
  const Int8Work work(rows, d, padded_acc + rows * padded);
  if (bytewise) prepare_queries(args.q, rows, work);
#else
  constexpr bool bytewise = false;
#endif
  for (std::int64_t i = 0; i < rows * padded; ++i) acc[i] = 0;
  for (int r = 0; r < rows; ++r) {
    args.max[r] = -INFINITY;
    args.sum[r] = 0;
  }
  const std::int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const std::int64_t block_bytes = cache_block_bytes(d);
  for (std::int64_t first = args.begin; first < args.end; first += kPositions) {
    const int count =
        static_cast<int>(args.end - first < kPositions ? args.end - first : kPositions);
    const std::byte* key_block =
        static_cast<const std::byte*>(args.keys) + first / kPositions * block_bytes;
    const std::byte* value_block =
        static_cast<const std::byte*>(args.values) + first / kPositions * block_bytes;
    const char* values = static_cast<const char*>(args.values) + first * args.value_stride * bytes;
    if (cached) {
      prefetch_rows(value_block, 0, block_bytes, 1);
    } else {
      prefetch_rows(values, args.value_stride * bytes, values_d * bytes, count);
    }
#if defined(LOWBIT_ATTEND_INT8)
    if (bytewise) score_keys(rows, key_block, work, scores);
#endif
    if (args.format == CacheFormat::kFloat) {
      with_dtype(args.dtype, [&](auto type) {
        const int own = d - args.tail_d;
        transpose_keys<type()>(args.keys, args.key_stride, first, count, own, transposed);
        if (args.tail_d > 0) {
          transpose_keys<type()>(args.tail, args.tail_stride, first, count, args.tail_d,
                                 transposed + std::int64_t{own} * kPositions);
        }
      });
    } else if (args.format == CacheFormat::kFp8) {
      keys_to_columns<CacheFormat::kFp8>(key_block, d, transposed);
    } else if (!bytewise) {
      keys_to_columns<CacheFormat::kInt8>(key_block, d, transposed);
    }
    for (int column = 0; column < kPositions && !bytewise; column += kColumns * kLanes) {
      const auto b = [&](int i, int v) __attribute__((always_inline)) {
        return load(transposed + i * kPositions + column + v * kLanes);
      };
      product_rows<kColumns, false>(rows, args.q, d, b, d, scores + column, kPositions);
    }
    if (first + kPositions < args.end) {
      if (cached) {
        prefetch_rows(key_block + block_bytes, 0, block_bytes, 1);
      } else {
        const std::int64_t left = args.end - first - kPositions;
        prefetch_rows(
            static_cast<const char*>(args.keys) + (first + kPositions) * args.key_stride * bytes,
            args.key_stride * bytes, (d - args.tail_d) * bytes,
            static_cast<int>(left < kPositions ? left : kPositions));
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * kPositions;
      if (args.softcap > 0) {
        for (int p = 0; p < kPositions; p += kLanes) {
          store(row + p, vtanh(load(row + p) / args.softcap) * args.softcap);
        }
      }
      if (args.masks != nullptr) {
        for (int p = 0; p < count; ++p) {
          row[p] += mask_value(args.mask_kind, args.masks[r], first + p);
        }
      }
      int seen = count;
      if (args.limits != nullptr && args.limits[r] < first + count) {
        seen = args.limits[r] > first ? static_cast<int>(args.limits[r] - first) : 0;
      }
      for (int p = seen; p < kPositions; ++p) row[p] = -INFINITY;
      vf best = load(row);
      for (int p = kLanes; p < kPositions; p += kLanes) best = vmax(best, load(row + p));
      const float before = args.max[r];
      const float block_max = max_of(best);
      const float after = block_max > before ? block_max : before;
      if (after == -INFINITY) {  // nothing seen so far, and no NaN from -inf - -inf
        // A NaN score is no maximum, but must not vanish: its row becomes NaN.
        vf bad = {};
        for (int p = 0; p < kPositions; p += kLanes) {
          const vf s = load(row + p);
          bad = s == s ? bad : s;
          store(row + p, s == s ? vf{} : s);
        }
        args.sum[r] += sum_of(bad);
        continue;
      }
      vf total = {};
      for (int p = 0; p < kPositions; p += kLanes) {
        const vf e = vexp(load(row + p) - after);
        store(row + p, e);
        total = total + e;
      }
      if (after != before) {
        const float factor = before == -INFINITY ? 0.0f : std::exp(before - after);
        args.sum[r] *= factor;
        float* out = acc + r * padded;
        for (std::int64_t i = 0; i < padded; i += kLanes) store(out + i, load(out + i) * factor);
        args.max[r] = after;
      }
      args.sum[r] += sum_of(total);
    }
#if defined(LOWBIT_ATTEND_INT8)
    if (bytewise) {
      add_cached(rows, scores, value_block, count, work, acc, padded);
      continue;
    }
#endif
    if (cached) {
      args.format == CacheFormat::kInt8
          ? values_to_rows<CacheFormat::kInt8>(value_block, d, count, padded, padded_values)
          : values_to_rows<CacheFormat::kFp8>(value_block, d, count, padded, padded_values);
      add_values<DType::kFloat32>(rows, scores, padded_values, padded, count,
                                  static_cast<int>(padded), acc);
    } else if (pad) {
      for (int p = 0; p < count; ++p) {
        float* to = padded_values + p * padded;
        load_floats(values + p * args.value_stride * bytes, args.dtype, values_d, to);
        for (std::int64_t i = values_d; i < padded; ++i) to[i] = 0;
      }
      add_values<DType::kFloat32>(rows, scores, padded_values, padded, count,
                                  static_cast<int>(padded), acc);
    } else {
      with_dtype(args.dtype, [&](auto type) {
        add_values<type()>(rows, scores, values, args.value_stride, count, values_d, acc);
      });
    }
  }
  if (!cached && !pad && splits_channels(args.dtype, values_d)) {
    join_channels(rows, values_d, acc);
  }
  if (pad) {
    for (int r = 0; r < rows; ++r) {
      std::memcpy(args.acc + std::int64_t{r} * values_d, acc + r * padded,
                  static_cast<std::size_t>(values_d) * 4);
    }
  }
}

constexpr FusedKernels kernels_named(const char* name) {
  return {name, load_floats,    store_floats, norm,      add_scaled, activate,         rotate,
          dots, attend_scratch, attend,       cache_put, cache_get,  cache_get_scratch};
}

}  // namespace
}  // namespace lowbit::cpu
