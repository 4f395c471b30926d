// Packed codes to float32: quad I of a block of 32 inputs becomes four vectors, one per input, each
// the exact weights of 16 rows (scale and minimum of the group included; row scales come last, in
// the epilogue).
#pragma once

#include "cpu/generic/avx512_codes.h"

namespace lowbit::cpu {
namespace {

template <Format F>
inline constexpr bool kIsGrouped = F <= Format::kFp4;
template <Format F>
inline constexpr bool kHasRowScale = F == Format::kFp8E4M3 || F == Format::kFp8E5M2;

// The walk of any format: one without groups has a single one.
template <Format F, bool = kIsGrouped<F>>
struct AnyWalk : GroupWalk<Grouped<F>::kMinimum> {
  LOWBIT_INLINE explicit AnyWalk(const Layout& layout) : GroupWalk<Grouped<F>::kMinimum>(layout) {}
};
template <Format F>
struct AnyWalk<F, false> {
  std::int64_t all_inputs, groups = 1, group;
  LOWBIT_INLINE explicit AnyWalk(const Layout& layout)
      : all_inputs(layout.k_padded), group(layout.k_padded) {}
  LOWBIT_INLINE std::int64_t inputs(std::int64_t) const { return all_inputs; }
  LOWBIT_INLINE std::int64_t codes(std::int64_t) const { return kHasRowScale<F> ? kUnitBytes : 0; }
};

template <Format F>
struct Floats {
  static_assert(kIsGrouped<F>);
  using Facts = Grouped<F>;
  using Codes = Unpack<Facts::kBits>;
  static constexpr std::int64_t kBlockBytes = Codes::kBlockBytes;
  __m512 table, scale, offset;

  LOWBIT_INLINE Floats() : scale(_mm512_setzero_ps()), offset(_mm512_setzero_ps()) {
    if constexpr (Facts::kTable) {
      const float* codebook = format_info(F).codebook.data();
      // Eight entries twice, or sixteen.
      table = Facts::kBits == 3 ? _mm512_castpd_ps(_mm512_broadcast_f64x4(
                                      _mm256_castps_pd(_mm256_loadu_ps(codebook))))
                                : _mm512_loadu_ps(codebook);
    } else {
      table = _mm512_setzero_ps();
    }
  }
  template <class Walk>
  LOWBIT_INLINE void open(const std::byte* tile, const Walk& walk, std::int64_t g) {
    scale = load_halves(tile + walk.scales(g));
    if constexpr (Facts::kMinimum) {
      offset = load_halves(tile + walk.scales(g) + 32);
    } else if constexpr (!Facts::kTable) {
      // (code - zero) * s as one exact multiply-add: both products have at most 19 bits.
      offset = _mm512_mul_ps(scale, _mm512_set1_ps(-Facts::kZero));
    }
  }
  using Plane = typename Codes::Plane;
  LOWBIT_INLINE static Plane plane(const std::byte* codes, std::int64_t inputs,
                                   std::int64_t block) {
    return Codes::plane(codes, inputs, block);
  }
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, const Plane& plane,
                          __m512 (&out)[4]) const {
    if constexpr (Facts::kTable) {
      const __m512i index = Codes::template index<I>(codes, block, plane);
      unroll<4>([&](auto k) LOWBIT_LAMBDA {
        const __m512i lane = k == 0 ? index : _mm512_srli_epi32(index, 8 * k);
        out[k] = _mm512_mul_ps(_mm512_permutexvar_ps(lane, table), scale);
      });
    } else {
      const __m512i bytes = Codes::template quad<I>(codes, block, plane);
      unroll<4>([&](auto k) LOWBIT_LAMBDA {
        const __m512i lane =
            k == 3 ? _mm512_srli_epi32(bytes, 24)
                   : _mm512_and_si512(_mm512_srli_epi32(bytes, 8 * k), _mm512_set1_epi32(255));
        out[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lane), scale, offset);
      });
    }
  }
};

// fp8 values are bf16 values: two tables of 128 bytes give the two bytes of the magnitude.
struct Fp8Tables {
  alignas(64) std::uint8_t high[128];
  alignas(64) std::uint8_t low[128];
};

inline Fp8Tables make_fp8_tables(bool e4m3) {
  Fp8Tables tables;
  for (unsigned code = 0; code < 128; ++code) {
    const int mantissa_bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
    const int exponent = static_cast<int>(code >> mantissa_bits);
    const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
    float value = static_cast<float>(exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits));
    const int shift = (exponent == 0 ? 1 : exponent) - bias - mantissa_bits;
    for (int i = 0; i < shift; ++i) value *= 2.0f;
    for (int i = 0; i > shift; --i) value *= 0.5f;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const bool special = e4m3 ? code == 0x7f : code >= 0x7c;
    if (special) bits = (e4m3 || code > 0x7c) ? 0x7fc00000u : 0x7f800000u;
    tables.high[code] = static_cast<std::uint8_t>(bits >> 24);
    tables.low[code] = static_cast<std::uint8_t>(bits >> 16);
  }
  return tables;
}

