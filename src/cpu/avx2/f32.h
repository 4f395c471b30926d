// What the float32 kernels of this folder share: activations in blocks, packed floats to vectors.
#pragma once

#include "cpu/generic/ymm_prepare.h"

namespace lowbit::cpu {
namespace {

// Activations: float32, blocks of [k_padded][nt].
template <int kTokens, bool kFixed>
std::int64_t f32_bytes(const Activations& a) {
  const std::int64_t tokens = tokens_per_block<kTokens, kFixed>(a.m);
  return (a.m + tokens - 1) / tokens * align64(a.k_padded * tokens * 4);
}

template <int kTokens, bool kFixed>
void prepare_f32(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t per_block = tokens_per_block<kTokens, kFixed>(a.m);
  const std::int64_t stride = align64(a.k_padded * per_block * 4);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / per_block;
    const std::int64_t left = a.m - block * per_block;
    const std::int64_t nt = left < per_block ? left : per_block;
    float* to = reinterpret_cast<float*>(a.data + block * stride) + t % per_block;
    for (std::int64_t k = 0; k < a.k_padded; k += 8) {
      alignas(32) float values[8];
      _mm256_store_ps(values, load8(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k));
      for (int i = 0; i < 8; ++i) to[(k + i) * nt] = values[i];
    }
  }
}

LOWBIT_INLINE __m256 bf16_low(__m256i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}
LOWBIT_INLINE __m256 bf16_high(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Four inputs of 16 rows as halves: vector [pair][half of the rows], each lane the two inputs of
// one row. e4m3 moved into fp16's fields is worth 2^-8 of itself, its subnormals included.
template <Format F>
LOWBIT_INLINE void quad_halves(const std::byte* codes, std::int64_t quad, __m256i (&out)[2][2]) {
  unroll<2>([&](auto h) LOWBIT_LAMBDA {
    if constexpr (F == Format::kFp16) {
      out[0][h] = load32(codes + quad * 128 + h * 32);
      out[1][h] = load32(codes + quad * 128 + 64 + h * 32);
    } else {
      const __m256i code = load32(codes + quad * 64 + h * 32);
      const __m256i even = _mm256_slli_epi16(code, 8);
      const __m256i odd = _mm256_and_si256(code, _mm256_set1_epi16(static_cast<short>(0xff00)));
      unroll<2>([&](auto p) LOWBIT_LAMBDA {
        const __m256i top = p == 0 ? even : odd;
        if constexpr (F == Format::kFp8E5M2) {
          out[p][h] = top;
        } else {
          const __m256i sign = _mm256_set1_epi16(static_cast<short>(0x8000));
          out[p][h] = _mm256_or_si256(_mm256_and_si256(top, sign),
                                      _mm256_srli_epi16(_mm256_andnot_si256(sign, top), 1));
        }
      });
    }
  });
}

}  // namespace
}  // namespace lowbit::cpu
