// Packed codes to byte operands: quad I (0..7) of a block of 32 inputs is 16 rows x 4 inputs, one
// byte each, row r in bytes 4r..4r+3: the operand order of vpdpbusd.
#pragma once

#include "cpu/generic/avx512.h"
#include "cpu/generic/normal_float_pair.h"

namespace lowbit::cpu {
namespace {

// Kept in a register: GCC would rather load it again for every use, and Zen 4 loads one a cycle.
LOWBIT_INLINE __m512i load_unit(const std::byte* p) {
  __m512i unit = _mm512_load_si512(reinterpret_cast<const __m512i*>(p));
  __asm__("" : "+v"(unit));
  return unit;
}

// codes: of the group; inputs: in the group; block: number of the block of 32 inputs in the group.
// What quads share is unpacked once per block: plane().
struct NoPlane {};

LOWBIT_INLINE __mmask64 load_bits(const std::byte* p) {
  return *reinterpret_cast<const std::uint64_t*>(p);
}

template <int kBits>
struct Unpack;

template <>
struct Unpack<4> {
  static constexpr std::int64_t kBlockBytes = 256;
  using Plane = NoPlane;
  LOWBIT_INLINE static Plane plane(const std::byte*, std::int64_t, std::int64_t) { return {}; }
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t block, Plane plane) {
    return _mm512_and_si512(index<I>(codes, block, plane), _mm512_set1_epi8(15));
  }
  // The code in the low four bits, anything above: enough for a table repeated four times.
  template <int I>
  LOWBIT_INLINE static __m512i index(const std::byte* codes, std::int64_t block, Plane) {
    const __m512i unit = load_unit(codes + block * kBlockBytes + I / 2 * 64);
    return I % 2 == 0 ? unit : _mm512_srli_epi16(unit, 4);
  }
};

template <>
struct Unpack<5> {
  static constexpr std::int64_t kBlockBytes = 320;
  using Plane = const std::byte*;
  LOWBIT_INLINE static Plane plane(const std::byte* codes, std::int64_t inputs,
                                   std::int64_t block) {
    return codes + inputs * 8 + block * 64;
  }
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t block, Plane plane) {
    const __m512i low = Unpack<4>::quad<I>(codes, block, {});
    return _mm512_mask_add_epi8(low, load_bits(plane + I * 8), low, _mm512_set1_epi8(16));
  }
};

// A mask register from memory for each quad would cost as much as a vpdpbusd on Zen 4. Instead the
// plane of third bits is turned once per block: its bytes by a permutation, then its bits by GFNI,
// so that byte p holds the bits of all eight quads; two quads at a time they join their low bits.
template <>
struct Unpack<3> {
  static constexpr std::int64_t kBlockBytes = 192;
  // Quads 0 and 2, 1 and 3, 4 and 6, 5 and 7: codes in bits 0..2 and 4..6 of every byte.
  struct Plane {
    __m512i pairs[4];
  };
  LOWBIT_INLINE static Plane plane(const std::byte* codes, std::int64_t inputs,
                                   std::int64_t block) {
    // Byte 8 l + 7 - i is byte l of the word that goes to bit i: words 5 4 0 1 7 6 2 3.
    const __m512i order = _mm512_set_epi64(
        0x2f27070f3f37171f, 0x2e26060e3e36161e, 0x2d25050d3d35151d, 0x2c24040c3c34141c,
        0x2b23030b3b33131b, 0x2a22020a3a32121a, 0x2921010939311119, 0x2820000838301018);
    const __m512i unit = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201));
    const __m512i words =
        _mm512_permutexvar_epi8(order, load_unit(codes + inputs * 4 + block * 64));
    const __m512i bits = _mm512_gf2p8affine_epi64_epi8(unit, words, 0);
    const __m512i low0 = load_unit(codes + block * 128), low1 = load_unit(codes + block * 128 + 64);
    return {{join(bits, low0), join(_mm512_srli_epi16(bits, 1), _mm512_srli_epi16(low0, 2)),
             join(_mm512_slli_epi16(bits, 1), low1),
             join(_mm512_slli_epi16(bits, 2), _mm512_srli_epi16(low1, 2))}};
  }
  // The code in the low three bits, anything above: enough for a table repeated eight times.
  template <int I>
  LOWBIT_INLINE static __m512i index(const std::byte*, std::int64_t, const Plane& plane) {
    const __m512i pair = plane.pairs[I / 4 * 2 + I % 2];
    return I % 4 < 2 ? pair : _mm512_srli_epi16(pair, 4);
  }
  // Bits 2 and 6 of `third`, the others of `low`. (The operand that is overwritten is one that
  // nobody needs any more.)
  LOWBIT_INLINE static __m512i join(__m512i third, __m512i low) {
    return _mm512_ternarylogic_epi32(third, _mm512_set1_epi8(0x44), low, 0xe2);
  }
};

template <>
struct Unpack<8> {
  static constexpr std::int64_t kBlockBytes = 512;
  using Plane = NoPlane;
  LOWBIT_INLINE static Plane plane(const std::byte*, std::int64_t, std::int64_t) { return {}; }
  template <int I>
  LOWBIT_INLINE static __m512i quad(const std::byte* codes, std::int64_t block, Plane) {
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

// Bytes of a codebook, round(value / kValueScale) + 128, repeated to fill a register so that stray
// index bits are harmless.
struct ByteTables {
  alignas(64) std::uint8_t single[64];
};

inline ByteTables make_byte_tables(Format format, float value_scale) {
  ByteTables tables;
  const auto codebook = format_info(format).codebook;
  const auto nearest = [](double v) { return static_cast<int>(v < 0 ? v - 0.5 : v + 0.5); };
  for (std::size_t i = 0; i < 64; ++i) {
    const double value = codebook[i % codebook.size()];
    tables.single[i] = static_cast<std::uint8_t>(nearest(value / value_scale) + 128);
  }
  return tables;
}

template <Format F>
const ByteTables& byte_tables() {
  static const ByteTables tables = make_byte_tables(F, Grouped<F>::kValueScale);
  return tables;
}

// A NormalFloat's two bytes.
struct PairTables {
  alignas(64) std::uint8_t first[64];
  alignas(64) std::uint8_t second[64];
};

template <Format F>
const PairTables& pair_tables() {
  static const PairTables tables = [] {
    using Pair = NormalFloatPair<F>;
    constexpr std::size_t kEntries = std::size(Pair::first);
    PairTables made;
    for (std::size_t i = 0; i < 64; ++i) {
      made.first[i] = static_cast<std::uint8_t>(Pair::first[i % kEntries] + kPairZero);
      made.second[i] = static_cast<std::uint8_t>(Pair::second[i % kEntries] + kPairZero);
    }
    return made;
  }();
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
  LOWBIT_INLINE __m512i quad(const std::byte* codes, std::int64_t block,
                             const typename Codes::Plane& plane) const {
    if constexpr (Facts::kTable) {
      return _mm512_permutexvar_epi8(Codes::template index<I>(codes, block, plane), table);
    } else {
      return Codes::template quad<I>(codes, block, plane);
    }
  }
};

}  // namespace
}  // namespace lowbit::cpu
