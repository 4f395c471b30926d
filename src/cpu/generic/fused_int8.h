// Attention over int8 keys and values by byte products (vpdpbusd), four at a time and without
// turning keys or converting values.
//
//   score = ks * qs * (256 sum (k + 128) qh + sum (k + 128) ql - 128 (256 sum qh + sum ql))
//   acc  += ps * (256 sum ph v + sum pl v)
//
// Queries are held to 16 bits of the largest of each group of 32 channels, as two int8 planes
// (avx512_prepare.h); probabilities, multiplied by the scales of their values, to 16 bits of the
// largest of the block, as two uint8 planes. Integer sums are exact: 32 channels or 64 positions.
#pragma once

#include "cpu/generic/fused_cache.h"

namespace lowbit::cpu {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LOWBIT_ATTEND_INT8 1

constexpr float kQueryLevels = 127.0f * 256.0f;
constexpr float kWeightLevels = 255.0f * 256.0f;

// The working memory of one call, in bytes of `scratch`.
struct Int8Work {
  int d, padded, groups;
  std::int8_t* query;    // [rows][2][padded]
  float* query_scale;    // [rows][groups]
  std::int32_t* start;   // [rows][groups][2]
  std::uint8_t* weight;  // [rows][groups][2][64]
  float* weight_scale;   // [rows][groups]

  static std::int64_t floats(int rows, int d) {
    const std::int64_t padded = cache_padded(d), groups = cache_groups(d);
    return rows * (padded / 2 + groups * (1 + 2 + 32 + 1)) + 16;
  }

  Int8Work(int rows, int head_dim, float* scratch)
      : d(head_dim),
        padded(static_cast<int>(cache_padded(head_dim))),
        groups(static_cast<int>(cache_groups(head_dim))) {
    query = reinterpret_cast<std::int8_t*>(scratch);
    scratch += rows * padded / 2;
    weight = reinterpret_cast<std::uint8_t*>(scratch);
    scratch += rows * groups * 32;
    start = reinterpret_cast<std::int32_t*>(scratch);
    scratch += rows * groups * 2;
    query_scale = scratch;
    weight_scale = query_scale + rows * groups;
  }
};

LOWBIT_INLINE __m512i magnitude_bits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// The step and its reciprocal for values up to `top` (bits) in `levels` steps: 0 for tiny values,
// NaN for what is not finite, with all codes 0.
LOWBIT_INLINE float step_of(std::uint32_t top, float levels, float* inverse) {
  const float most = bits_to_float(top);
  *inverse = 0;
  if (top >= 0x7f800000u) return __builtin_nanf("");
  if (most < 0x1p-100f) return 0;
  *inverse = levels / most;
  return most / levels;
}

void prepare_queries(const float* q, int rows, const Int8Work& work) {
  for (int r = 0; r < rows; ++r) {
    std::int8_t* high = work.query + r * 2 * work.padded;
    std::int8_t* low = high + work.padded;
    for (int g = 0; g < work.groups; ++g) {
      __m512 x[2];
      __m512i top = _mm512_setzero_si512();
      for (int v = 0; v < 2; ++v) {
        const int left = work.d - g * kCacheGroup - 16 * v;
        const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
        x[v] = _mm512_maskz_loadu_ps(mask, q + r * work.d + g * kCacheGroup + 16 * v);
        top = _mm512_max_epu32(top, magnitude_bits(x[v]));
      }
      float inverse;
      const float step = step_of(_mm512_reduce_max_epu32(top), kQueryLevels, &inverse);
      __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
      for (int v = 0; v < 2 && g * kCacheGroup + 16 * v < work.padded; ++v) {
        __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(x[v], _mm512_set1_ps(inverse)));
        if (inverse == 0) value = _mm512_setzero_si512();
        const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
        const __m512i l = _mm512_sub_epi32(value, _mm512_slli_epi32(h, 8));
        const int at = g * kCacheGroup + 16 * v;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + at), _mm512_cvtepi32_epi8(h));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low + at), _mm512_cvtepi32_epi8(l));
        high_sum = _mm512_add_epi32(high_sum, h);
        low_sum = _mm512_add_epi32(low_sum, l);
      }
      work.query_scale[r * work.groups + g] = step;
      work.start[(r * work.groups + g) * 2] = -128 * _mm512_reduce_add_epi32(high_sum);
      work.start[(r * work.groups + g) * 2 + 1] = -128 * _mm512_reduce_add_epi32(low_sum);
    }
  }
}

