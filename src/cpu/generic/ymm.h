// Shared by the folders that work in 256-bit registers (avx2, avxvnni): unrolling, loads and
// stores of activations, packed codes to bytes, the epilogue. Anonymous namespace throughout:
// compiled once per folder, with that folder's flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/generic/convert.h"
#include "cpu/generic/group_walk.h"
#include "cpu/generic/prefetch.h"
#include "cpu/linear_kernels.h"
#include "lowbit/format.h"

#define LOWBIT_INLINE [[gnu::always_inline]] inline
#define LOWBIT_LAMBDA __attribute__((always_inline))

namespace lowbit::cpu {
namespace {

// As in avx512.h: constant indices keep accumulators in registers.
template <class F, int... I>
LOWBIT_INLINE void unroll_sequence(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
LOWBIT_INLINE void unroll(F&& f) {
  unroll_sequence(f, std::make_integer_sequence<int, N>{});
}

// Makes a sum final where it stands: GCC else collects the products of a whole block before it adds
// them: 108 accesses to the stack in the nf4 kernel of AVX2, instead of 19.
LOWBIT_INLINE void settle(__m256i& sum) {
  __asm__("" : "+x"(sum));
}
LOWBIT_INLINE void settle(__m256& sum) {
  __asm__("" : "+x"(sum));
}

LOWBIT_INLINE std::int64_t align64(std::int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Tokens per block when m tokens are cut into as few equal blocks of at most `most` as will do.
LOWBIT_INLINE std::int64_t block_tokens(std::int64_t m, std::int64_t most) {
  const std::int64_t blocks = (m + most - 1) / most;
  return (m + blocks - 1) / blocks;
}

LOWBIT_INLINE __m256i load32(const std::byte* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
LOWBIT_INLINE __m256i broadcast32(const std::byte* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
LOWBIT_INLINE __m256i broadcast64(const std::byte* p) {
  long long word;
  __builtin_memcpy(&word, p, 8);
  return _mm256_set1_epi64x(word);
}
LOWBIT_INLINE __m256 broadcast_f32(const std::byte* p) {
  return _mm256_broadcast_ss(reinterpret_cast<const float*>(p));
}
LOWBIT_INLINE __m256 load_halves(const std::byte* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

template <std::int64_t kBytes>
LOWBIT_INLINE void prefetch(const std::byte* at) {
  unroll<static_cast<int>(kBytes / 64)>([&](auto i) LOWBIT_LAMBDA { prefetch_ahead(at + i * 64); });
}

// Elements i .. i + 7 of which the first `count` exist; the others read as zero.
LOWBIT_INLINE __m256 load8(const void* data, DType dtype, std::int64_t i, std::int64_t count) {
  if (count < 8) {
    alignas(32) float values[8] = {};
    for (std::int64_t j = 0; j < count; ++j) values[j] = load_float(data, dtype, i + j);
    return _mm256_load_ps(values);
  }
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(data) + i);
  const __m128i half = _mm_loadu_si128(
      reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(data) + i));
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

LOWBIT_INLINE void store8(void* data, DType dtype, std::int64_t i, __m256 value) {
  if (dtype == DType::kFloat32) {
    _mm256_storeu_ps(static_cast<float*>(data) + i, value);
    return;
  }
  auto* to = reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(data) + i);
  if (dtype == DType::kFloat16) {
    _mm_storeu_si128(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  // Nearest, ties to even; NaN kept quiet.
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  _mm_storeu_si128(
      to, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

// out[token][16 rows of tile] = sum * factor * 2^exponent + bias.
struct Epilogue {
  const RowBlock& rows;
  float factor;

  LOWBIT_INLINE void store(std::int64_t token, std::int64_t tile, const __m256 (&sum)[2]) const {
    const std::int64_t row = tile * kTileRows;
    const std::int64_t at = token * rows.out_stride + row;
    const bool plain = rows.exponent > -100 && rows.exponent < 100;
    if (row + kTileRows <= rows.layout.n && plain) {
      const __m256 power = _mm256_castsi256_ps(_mm256_set1_epi32((127 + rows.exponent) << 23));
      unroll<2>([&](auto h) LOWBIT_LAMBDA {
        __m256 value = _mm256_mul_ps(_mm256_mul_ps(sum[h], _mm256_set1_ps(factor)), power);
        if (rows.bias != nullptr) {
          value = _mm256_add_ps(value, load8(rows.bias, rows.bias_dtype, row + h * 8, 8));
        }
        store8(rows.out, rows.out_dtype, at + h * 8, value);
      });
      return;
    }
    alignas(32) float values[16];
    _mm256_store_ps(values, sum[0]);
    _mm256_store_ps(values + 8, sum[1]);
    for (int r = 0; r < kTileRows && row + r < rows.layout.n; ++r) {
      float value = __builtin_ldexpf(values[r] * factor, rows.exponent);
      if (rows.bias != nullptr) value += load_float(rows.bias, rows.bias_dtype, row + r);
      store_float(rows.out, rows.out_dtype, at + r, value);
    }
  }
};

// ---- codes to bytes -------------------------------------------------------------------------
// Quad I (0..7) of a block of 32 inputs, rows 8h .. 8h + 7: four inputs in a row's four bytes.
template <int kBits>
struct Unpack;

#if defined(__GFNI__)
// Bits First, First + 1 ... First + Count - 1 of every byte, in its lowest bits.
template <int First, int Count>
LOWBIT_INLINE __m256i bits_of_bytes(__m256i bytes) {
  // Byte 7 - i of the matrix selects what becomes bit i.
  std::uint64_t matrix = 0;
  for (int i = 0; i < Count; ++i) matrix |= std::uint64_t{1} << (First + i) << (8 * (7 - i));
  return _mm256_gf2p8affine_epi64_epi8(bytes, _mm256_set1_epi64x(static_cast<long long>(matrix)),
                                       0);
}
// Byte j of the result: bit j of the word, in bit To.
template <int To>
LOWBIT_INLINE __m256i place_bits(const std::byte* word) {
  // Eight bytes with one bit each, times a matrix whose only row is a byte of the word.
  constexpr std::uint64_t kRow = std::uint64_t{0xff} << (8 * (7 - To));
  constexpr auto at = [](std::uint64_t byte) {
    return static_cast<long long>((0x8080808080808080ull & ~kRow) | byte << (8 * (7 - To)));
  };
  const __m256i rows =
      _mm256_shuffle_epi8(broadcast32(word), _mm256_setr_epi64x(at(0), at(1), at(2), at(3)));
  const __m256i each = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_gf2p8affine_epi64_epi8(each, rows, 0);
}
#else
template <int First, int Count>
LOWBIT_INLINE __m256i bits_of_bytes(__m256i bytes) {
  const __m256i moved = First == 0 ? bytes : _mm256_srli_epi16(bytes, First);
  return _mm256_and_si256(moved, _mm256_set1_epi8((1 << Count) - 1));
}
#endif

// Byte j of the result: bit j of the word, as 0x00 or 0xff.
LOWBIT_INLINE __m256i plane_bits(const std::byte* word) {
  const __m256i spread = _mm256_shuffle_epi8(
      broadcast32(word), _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                          2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m256i mask = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
}

#if !defined(__GFNI__)
template <int To>
LOWBIT_INLINE __m256i place_bits(const std::byte* word) {
  return _mm256_and_si256(plane_bits(word), _mm256_set1_epi8(1 << To));
}
#endif

template <>
struct Unpack<4> {
  static constexpr std::int64_t kBlockBytes = 256;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t, std::int64_t b, int h) {
    const __m256i unit = load32(codes + b * kBlockBytes + I / 2 * 64 + h * 32);
    return _mm256_and_si256(I % 2 == 0 ? unit : _mm256_srli_epi16(unit, 4), _mm256_set1_epi8(15));
  }
};
template <>
struct Unpack<5> {
  static constexpr std::int64_t kBlockBytes = 320;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t inputs, std::int64_t b,
                                    int h) {
    const __m256i fifth = place_bits<4>(codes + inputs * 8 + (b * 8 + I) * 8 + h * 4);
    return _mm256_or_si256(Unpack<4>::quad<I>(codes, inputs, b, h), fifth);
  }
};
template <>
struct Unpack<3> {
  static constexpr std::int64_t kBlockBytes = 192;
  template <int I>
  LOWBIT_INLINE static __m256i low(const std::byte* codes, std::int64_t b, int h) {
    const __m256i unit = load32(codes + b * 128 + I / 4 * 64 + h * 32);
    return bits_of_bytes<I % 4 * 2, 2>(unit);
  }
  template <int I>
  LOWBIT_INLINE static const std::byte* third(const std::byte* codes, std::int64_t inputs,
                                              std::int64_t b, int h) {
    return codes + inputs * 4 + (b * 8 + I) * 8 + h * 4;
  }
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t inputs, std::int64_t b,
                                    int h) {
    return _mm256_or_si256(low<I>(codes, b, h), place_bits<2>(third<I>(codes, inputs, b, h)));
  }
};
template <>
struct Unpack<8> {
  static constexpr std::int64_t kBlockBytes = 512;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t, std::int64_t b, int h) {
    return load32(codes + b * kBlockBytes + I * 64 + h * 32);
  }
};

// Facts of a format with groups. A weight is (byte - kZero) * value scale, where the byte is the
// code itself or, kTable, comes out of a table: E2M1 doubled, NormalFloats in 1/127.
template <Format F>
struct Grouped {
  static constexpr int kBits = F == Format::kSymInt5 || F == Format::kAsymInt5 ? 5
                               : F == Format::kSymInt8                         ? 8
                               : F == Format::kNf3                             ? 3
                                                                               : 4;
  static constexpr bool kTable = F == Format::kNf3 || F == Format::kNf4 || F == Format::kFp4;
  static constexpr bool kMinimum = F == Format::kAsymInt4 || F == Format::kAsymInt5;
  static constexpr int kZero = F == Format::kSymInt4   ? 8
                               : F == Format::kSymInt5 ? 16
                               : F == Format::kFp4     ? 12
                               : kMinimum              ? 0
                                                       : 128;
  static constexpr int kLargest = F == Format::kFp4      ? 24
                                  : kTable || kBits == 8 ? 255
                                                         : (1 << kBits) - 1;
  static constexpr double kValueScale = F == Format::kFp4 ? 0.5 : kTable ? 1.0 / 127 : 1.0;
};

// One table of bytes in both lanes of a register; `byte(value)` for each entry of the codebook.
template <Format F, class Byte>
LOWBIT_INLINE __m256i make_table(Byte&& byte) {
  alignas(32) std::uint8_t bytes[32] = {};
  if constexpr (Grouped<F>::kTable) {
    const auto codebook = format_info(F).codebook;
    for (std::size_t i = 0; i < 32; ++i) bytes[i] = byte(codebook[i % codebook.size()]);
  }
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

LOWBIT_INLINE int nearest(double v) {
  return static_cast<int>(v < 0 ? v - 0.5 : v + 0.5);
}

template <Format F>
LOWBIT_INLINE __m256i make_byte_table() {
  return make_table<F>([](double v) {
    return static_cast<std::uint8_t>(nearest(v / Grouped<F>::kValueScale) + Grouped<F>::kZero);
  });
}

template <Format F, int I>
LOWBIT_INLINE __m256i weight_bytes(__m256i table, const std::byte* codes, std::int64_t inputs,
                                   std::int64_t b, int h) {
  const __m256i code = Unpack<Grouped<F>::kBits>::template quad<I>(codes, inputs, b, h);
  return Grouped<F>::kTable ? _mm256_shuffle_epi8(table, code) : code;
}

LOWBIT_INLINE std::int64_t no_scratch(const RowBlock&, const Activations&) {
  return 0;
}

}  // namespace
}  // namespace lowbit::cpu
