// Shared by the AVX-512 folders: unrolling, loads and stores of activations, the walk over groups,
// the epilogue. Anonymous namespace throughout: compiled once per folder, with that folder's flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/generic/group_walk.h"
#include "cpu/generic/prefetch.h"
#include "cpu/linear_kernels.h"
#include "lowbit/format.h"

#define LOWBIT_INLINE [[gnu::always_inline]] inline
#define LOWBIT_LAMBDA __attribute__((always_inline))

namespace lowbit::cpu {
namespace {

// f(0), f(1), ... f(N - 1) with constant arguments. Loops would do, were it not that GCC then keeps
// arrays of accumulators in memory, which halves the kernel; after this expansion every index is a
// constant before scalar replacement runs.
template <class F, int... I>
LOWBIT_INLINE void unroll_sequence(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
LOWBIT_INLINE void unroll(F&& f) {
  unroll_sequence(f, std::make_integer_sequence<int, N>{});
}

LOWBIT_INLINE __mmask16 mask16(std::int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// The lines of a block of codes.
template <std::int64_t kBlockBytes>
LOWBIT_INLINE void prefetch_block(const std::byte* block) {
  unroll<static_cast<int>(kBlockBytes / 64)>(
      [&](auto line) LOWBIT_LAMBDA { prefetch_ahead(block + line * 64); });
}

// Quad I's share of the lines of a block, where they are many.
template <int I, std::int64_t kBlockBytes>
LOWBIT_INLINE void prefetch_quad(const std::byte* block) {
  constexpr int kLines = static_cast<int>(kBlockBytes / 64);
  constexpr int kFirst = I * kLines / 8;
  unroll<(I + 1) * kLines / 8 - kFirst>(
      [&](auto line) LOWBIT_LAMBDA { prefetch_ahead(block + (kFirst + line) * 64); });
}

LOWBIT_INLINE std::int64_t align64(std::int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Tokens per block when m tokens are cut into as few blocks of at most `most` as will do, all but
// the last equally large: nine tokens are better done as 5 + 4 than as 8 + 1.
LOWBIT_INLINE std::int64_t block_tokens(std::int64_t m, std::int64_t most) {
  const std::int64_t blocks = (m + most - 1) / most;
  return (m + blocks - 1) / blocks;
}

// Elements i .. i + 15 of which the first `count` exist; the others read as zero.
LOWBIT_INLINE __m512 load16(const void* data, DType dtype, std::int64_t i, std::int64_t count) {
  const __mmask16 mask = mask16(count);
  if (dtype == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + i);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(data) + i);
  if (dtype == DType::kBFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  return _mm512_cvtph_ps(half);
}

// 16 float32 to bf16 bits in the low halves of the lanes: nearest, ties to even, NaN kept quiet.
// (vcvtneps2bf16 flushes subnormals and needs another extension; outputs are few.)
LOWBIT_INLINE __m512i bf16_bits(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
}

LOWBIT_INLINE __m256i to_16_bits(DType dtype, __m512 value) {
  return dtype == DType::kBFloat16 ? _mm512_cvtepi32_epi16(bf16_bits(value))
                                   : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

LOWBIT_INLINE void store16(void* data, DType dtype, std::int64_t i, std::int64_t count,
                           __m512 value) {
  const __mmask16 mask = mask16(count);
  if (dtype == DType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + i, mask, value);
  } else {
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(data) + i, mask, to_16_bits(dtype, value));
  }
}

// out[token][16 rows of tile] = sum * factor * 2^exponent + bias.
struct Epilogue {
  const RowBlock& rows;
  __m512 factor;
  __m512 exponent;

  LOWBIT_INLINE Epilogue(const RowBlock& block, float value_scale)
      : rows(block),
        factor(_mm512_set1_ps(value_scale)),
        exponent(_mm512_set1_ps(static_cast<float>(block.exponent))) {}

  LOWBIT_INLINE __m512 value(std::int64_t tile, __m512 sum) const {
    const __m512 value = _mm512_scalef_ps(_mm512_mul_ps(sum, factor), exponent);
    if (rows.bias == nullptr) return value;
    const std::int64_t row = tile * kTileRows;
    return _mm512_add_ps(value, load16(rows.bias, rows.bias_dtype, row, rows.layout.n - row));
  }
  LOWBIT_INLINE void store(std::int64_t token, std::int64_t tile, __m512 sum) const {
    const std::int64_t row = tile * kTileRows;
    store16(rows.out, rows.out_dtype, token * rows.out_stride + row, rows.layout.n - row,
            value(tile, sum));
  }
};

LOWBIT_INLINE __m512 load_halves(const std::byte* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

}  // namespace
}  // namespace lowbit::cpu