LOWBIT_INLINE __m512i broadcast_word(const void* p) {
  int word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

LOWBIT_INLINE __m512 joined(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

// Scores of kRows rows from `row` on with the 64 keys of a block.
template <int kRows>
LOWBIT_INLINE void int8_scores(const Int8Work& work, int row, const std::byte* block,
                               float* scores) {
  const std::byte* scales = block + std::int64_t{work.padded} * kCacheBlock;
  __m512 total[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total[r][v] = _mm512_setzero_ps();
  }
  for (int g = 0; g < work.groups; ++g) {
    __m512i high[kRows][4], low[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int32_t* start = work.start + ((row + r) * work.groups + g) * 2;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        high[r][v] = _mm512_set1_epi32(start[0]);
        low[r][v] = _mm512_set1_epi32(start[1]);
      }
    }
    const int begin = g * kQuads;
    const int end = begin + kQuads < work.padded / 4 ? begin + kQuads : work.padded / 4;
    for (int quad = begin; quad < end; ++quad) {
      __m512i keys[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        keys[v] = _mm512_loadu_si512(block + (quad * kCacheBlock + v * 16) * 4);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const std::int8_t* query = work.query + (row + r) * 2 * work.padded + quad * 4;
        const __m512i h = broadcast_word(query), l = broadcast_word(query + work.padded);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          high[r][v] = _mm512_dpbusd_epi32(high[r][v], keys[v], h);
          low[r][v] = _mm512_dpbusd_epi32(low[r][v], keys[v], l);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 scale = load_as<DType::kBFloat16>(scales, g * kCacheBlock + v * 16);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512 both = scale * work.query_scale[(row + r) * work.groups + g];
        total[r][v] = _mm512_fmadd_ps(joined(high[r][v], low[r][v]), both, total[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      _mm512_storeu_ps(scores + (row + r) * kPositions + v * 16, total[r][v]);
    }
  }
}

// Probabilities times the scales of the values, as planes.
void prepare_weights(int rows, const float* p, const std::byte* block, int count,
                     const Int8Work& work) {
  const std::byte* scales = block + std::int64_t{work.padded} * kCacheBlock;
  for (int g = 0; g < work.groups; ++g) {
    __m512 scale[4];
    for (int v = 0; v < 4; ++v) {
      const int left = count - v * 16;  // scales of positions that were never written are anything
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
      scale[v] =
          _mm512_maskz_mov_ps(mask, load_as<DType::kBFloat16>(scales, g * kCacheBlock + v * 16));
    }
    for (int r = 0; r < rows; ++r) {
      __m512 x[4];
      __m512i top = _mm512_setzero_si512();
      for (int v = 0; v < 4; ++v) {
        x[v] = _mm512_mul_ps(_mm512_loadu_ps(p + r * kPositions + v * 16), scale[v]);
        top = _mm512_max_epu32(top, magnitude_bits(x[v]));
      }
      float inverse;
      const float step = step_of(_mm512_reduce_max_epu32(top), kWeightLevels, &inverse);
      work.weight_scale[r * work.groups + g] = step;
      std::uint8_t* high = work.weight + (r * work.groups + g) * 2 * kPositions;
      for (int v = 0; v < 4; ++v) {
        __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(x[v], _mm512_set1_ps(inverse)));
        if (inverse == 0) value = _mm512_setzero_si512();
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + v * 16),
                         _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + kPositions + v * 16),
                         _mm512_cvtepi32_epi8(value));
      }
    }
  }
}

// acc += weights * values for kRows rows and the kVectors * 16 channels of group g.
template <int kRows, int kVectors>
LOWBIT_INLINE void int8_values(const Int8Work& work, int row, int g, const std::byte* block,
                               int count, float* acc, std::int64_t acc_stride) {
  __m512i high[kRows][kVectors], low[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) high[r][v] = low[r][v] = _mm512_setzero_si512();
  }
  const std::byte* channels = block + g * kCacheGroup * 4;
  for (int p = 0; p < count; p += 4) {
    __m512i values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      values[v] = _mm512_loadu_si512(channels + (std::int64_t{p} * work.padded + v * 64));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::uint8_t* weight = work.weight + ((row + r) * work.groups + g) * 2 * kPositions + p;
      const __m512i h = broadcast_word(weight), l = broadcast_word(weight + kPositions);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        high[r][v] = _mm512_dpbusd_epi32(high[r][v], h, values[v]);
        low[r][v] = _mm512_dpbusd_epi32(low[r][v], l, values[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 scale = _mm512_set1_ps(work.weight_scale[(row + r) * work.groups + g]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = acc + (row + r) * acc_stride + g * kCacheGroup + v * 16;
      _mm512_storeu_ps(to,
                       _mm512_fmadd_ps(joined(high[r][v], low[r][v]), scale, _mm512_loadu_ps(to)));
    }
  }
}

// rows in steps of kStep: three rows of scores are 24 accumulators, four of values 16.
template <int kStep, typename Body>
LOWBIT_INLINE void in_rows(int rows, const Body& body) {
  int r = 0;
  for (; r + kStep <= rows; r += kStep) body(r, [] { return kStep; });
  if constexpr (kStep > 1) {
    if (rows - r == 1) body(r, [] { return 1; });
    if (kStep > 2 && rows - r == 2) body(r, [] { return 2; });
    if (kStep > 3 && rows - r == 3) body(r, [] { return kStep > 3 ? 3 : 1; });
  }
}

void score_keys(int rows, const std::byte* block, const Int8Work& work, float* scores) {
  in_rows<3>(
      rows, [&](int r, auto count)
                __attribute__((always_inline)) { int8_scores<count()>(work, r, block, scores); });
}

// acc [rows, padded], as wide as the stored channels.
void add_cached(int rows, const float* p, const std::byte* block, int count, const Int8Work& work,
                float* acc, std::int64_t acc_stride) {
  prepare_weights(rows, p, block, count, work);
  for (int g = 0; g < work.groups; ++g) {
    const bool whole = (g + 1) * kCacheGroup <= work.padded;
    in_rows<4>(
        rows, [&](int r, auto n) __attribute__((always_inline)) {
          if (whole) {
            int8_values<n(), 2>(work, r, g, block, count, acc, acc_stride);
          } else {
            int8_values<n(), 1>(work, r, g, block, count, acc, acc_stride);
          }
        });
  }
}
#endif

}  // namespace
}  // namespace lowbit::cpu
