// Small products of rows with a block of keys or values, and the turning of keys for it.
#pragma once

#include <bit>

#include "cpu/generic/fused_vectors.h"

namespace lowbit::cpu {
namespace {

// 6 rows x kColumns vectors of accumulators: 24 of 32 registers, or 12 of 16.
constexpr int kRowsPerProduct = 6;
constexpr int kColumns = kLanes == 16 ? 4 : 2;
constexpr int kPositions = 64;  // per block: d = 64 transposed keys are 16 KiB, half of an L1

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
