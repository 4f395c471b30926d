// Activations as the AVX-512 kernels read them: blocks of up to kTokens tokens, interleaved so that
// a kernel walks one sequential stream, whatever the number of tokens in the block.
#pragma once

#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

// ---- int8 planes ----------------------------------------------------------------------------
// A block of nt tokens:
//   planes   [kPlanes][k_padded / 4][nt][4] int8
//   scale    [groups][nt] float32            x ~ scale * q
//   init     [groups][nt] int32              -kZero * sum of q: takes the codes' offset out
//   init2    [groups][nt] int32 or float32   see below
// One plane: q = int8, 127 * x / absmax. Two planes: q = 256 * high + low with both int8,
// |q| <= 127 * 256, so x is held to absmax * 2^-16. A group that holds a NaN or an infinity gets
// scale NaN and q = 0: its token's outputs are all NaN and nobody else's are touched.
enum class Init2 {
  kNone,
  kSum,    // float32: scale * sum of q, what a minimum is multiplied by
  kSplit,  // int32: init is -128 * sum of high and init2 is -128 * sum of low
};

struct IntBlock {
  std::int64_t plane_bytes, meta_bytes, stride;

  LOWBIT_INLINE IntBlock(const Activations& a, std::int64_t planes, std::int64_t tokens)
      : plane_bytes(a.k_padded * tokens),
        meta_bytes(align64(a.groups * tokens * 4)),
        stride(planes * align64(a.k_padded * tokens) + 3 * meta_bytes) {
    plane_bytes = align64(plane_bytes);
  }
};

template <int kPlanes, int kTokens>
std::int64_t int_activation_bytes(const Activations& a) {
  const std::int64_t tokens = block_tokens(a.m, kTokens);
  return (a.m + tokens - 1) / tokens * IntBlock(a, kPlanes, tokens).stride;
}

template <int kPlanes, int kTokens, int kZero, Init2 kInit2>
void prepare_int(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  constexpr float kLevels = kPlanes == 1 ? 127.0f : 127.0f * 256.0f;
  // Below this the reciprocal of the step would overflow; such a group counts as zero.
  constexpr float kTiny = 0x1p-100f;
  const std::int64_t per_block = block_tokens(a.m, kTokens);
  const IntBlock sizes(a, kPlanes, per_block);
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / per_block;
    const std::int64_t left = a.m - block * per_block;
    const std::int64_t nt = left < per_block ? left : per_block;
    const std::int64_t slot = t - block * per_block;
    std::byte* base = a.data + block * sizes.stride;
    std::byte* meta = base + kPlanes * sizes.plane_bytes;
    float* scales = reinterpret_cast<float*>(meta);
    std::int32_t* inits = reinterpret_cast<std::int32_t*>(meta + sizes.meta_bytes);
    std::byte* inits2 = meta + 2 * sizes.meta_bytes;
    const std::int64_t row = t * tokens.stride;
    for (std::int64_t g = 0; g < a.groups; ++g) {
      const std::int64_t k0 = g * a.group;
      const std::int64_t k1 = k0 + a.group < a.k_padded ? k0 + a.group : a.k_padded;
      alignas(64) float held[256];  // the largest group
      __m512i largest = _mm512_setzero_si512();
      for (std::int64_t k = k0; k < k1; k += 16) {
        const __m512 x = load16(tokens.x, tokens.dtype, row + k, a.k - k);
        _mm512_store_ps(held + (k - k0), x);
        const __m512i bits = _mm512_castps_si512(x);
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude_bits));
      }
      const std::uint32_t top = _mm512_reduce_max_epu32(largest);
      const float absmax =
          _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(top))));
      const bool finite = top < 0x7f800000u;
      const bool zero = !finite || absmax < kTiny;
      const float step = finite ? (zero ? 0.0f : absmax / kLevels) : __builtin_nanf("");
      const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : kLevels / absmax);
      const __mmask16 keep = zero ? 0 : 0xffff;
      __m512i sum_high = _mm512_setzero_si512(), sum_low = _mm512_setzero_si512();
      for (std::int64_t k = k0; k < k1; k += 16) {
        const __m512 x = _mm512_load_ps(held + (k - k0));
        const __m512i q = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(x, inverse));
        __m512i part[2];
        if constexpr (kPlanes == 1) {
          part[0] = q;
        } else {
          part[0] = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
          part[1] = _mm512_sub_epi32(q, _mm512_slli_epi32(part[0], 8));
          sum_low = _mm512_add_epi32(sum_low, part[1]);
        }
        sum_high = _mm512_add_epi32(sum_high, part[0]);
        unroll<kPlanes>([&](auto plane) LOWBIT_LAMBDA {
          const __m128i bytes = _mm512_cvtepi32_epi8(part[plane]);
          std::byte* to = base + plane * sizes.plane_bytes + (k / 4 * nt + slot) * 4;
          if (nt == 1) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
          } else {
            const auto put = [&](int i, int quad) { __builtin_memcpy(to + i * nt * 4, &quad, 4); };
            put(0, _mm_extract_epi32(bytes, 0));
            put(1, _mm_extract_epi32(bytes, 1));
            put(2, _mm_extract_epi32(bytes, 2));
            put(3, _mm_extract_epi32(bytes, 3));
          }
        });
      }
      const std::int32_t high = _mm512_reduce_add_epi32(sum_high);
      const std::int32_t low = kPlanes == 1 ? 0 : _mm512_reduce_add_epi32(sum_low);
      const std::int32_t sum = kPlanes == 1 ? high : 256 * high + low;
      const std::int64_t at = g * nt + slot;
      scales[at] = step;
      if constexpr (kInit2 == Init2::kSplit) {
        inits[at] = -128 * high;
        reinterpret_cast<std::int32_t*>(inits2)[at] = -128 * low;
      } else {
        inits[at] = -kZero * sum;
        if constexpr (kInit2 == Init2::kSum) {
          reinterpret_cast<float*>(inits2)[at] = step * static_cast<float>(sum);
        }
      }
    }
  }
}

// ---- float32 --------------------------------------------------------------------------------
// Token by token: [m][k_padded].
inline std::int64_t f32_activation_bytes(const Activations& a) {
  return a.m * a.k_padded * 4;
}

inline void prepare_f32(const Tokens& tokens, const Activations& a, std::int64_t begin,
                        std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    float* to = reinterpret_cast<float*>(a.data) + t * a.k_padded;
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      _mm512_store_ps(to + k, load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k));
    }
  }
}

// Blocks of kTokens: [k_padded][nt].
template <int kTokens>
std::int64_t f32_block_bytes(const Activations& a) {
  return (a.m + kTokens - 1) / kTokens * align64(a.k_padded * kTokens * 4);
}

template <int kTokens>
void prepare_f32_blocks(const Tokens& tokens, const Activations& a, std::int64_t begin,
                        std::int64_t end) {
  const std::int64_t stride = align64(a.k_padded * kTokens * 4);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / kTokens;
    const std::int64_t nt = a.m - block * kTokens < kTokens ? a.m - block * kTokens : kTokens;
    float* to = reinterpret_cast<float*>(a.data + block * stride) + (t - block * kTokens);
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      alignas(64) float values[16];
      _mm512_store_ps(values, load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k));
      for (int i = 0; i < 16; ++i) to[(k + i) * nt] = values[i];
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
