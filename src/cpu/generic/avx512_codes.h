// Packed codes to byte operands: quad I (0..7) of a block of 32 inputs is 16 rows x 4 inputs, one
// byte each, row r in bytes 4r..4r+3: the operand order of vpdpbusd.
#pragma once

#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

LOWBIT_INLINE __m512i load_unit(const std::byte* p) {
  return _mm512_load_si512(reinterpret_cast<const __m512i*>(p));
}

LOWBIT_INLINE __mmask64 load_plane(const std::byte* p) {
  return *reinterpret_cast<const std::uint64_t*>(p);
}

// codes: of the group; inputs: in the group; block: number of the block of 32 inputs in the group.
template <int kBits>
struct Unpack;

template <>
struct Unpack<4> {
  static constexpr std::int64_t kBlockBytes = 256;
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t, std::int64_t block) {
    return _mm512_and_si512(index<I>(codes, 0, block), _mm512_set1_epi8(15));
  }
  // The code in the low four bits, anything above: enough for a table repeated four times.
  template <int I>
  LOWBIT_INLINE static __m512i index(const std::byte* codes, std::int64_t, std::int64_t block) {
    const __m512i unit = load_unit(codes + block * kBlockBytes + I / 2 * 64);
    return I % 2 == 0 ? unit : _mm512_srli_epi16(unit, 4);
  }
};

template <>
struct Unpack<5> {
  static constexpr std::int64_t kBlockBytes = 320;
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t inputs,
                                    std::int64_t block) {
    const __m512i low = Unpack<4>::quad<I>(codes, inputs, block);
    const __mmask64 fifth = load_plane(codes + inputs * 8 + (block * 8 + I) * 8);
    return _mm512_mask_add_epi8(low, fifth, low, _mm512_set1_epi8(16));
  }
};

template <>
struct Unpack<3> {
  static constexpr std::int64_t kBlockBytes = 192;
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t inputs,
                                    std::int64_t block) {
    const __m512i unit = load_unit(codes + block * 128 + I / 4 * 64);
    const __m512i shifted = I % 4 == 0 ? unit : _mm512_srli_epi16(unit, I % 4 * 2);
    const __m512i low = _mm512_and_si512(shifted, _mm512_set1_epi8(3));
    const __mmask64 third = load_plane(codes + inputs * 4 + (block * 8 + I) * 8);
    return _mm512_mask_add_epi8(low, third, low, _mm512_set1_epi8(4));
  }
  template <int I>
  LOWBIT_INLINE static __m512i index(const std::byte* codes, std::int64_t inputs,
                                     std::int64_t block) {
    return quad<I>(codes, inputs, block);
  }
};

template <>
struct Unpack<8> {
  static constexpr std::int64_t kBlockBytes = 512;
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t, std::int64_t block) {
    return load_unit(codes + block * kBlockBytes + I * 64);
  }
};

// Facts of a grouped format at compile time.
//   kZero   the byte operand of the value 0
//   kTable  the operand comes out of a table of bytes
template <Format F>
struct Grouped;
template <>
struct Grouped<Format::kSymInt4> {
  static constexpr int kBits = 4, kZero = 8;
  static constexpr bool kTable = false, kMinimum = false;
  static constexpr float kValueScale = 1.0f;
};
template <>
struct Grouped<Format::kAsymInt4> {
  static constexpr int kBits = 4, kZero = 0;
  static constexpr bool kTable = false, kMinimum = true;
  static constexpr float kValueScale = 1.0f;
};
template <>
struct Grouped<Format::kSymInt5> {
  static constexpr int kBits = 5, kZero = 16;
  static constexpr bool kTable = false, kMinimum = false;
  static constexpr float kValueScale = 1.0f;
};
template <>
struct Grouped<Format::kAsymInt5> {
  static constexpr int kBits = 5, kZero = 0;
  static constexpr bool kTable = false, kMinimum = true;
  static constexpr float kValueScale = 1.0f;
};
template <>
struct Grouped<Format::kSymInt8> {
  static constexpr int kBits = 8, kZero = 128;
  static constexpr bool kTable = false, kMinimum = false;
  static constexpr float kValueScale = 1.0f;
};
// NormalFloat entries rounded to multiples of 1/127.
template <>
struct Grouped<Format::kNf3> {
  static constexpr int kBits = 3, kZero = 128;
  static constexpr bool kTable = true, kMinimum = false;
  static constexpr float kValueScale = 1.0f / 127;
};
template <>
struct Grouped<Format::kNf4> {
  static constexpr int kBits = 4, kZero = 128;
  static constexpr bool kTable = true, kMinimum = false;
  static constexpr float kValueScale = 1.0f / 127;
};
// Twice an E2M1 value is an integer from -12 to 12: exact.
template <>
struct Grouped<Format::kFp4> {
  static constexpr int kBits = 4, kZero = 128;
  static constexpr bool kTable = true, kMinimum = false;
  static constexpr float kValueScale = 0.5f;
};

// Byte tables of a codebook, each repeated to fill a register so that stray index bits are
// harmless.
struct ByteTables {
  // One plane: round(value / kValueScale) + 128.
  alignas(64) std::uint8_t single[64];
  // Three planes: round(value * (2^23 - 1)) + 2^23 = 65536 high + 256 middle + low. Every entry to
  // 2^-24 of the largest, 0 and +-1 exactly.
  alignas(64) std::uint8_t high[64];
  alignas(64) std::uint8_t middle[64];
  alignas(64) std::uint8_t low[64];
};

inline constexpr double kWideScale = 8388607.0;  // 2^23 - 1

inline ByteTables make_byte_tables(Format format, float value_scale) {
  ByteTables tables;
  const auto codebook = format_info(format).codebook;
  const auto nearest = [](double v) { return static_cast<int>(v < 0 ? v - 0.5 : v + 0.5); };
  for (std::size_t i = 0; i < 64; ++i) {
    const double value = codebook[i % codebook.size()];
    tables.single[i] = static_cast<std::uint8_t>(nearest(value / value_scale) + 128);
    const int wide = nearest(value * kWideScale) + (1 << 23);
    tables.high[i] = static_cast<std::uint8_t>(wide >> 16);
    tables.middle[i] = static_cast<std::uint8_t>(wide >> 8);
    tables.low[i] = static_cast<std::uint8_t>(wide);
  }
  return tables;
}

template <Format F>
const ByteTables& byte_tables() {
  static const ByteTables tables = make_byte_tables(F, Grouped<F>::kValueScale);
  return tables;
}

// Byte operand of quad I: the code itself, or its table entry.
template <Format F>
struct Operand {
  using Facts = Grouped<F>;
  using Codes = Unpack<Facts::kBits>;
  __m512i table;

  LOWBIT_INLINE Operand() {
    if constexpr (Facts::kTable) table = _mm512_load_si512(byte_tables<F>().single);
  }
  template <int I>
  LOWBIT_INLINE __m512i quad(const std::byte* codes, std::int64_t inputs,
                             std::int64_t block) const {
    if constexpr (Facts::kTable) {
      return _mm512_permutexvar_epi8(Codes::template index<I>(codes, inputs, block), table);
    } else {
      return Codes::template quad<I>(codes, inputs, block);
    }
  }
};

}  // namespace
}  // namespace lowbit::cpu
