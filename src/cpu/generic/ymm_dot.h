// Formats with groups by products of unsigned weight bytes and signed activation bytes, 8 rows to a
// register:
//   out = sum over groups of s * step * (sum of byte * q - zero * sum of q) (+ m * step * sum of q)
// Integer sums are exact. The folders differ in how the products are summed:
//   avxvnni  vpdpbusd, four products into a lane of 32 bits, lane = row
//   avx2     vpmaddubsw, two products into a lane of 16 bits; widened by vpmaddwd before bytes up
//            to kLargest could overflow it, which is why bytes of more than five bits are not here
//
// Tile: 16 rows in two halves, all inputs, one sequential stream of bytes; up to kTokens tokens use
// an unpacked operand. Both halves at once where 16 registers hold their sums, else one after the
// other.
#pragma once

#include "cpu/generic/ymm_prepare.h"

#if defined(__AVXVNNI__)
#define LOWBIT_DOT(sum, weights, x) _mm256_dpbusd_avx_epi32(sum, weights, x)
#elif defined(LOWBIT_AVXVNNI_EVEX)
// The same instruction in the encoding of AVX-512, for tests on processors that have only that one.
#define LOWBIT_DOT(sum, weights, x) _mm256_dpbusd_epi32(sum, weights, x)
#endif

namespace lowbit::cpu {
namespace {

// One sum of products, by whichever instruction there is.
template <int kLargest>
struct Sum {
#if defined(LOWBIT_DOT)
  static constexpr int kWiden = 8;
  __m256i wide;
  LOWBIT_INLINE void clear() {
    wide = _mm256_setzero_si256();
  }
  template <int I>
  LOWBIT_INLINE void add(__m256i weights, __m256i x) {
    wide = LOWBIT_DOT(wide, weights, x);
  }
#else
  // Quads whose sums fit 16 bits: two products of at most kLargest * 128 each.
  static constexpr int kWiden = kLargest * 256 * 8 < 32768 ? 8 : 4;
  static_assert(kLargest * 256 * kWiden < 32768);
  __m256i wide, narrow;
  LOWBIT_INLINE void clear() {
    wide = _mm256_setzero_si256();
  }
  template <int I>
  LOWBIT_INLINE void add(__m256i weights, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, x);
    narrow = I % kWiden == 0 ? pairs : _mm256_add_epi16(narrow, pairs);
    settle(narrow);
    if constexpr (I % kWiden == kWiden - 1) {
      wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
      settle(wide);
    }
  }
#endif
};

template <Format F, int kPlanes, int kCount>
[[gnu::noinline]] void tile_dot(__m256i table, const GroupWalk<Grouped<F>::kMinimum>& walk,
                                const std::byte* tile, const std::byte* quads,
                                const std::byte* meta, const Epilogue& epilogue, std::int64_t token,
                                std::int64_t tile_index) {
  using Is = Grouped<F>;
  constexpr int kHalves = kCount * kPlanes <= 6 ? 2 : 1;
  // Few sums: two chains of each, or the latency of vpdpbusd shows.
#if defined(LOWBIT_DOT)
  constexpr int kChains = kCount * kPlanes <= 2 ? 2 : 1;
#else
  constexpr int kChains = 1;
#endif
  constexpr std::int64_t kQuad = kPlanes * 4;
  constexpr std::int64_t kBlock = Unpack<Is::kBits>::kBlockBytes;
  __m256 total[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { total[i / 2][i % 2] = _mm256_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    const std::byte* scales = tile + walk.scales(g);
    prefetch_far(scales);
    unroll<2 / kHalves>([&](auto first) LOWBIT_LAMBDA {
      Sum<Is::kLargest> sum[kCount][kPlanes][kHalves][kChains];
      unroll<kCount * kPlanes * kHalves * kChains>([&](auto i) LOWBIT_LAMBDA {
        constexpr int kChain = i % kChains, kHalf = i / kChains % kHalves;
        constexpr int kPlane = i / (kChains * kHalves) % kPlanes;
        sum[i / (kChains * kHalves * kPlanes)][kPlane][kHalf][kChain].clear();
      });
      const std::byte* x = quads;
      for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
        if constexpr (first == 0) prefetch<kBlock>(codes + b * kBlock);
        unroll<8>([&](auto i) LOWBIT_LAMBDA {
          __m256i weights[kHalves];
          unroll<kHalves>([&](auto h) LOWBIT_LAMBDA {
            weights[h] = weight_bytes<F, i>(table, codes, inputs, b, first + h);
          });
          unroll<kCount * kPlanes>([&](auto j) LOWBIT_LAMBDA {
            const __m256i q = broadcast32(x + i * kCount * kQuad + j * 4);
            unroll<kHalves>([&](auto h) LOWBIT_LAMBDA {
              sum[j / kPlanes][j % kPlanes][h][i % kChains].template add<i>(weights[h], q);
            });
          });
        });
        x += 8 * kCount * kQuad;
      }
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        Meta of;
        __builtin_memcpy(&of, meta + (g * kCount + t) * sizeof(Meta), sizeof(Meta));
        const std::int32_t q_sum = kPlanes == 2 ? 256 * of.high + of.low : of.high;
        // Wraps like the vectors do; the difference fits.
        const __m256i zero = _mm256_set1_epi32(static_cast<int>(
            static_cast<std::uint32_t>(Is::kZero) * static_cast<std::uint32_t>(q_sum)));
        unroll<kHalves>([&](auto h) LOWBIT_LAMBDA {
          __m256i plane[kPlanes];
          unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
            plane[p] = sum[t][p][h][0].wide;
            if constexpr (kChains == 2) {
              plane[p] = _mm256_add_epi32(plane[p], sum[t][p][h][1].wide);
            }
          });
          __m256i whole = plane[0];
          if constexpr (kPlanes == 2) {
            whole = _mm256_add_epi32(_mm256_slli_epi32(whole, 8), plane[1]);
          }
          if constexpr (Is::kZero != 0) whole = _mm256_sub_epi32(whole, zero);
          const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(of.step));
          __m256& to = total[t][first + h];
          to = _mm256_fmadd_ps(value, load_halves(scales + (first + h) * 16), to);
          if constexpr (Is::kMinimum) {
            to = _mm256_fmadd_ps(load_halves(scales + 32 + (first + h) * 16),
                                 _mm256_set1_ps(of.step * static_cast<float>(q_sum)), to);
          }
        });
      });
    });
    quads += inputs / 4 * kCount * kQuad;
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

