// Activations of the formats with groups as the 256-bit kernels read them: blocks of tokens,
// interleaved by quads of inputs, so that a kernel walks one sequential stream.
#pragma once

#include "cpu/generic/ymm.h"

namespace lowbit::cpu {
namespace {

// A quad of one token. q = 127 * x / absmax of the group, or 127 * 256 * x / absmax (|q| <= 32512,
// so x is held to absmax * 2^-16), which is also 256 * high + low with both int8.
enum class Quad {
  kByte,    // q[4] int8
  kPlanes,  // high[4], low[4] int8
  kWords,   // q[4] int16 in the order 0 2 1 3
  kBoth,    // q[4] int16, high[4] int8, 4 bytes unused
};

constexpr std::int64_t quad_bytes(Quad kind) {
  return kind == Quad::kByte ? 4 : kind == Quad::kBoth ? 16 : 8;
}

// A block of nt tokens:
//   quads  [k_padded / 4][nt]
//   meta   [groups][nt]: x ~ step * q, and the sums of high and low (of q, of 0 for kByte)
// A group that holds a NaN or an infinity gets step NaN and q = 0: its token's outputs are all NaN
// and nobody else's are touched.
struct Meta {
  float step;
  std::int32_t high, low;
};

struct Block {
  std::int64_t meta_at, stride;
  LOWBIT_INLINE Block(const Activations& a, Quad kind, std::int64_t tokens)
      : meta_at(align64(a.k_padded / 4 * tokens * quad_bytes(kind))),
        stride(meta_at + align64(a.groups * tokens * static_cast<std::int64_t>(sizeof(Meta)))) {}
};

// kFixed: always blocks of kTokens, so that token ranges may start at any of them; else as few
// equal blocks as will do.
template <int kTokens, bool kFixed>
LOWBIT_INLINE std::int64_t tokens_per_block(std::int64_t m) {
  return kFixed ? kTokens : block_tokens(m, kTokens);
}

template <Quad kKind, int kTokens, bool kFixed>
std::int64_t quads_bytes(const Activations& a) {
  const std::int64_t tokens = tokens_per_block<kTokens, kFixed>(a.m);
  return (a.m + tokens - 1) / tokens * Block(a, kKind, tokens).stride;
}

template <Quad kKind>
LOWBIT_INLINE void put_quads(std::byte* to, std::int64_t next, __m256i q, __m256i high,
                             __m256i low) {
  const auto words = [](__m256i v) LOWBIT_LAMBDA {
    return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  };
  const auto put = [&](std::int64_t at, std::int64_t value, int bytes) LOWBIT_LAMBDA {
    __builtin_memcpy(to + at, &value, static_cast<std::size_t>(bytes));
  };
  const auto put_bytes = [&](std::int64_t at, __m256i v) LOWBIT_LAMBDA {
    const __m128i bytes = _mm_packs_epi16(words(v), _mm_setzero_si128());
    put(at, _mm_extract_epi32(bytes, 0), 4);
    put(next + at, _mm_extract_epi32(bytes, 1), 4);
  };
  if constexpr (kKind == Quad::kByte) {
    put_bytes(0, high);
  } else if constexpr (kKind == Quad::kPlanes) {
    put_bytes(0, high);
    put_bytes(4, low);
  } else {
    __m128i sixteen = words(q);
    if constexpr (kKind == Quad::kWords) {
      sixteen = _mm_shufflehi_epi16(_mm_shufflelo_epi16(sixteen, 0xd8), 0xd8);
    } else {
      put_bytes(8, high);
    }
    put(0, _mm_extract_epi64(sixteen, 0), 8);
    put(next, _mm_extract_epi64(sixteen, 1), 8);
  }
}

template <Quad kKind, int kTokens, bool kFixed>
void prepare_quads(const Tokens& tokens, const Activations& a, std::int64_t begin,
                   std::int64_t end) {
  constexpr float kLevels = kKind == Quad::kByte ? 127.0f : 127.0f * 256.0f;
  constexpr float kTiny = 0x1p-100f;  // such groups count as zero; 1 / step would overflow
  const std::int64_t per_block = tokens_per_block<kTokens, kFixed>(a.m);
  const Block sizes(a, kKind, per_block);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / per_block, slot = t % per_block;
    const std::int64_t left = a.m - block * per_block;
    const std::int64_t nt = left < per_block ? left : per_block;
    std::byte* base = a.data + block * sizes.stride;
    const std::int64_t next = nt * quad_bytes(kKind);
    for (std::int64_t g = 0; g < a.groups; ++g) {
      const std::int64_t k0 = g * a.group;
      const std::int64_t k1 = k0 + a.group < a.k_padded ? k0 + a.group : a.k_padded;
      alignas(32) float held[256];  // the largest group
      __m256i largest = _mm256_setzero_si256();
      for (std::int64_t k = k0; k < k1; k += 8) {
        const __m256 x = load8(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k);
        _mm256_store_ps(held + (k - k0), x);
        largest = _mm256_max_epu32(
            largest, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
      }
      alignas(32) std::uint32_t tops[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(tops), largest);
      std::uint32_t top = 0;
      for (std::uint32_t value : tops) top = value > top ? value : top;
      const float absmax = bits_to_float(top);
      const bool finite = top < 0x7f800000u;
      const bool zero = !finite || absmax < kTiny;
      const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : kLevels / absmax);
      __m256i sum_high = _mm256_setzero_si256(), sum_low = _mm256_setzero_si256();
      for (std::int64_t k = k0; k < k1; k += 8) {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(held + (k - k0)), inverse));
        if (zero) q = _mm256_setzero_si256();
        __m256i high = q, low = _mm256_setzero_si256();
        if constexpr (kKind != Quad::kByte) {
          high = _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(128)), 8);
          low = _mm256_sub_epi32(q, _mm256_slli_epi32(high, 8));
        }
        sum_high = _mm256_add_epi32(sum_high, high);
        sum_low = _mm256_add_epi32(sum_low, low);
        std::byte* to = base + (k / 4 * nt + slot) * quad_bytes(kKind);
        put_quads<kKind>(to, next, q, high, low);
      }
      alignas(32) std::int32_t highs[8], lows[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(highs), sum_high);
      _mm256_store_si256(reinterpret_cast<__m256i*>(lows), sum_low);
      Meta meta{finite ? (zero ? 0.0f : absmax / kLevels) : __builtin_nanf(""), 0, 0};
      for (int i = 0; i < 8; ++i) {
        meta.high += highs[i];
        meta.low += lows[i];
      }
      __builtin_memcpy(base + sizes.meta_at + (g * nt + slot) * sizeof(Meta), &meta, sizeof(Meta));
    }
  }
}

// Calls tile(count constant, block, meta, first token of the call) for each block of tokens.
template <Quad kKind, int kTokens, bool kFixed, class Tile>
LOWBIT_INLINE void for_blocks(const Activations& a, std::int64_t token_begin,
                              std::int64_t token_end, std::int64_t first_token, Tile&& tile) {
  const std::int64_t per_block = tokens_per_block<kTokens, kFixed>(a.m);
  const Block sizes(a, kKind, per_block);
  for (std::int64_t t = token_begin; t < token_end; t += per_block) {
    const std::byte* block = a.data + t / per_block * sizes.stride;
    const std::int64_t nt = token_end - t < per_block ? token_end - t : per_block;
    unroll<kTokens>([&](auto i) LOWBIT_LAMBDA {
      if (nt == i + 1) {
        tile(std::integral_constant<int, i + 1>{}, block, block + sizes.meta_at, first_token + t);
      }
    });
  }
}

}  // namespace
}  // namespace lowbit::cpu
