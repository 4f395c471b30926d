// Operands of products in bf16 by tiles: activations as A tiles, weights of any format as B tiles.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/generic/avx512_bf16.h"
#include "cpu/generic/avx512_floats.h"

namespace lowbit::cpu {
namespace {

constexpr int kTile = 1024;  // bytes
constexpr int kTileTokens = 16;

LOWBIT_INLINE std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Activations: [tile of 16 tokens][k_padded / 32][16][32] bf16. Tiles of tokens are apart by an odd
// number of KiB and so in other sets of a cache.
LOWBIT_INLINE std::int64_t token_tile_bytes(const Activations& a) {
  return a.k_padded / kInputBlock * kTile + kTile * (1 + (a.k_padded / kInputBlock & 1));
}

LOWBIT_INLINE std::int64_t bf16_activation_bytes(const Activations& a) {
  return divide_up(a.m, kTileTokens) * token_tile_bytes(a);
}

LOWBIT_INLINE __m512i bf16_of(const Tokens& tokens, std::int64_t at, std::int64_t count) {
  if (tokens.dtype == DType::kBFloat16) {
    const auto mask =
        static_cast<__mmask32>(mask16(count) | std::uint32_t{mask16(count - 16)} << 16);
    return _mm512_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(tokens.x) + at);
  }
  return (__m512i)_mm512_cvtne2ps_pbh(load16(tokens.x, tokens.dtype, at + 16, count - 16),
                                      load16(tokens.x, tokens.dtype, at, count));
}

// kPairs: inputs 1 and 2 of every four change places, as fp8 weights are expanded.
template <bool kPairs>
void prepare_bf16(const Tokens& tokens, const Activations& a, std::int64_t begin,
                  std::int64_t end) {
  const std::int64_t bytes = token_tile_bytes(a);
  const __m512i order = _mm512_set_epi16(31, 29, 30, 28, 27, 25, 26, 24, 23, 21, 22, 20, 19, 17, 18,
                                         16, 15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  const std::int64_t last = divide_up(end, kTileTokens) * kTileTokens;
  for (std::int64_t t = begin; t < last; ++t) {
    std::byte* to = a.data + t / kTileTokens * bytes + t % kTileTokens * 64;
    for (std::int64_t k = 0; k < a.k_padded; k += kInputBlock, to += kTile) {
      __m512i x = _mm512_setzero_si512();
      if (t < end) x = bf16_of(tokens, t * tokens.stride + k, a.k - k);
      if constexpr (kPairs) x = _mm512_permutexvar_epi16(order, x);
      _mm512_store_si512(to, x);
    }
  }
}

// A block of 32 inputs x 16 outputs as a B tile: rows of two inputs.
template <Format F>
struct Brain {
  static constexpr bool kPairs = kHasRowScale<F>;
  static constexpr std::int64_t kBlockBytes = Floats<F>::kBlockBytes;
  // From quad to quad; fifth bits lie elsewhere.
  static constexpr std::int64_t kQuadBytes = kBlockBytes == 320 ? 32 : kBlockBytes / 8;

  // Rows 2 I and 2 I + 1 of the block's tile: inputs [4 I, 4 I + 4). floats: opened at the block's
  // group.
  template <int I, class Plane>
  LOWBIT_INLINE static void expand(const Floats<F>& floats, const std::byte* codes,
                                   std::int64_t block, const Plane& plane, std::byte* to) {
    to += I * 128;
    if constexpr (F == Format::kBf16 || F == Format::kFp16) {
      unroll<2>([&](auto i) LOWBIT_LAMBDA {
        const std::byte* unit = codes + block * kBlockBytes + (2 * I + i) * 64;
        if constexpr (F == Format::kBf16) {
          _mm512_store_si512(to + i * 64, load_unit(unit));
        } else {
          const auto* half = reinterpret_cast<const __m256i*>(unit);
          const __m512 low = _mm512_cvtph_ps(_mm256_load_si256(half));
          const __m512 high = _mm512_cvtph_ps(_mm256_load_si256(half + 1));
          _mm512_store_si512(to + i * 64, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
      });
    } else if constexpr (kHasRowScale<F>) {
      __m512i even, odd;
      floats.template pairs<I>(codes, block, even, odd);
      _mm512_store_si512(to, even);
      _mm512_store_si512(to + 64, odd);
    } else {
      __m512 weights[4];
      quad<I>(floats, codes, block, plane, weights);
      _mm512_store_si512(to, interleave(weights[0], weights[1]));
      _mm512_store_si512(to + 64, interleave(weights[2], weights[3]));
    }
  }
  // As Floats::quad. Four bits become a float32 by a look-up, which ignores the bits above them, in
  // place of a mask and a conversion.
  template <int I, class Plane>
  LOWBIT_INLINE static void quad(const Floats<F>& floats, const std::byte* codes,
                                 std::int64_t block, const Plane& plane, __m512 (&out)[4]) {
    if constexpr (Grouped<F>::kBits == 4 && !Grouped<F>::kTable) {
      const __m512 values = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m512i index = Unpack<4>::index<I>(codes, block, plane);
      unroll<4>([&](auto k) LOWBIT_LAMBDA {
        const __m512i lane = k == 0 ? index : _mm512_srli_epi32(index, 8 * k);
        out[k] = _mm512_fmadd_ps(_mm512_permutexvar_ps(lane, values), floats.scale, floats.offset);
      });
    } else {
      floats.template quad<I>(codes, block, plane, out);
    }
  }
  // All of a block: inputs [k, k + 32) of a row tile.
  LOWBIT_INLINE static void expand_block(Floats<F>& floats, const AnyWalk<F>& walk,
                                         const std::byte* tile, std::int64_t k, std::byte* to) {
    const std::int64_t g = kIsGrouped<F> ? k / walk.group : 0;
    const std::int64_t block = (k - g * walk.group) / kInputBlock;
    const std::byte* codes = tile + walk.codes(g);
    floats.open(tile, walk, g);
    const auto plane = Floats<F>::plane(codes, walk.inputs(g), block);
    unroll<8>([&](auto i) LOWBIT_LAMBDA { expand<i>(floats, codes, block, plane, to); });
  }
  // Where the codes of inputs [k, k + 32) begin.
  LOWBIT_INLINE static std::int64_t codes_at(const AnyWalk<F>& walk, std::int64_t k) {
    const std::int64_t g = kIsGrouped<F> ? k / walk.group : 0;
    return walk.codes(g) + (k - g * walk.group) / kInputBlock * kBlockBytes;
  }
};

}  // namespace
}  // namespace lowbit::cpu