// Tokens outside, tiles inside: a block of activations stays in L1 while tile_block tiles, whose
// bytes stay in L2, are multiplied by it. With few tokens there is one block.
template <Format F, int kPlanes, int kTokens, bool kFixed>
void run_dot(const RowBlock& rows, const Activations& a, std::int64_t first_token,
             std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
             std::int64_t token_end, std::int64_t, std::byte*) {
  constexpr Quad kKind = kPlanes == 1 ? Quad::kByte : Quad::kPlanes;
  const __m256i table = make_byte_table<F>();
  const GroupWalk<Grouped<F>::kMinimum> walk(rows.layout);
  const Epilogue epilogue{rows, static_cast<float>(Grouped<F>::kValueScale)};
  const auto one = [&](std::int64_t tile, std::int64_t begin, std::int64_t end) LOWBIT_LAMBDA {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for_blocks<kKind, kTokens, kFixed>(
        a, begin, end, first_token,
        [&](auto count, const std::byte* quads, const std::byte* meta, std::int64_t token)
            LOWBIT_LAMBDA {
              tile_dot<F, kPlanes, count>(table, walk, bytes, quads, meta, epilogue, token, tile);
            });
  };
  if constexpr (!kFixed) {
    for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) one(tile, token_begin, token_end);
  } else {
    for (std::int64_t t = token_begin; t < token_end; t += kTokens) {
      const std::int64_t end = t + kTokens < token_end ? t + kTokens : token_end;
      for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) one(tile, t, end);
    }
  }
}

#if defined(LOWBIT_DOT)
#define LOWBIT_DOT_LEVEL "avxvnni"
#else
#define LOWBIT_DOT_LEVEL "avx2"
#endif

template <Format F, int kPlanes, bool kMany>
constexpr Path dot_path(const char* name) {
  constexpr Quad kKind = kPlanes == 1 ? Quad::kByte : Quad::kPlanes;
  // Six tokens and both halves of a tile, or four with two planes and one half: 12 or 8 sums, their
  // operands and a broadcast in 16 registers.
  constexpr int kTokens = kPlanes == 1 ? 6 : 4;
  return {name,
          kPlanes == 1 ? (kMany ? LOWBIT_DOT_LEVEL ".int8.t6" : LOWBIT_DOT_LEVEL ".int8")
                       : (kMany ? LOWBIT_DOT_LEVEL ".int8x2.t4" : LOWBIT_DOT_LEVEL ".int8x2"),
          quads_bytes<kKind, kTokens, kMany>,
          prepare_quads<kKind, kTokens, kMany>,
          no_scratch,
          run_dot<F, kPlanes, kTokens, kMany>,
          kMany ? 4 : 1,
          kMany ? kTokens : 1,
          kMany};
}

}  // namespace
}  // namespace lowbit::cpu