template <Format F>
const Fp8Tables& fp8_tables() {
  static const Fp8Tables tables = make_fp8_tables(F == Format::kFp8E4M3);
  return tables;
}

template <Format F>
struct Fp8Floats {
  static constexpr std::int64_t kBlockBytes = 512;
  __m512i high0, high1, low0, low1;

  LOWBIT_INLINE Fp8Floats()
      : high0(_mm512_load_si512(fp8_tables<F>().high)),
        high1(_mm512_load_si512(fp8_tables<F>().high + 64)),
        low0(_mm512_load_si512(fp8_tables<F>().low)),
        low1(_mm512_load_si512(fp8_tables<F>().low + 64)) {}
  template <class Walk>
  LOWBIT_INLINE void open(const std::byte*, const Walk&, std::int64_t) {}
  LOWBIT_INLINE static NoPlane plane(const std::byte*, std::int64_t, std::int64_t) { return {}; }

  // Low and high bytes of the bf16 of one quad.
  template <int I>
  LOWBIT_INLINE void bytes(const std::byte* codes, std::int64_t block, __m512i& low,
                           __m512i& high) const {
    const __m512i code = load_unit(codes + block * kBlockBytes + I * 64);
    low = _mm512_permutex2var_epi8(low0, code, low1);
    high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high0, code, high1), code,
                                     _mm512_set1_epi8(static_cast<char>(0x80)),
                                     0xf8);  // a | (b & c)
  }
  // bf16 pairs of one quad: inputs (0, 2) and (1, 3) of every row.
  template <int I>
  LOWBIT_INLINE void pairs(const std::byte* codes, std::int64_t block, __m512i& even,
                           __m512i& odd) const {
    __m512i low, high;
    bytes<I>(codes, block, low, high);
    const __m512i mask = _mm512_set1_epi16(0x00ff);
    even = _mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi16(high, 8), 0xca);  // a ? b : c
    odd = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xca);
  }
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, NoPlane,
                          __m512 (&out)[4]) const {
    __m512i even, odd;
    pairs<I>(codes, block, even, odd);
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(even, 16));
    out[1] = _mm512_castsi512_ps(_mm512_slli_epi32(odd, 16));
    out[2] = _mm512_castsi512_ps(_mm512_and_si512(even, top));
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(odd, top));
  }
};

template <>
struct Floats<Format::kFp8E4M3> : Fp8Floats<Format::kFp8E4M3> {};
template <>
struct Floats<Format::kFp8E5M2> : Fp8Floats<Format::kFp8E5M2> {};

template <>
struct Floats<Format::kBf16> {
  static constexpr std::int64_t kBlockBytes = 1024;
  template <class Walk>
  LOWBIT_INLINE void open(const std::byte*, const Walk&, std::int64_t) {}
  LOWBIT_INLINE static NoPlane plane(const std::byte*, std::int64_t, std::int64_t) { return {}; }
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, NoPlane,
                          __m512 (&out)[4]) const {
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    unroll<2>([&](auto i) LOWBIT_LAMBDA {
      const __m512i unit = load_unit(codes + block * kBlockBytes + (2 * I + i) * 64);
      out[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(unit, 16));
      out[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(unit, top));
    });
  }
};

template <>
struct Floats<Format::kFp16> {
  static constexpr std::int64_t kBlockBytes = 1024;
  template <class Walk>
  LOWBIT_INLINE void open(const std::byte*, const Walk&, std::int64_t) {}
  LOWBIT_INLINE static NoPlane plane(const std::byte*, std::int64_t, std::int64_t) { return {}; }
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, NoPlane,
                          __m512 (&out)[4]) const {
    unroll<2>([&](auto i) LOWBIT_LAMBDA {
      const __m512i unit = load_unit(codes + block * kBlockBytes + (2 * I + i) * 64);
      out[2 * i] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(unit));
      out[2 * i + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(unit, 16)));
    });
  }
};

// The row scales of a tile, or ones.
template <Format F>
LOWBIT_INLINE __m512 row_scales(const std::byte* tile) {
  if constexpr (kHasRowScale<F>) {
    return _mm512_load_ps(reinterpret_cast<const float*>(tile));
  } else {
    (void)tile;
    return _mm512_set1_ps(1.0f);
  }
}

}  // namespace
}  // namespace lowbit::cpu
