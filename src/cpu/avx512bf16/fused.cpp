// Attention of many rows by vdpbf16ps: 8 rows of the left side x 48 query rows are 24 accumulators.
#include "cpu/generic/fused_many.h"

namespace lowbit::cpu {
namespace {

LOWBIT_INLINE __m512bh broadcast_pair(const std::uint16_t* pair) {
  int bits;
  __builtin_memcpy(&bits, pair, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

struct PairProducts {
  static constexpr int kRows = 48;
  static constexpr int kTaskRows = 48;
  struct Session {};

  // c[m][48] (+)= a b, `steps` panels [m][32] of a and 16 pairs of b each. m is a multiple of 8.
  template <bool kAdd>
  static void multiply(const std::uint16_t* a, int m, int steps, const std::uint16_t* b, float* c) {
    constexpr int kCount = 8, kVectors = kRows / 16;
    for (int row = 0; row < m; row += kCount) {
      float* out = c + row * kRows;
      __m512 sums[kCount][kVectors];
      unroll<kCount>([&](auto r) LOWBIT_LAMBDA {
        unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
          sums[r][v] = kAdd ? _mm512_load_ps(out + r * kRows + v * 16) : _mm512_setzero_ps();
        });
      });
      const std::uint16_t* right = b;
      for (int step = 0; step < steps; ++step) {
        const std::uint16_t* left = a + (std::int64_t{step} * m + row) * kPanel;
        for (int pair = 0; pair < kPanel / 2; ++pair, right += kRows * 2) {
          __m512bh lanes[kVectors];
          unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
            lanes[v] = (__m512bh)_mm512_load_si512(right + v * 32);
          });
          unroll<kCount>([&](auto r) LOWBIT_LAMBDA {
            const __m512bh factor = broadcast_pair(left + r * kPanel + 2 * pair);
            unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
              sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factor, lanes[v]);
            });
          });
        }
      }
      unroll<kCount>([&](auto r) LOWBIT_LAMBDA {
        unroll<kVectors>(
            [&](auto v) LOWBIT_LAMBDA { _mm512_store_ps(out + r * kRows + v * 16, sums[r][v]); });
      });
    }
  }
};

constexpr ManyRows kMany = many_rows<PairProducts>("avx512bf16");

}  // namespace

const ManyRows& many_rows_avx512bf16() {
  return kMany;
}

}  // namespace lowbit::cpu
