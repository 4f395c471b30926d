// Vectors of the widest float registers that the including file is compiled for, from and to any
// float type. Everything is in an anonymous namespace (linear_kernels.h).
#pragma once

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
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

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

}  // namespace
}  // namespace lowbit::cpu
