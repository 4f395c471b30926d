// Attention of many rows by vdpbf16ps: 6 rows x 64 columns are 24 accumulators.
#include "cpu/generic/fused_many.h"

namespace lowbit::cpu {
namespace {

LOWBIT_INLINE __m512bh broadcast_pair(const std::uint16_t* pair) {
  int bits;
  __builtin_memcpy(&bits, pair, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

// c[kRows][16 * kVectors] (+)= a[kRows][pairs] b: vector v of pair i at b + i * b_stride + v * 64.
template <int kRowCount, int kVectors, bool kAdd>
LOWBIT_INLINE void pair_product(const std::uint16_t* a, std::int64_t a_stride, const std::byte* b,
                                std::int64_t b_stride, int pairs, float* c, std::int64_t c_stride) {
  __m512 sums[kRowCount][kVectors];
  unroll<kRowCount>([&](auto r) LOWBIT_LAMBDA {
    unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
      sums[r][v] = kAdd ? _mm512_load_ps(c + r * c_stride + v * 16) : _mm512_setzero_ps();
    });
  });
  for (int i = 0; i < pairs; ++i) {
    __m512bh row[kVectors];
    unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
      row[v] = (__m512bh)_mm512_load_si512(b + i * b_stride + v * 64);
    });
    unroll<kRowCount>([&](auto r) LOWBIT_LAMBDA {
      const __m512bh factor = broadcast_pair(a + r * a_stride + 2 * i);
      unroll<kVectors>(
          [&](auto v) LOWBIT_LAMBDA { sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factor, row[v]); });
    });
  }
  unroll<kRowCount>([&](auto r) LOWBIT_LAMBDA {
    unroll<kVectors>([&](auto v)
                         LOWBIT_LAMBDA { _mm512_store_ps(c + r * c_stride + v * 16, sums[r][v]); });
  });
}

struct PairProducts {
  static constexpr int kRows = 6;
  static constexpr int kTaskRows = 48;
  struct Session {};

  static void scores(const ManyWork& work, const std::byte* keys, int blocks) {
    const std::int64_t block_bytes = std::int64_t{work.padded} * kCacheBlock * 2;
    for (int block = 0; block < blocks; ++block) {
      for (int r = 0; r < work.rows; r += kRows) {
        pair_product<kRows, 4, false>(work.query + r * work.padded, work.padded,
                                      keys + block * block_bytes, kCacheBlock * 4, work.padded / 2,
                                      work.scores + r * kSpan + block * kCacheBlock, kSpan);
      }
    }
  }

  static void values(const ManyWork& work, const std::byte* values, int blocks) {
    const int pairs = blocks * kCacheBlock / 2;
    const std::int64_t stride = std::int64_t{work.padded} * 4;
    for (int r = 0; r < work.rows; r += kRows) {
      const std::uint16_t* weights = work.weights + r * kSpan;
      float* acc = work.acc + r * work.padded;
      int i = 0;
      for (; i + 64 <= work.padded; i += 64) {
        pair_product<kRows, 4, true>(weights, kSpan, values + i * 4, stride, pairs, acc + i,
                                     work.padded);
      }
      if (i < work.padded) {
        pair_product<kRows, 2, true>(weights, kSpan, values + i * 4, stride, pairs, acc + i,
                                     work.padded);
      }
    }
  }
};

constexpr ManyRows kMany = many_rows<PairProducts>("avx512bf16");

}  // namespace

const ManyRows& many_rows_avx512bf16() {
  return kMany;
}

}  // namespace lowbit::cpu
