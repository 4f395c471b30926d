// The small float formats: exact decoding, correctly rounded encoding. Scalar and plain; these are
// the definitions that vectorised conversions are tested against.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace lowbit {

// Sign bit, exponent bits, mantissa bits, with subnormals.
struct FloatKind {
  int exponent_bits;
  int mantissa_bits;
  bool ieee_top;  // the highest exponent means infinity and NaN; else (e4m3fn) only all ones is NaN

  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr std::uint32_t sign_bit() const { return 1u << (exponent_bits + mantissa_bits); }
  // The bits of the largest finite magnitude.
  constexpr std::uint32_t largest() const {
    return ieee_top ? (((1u << exponent_bits) - 1) << mantissa_bits) - 1 : sign_bit() - 2;
  }
};

inline constexpr FloatKind kHalfKind{5, 10, true};     // IEEE binary16
inline constexpr FloatKind kBrainKind{8, 7, true};     // bfloat16
inline constexpr FloatKind kFp8E4M3Kind{4, 3, false};  // OCP e4m3fn: no infinity
inline constexpr FloatKind kFp8E5M2Kind{5, 2, true};   // OCP e5m2

// The value of `bits`. Every finite value of every kind is a float64, so nothing is rounded.
inline double decode_float(const FloatKind& kind, std::uint32_t bits) {
  const double sign = (bits & kind.sign_bit()) != 0 ? -1.0 : 1.0;
  const std::uint32_t magnitude = bits & (kind.sign_bit() - 1);
  if (magnitude > kind.largest()) {
    const bool infinite = kind.ieee_top && magnitude == kind.largest() + 1;
    return infinite ? sign * HUGE_VAL : std::nan("");
  }
  const int exponent = static_cast<int>(magnitude >> kind.mantissa_bits);
  const std::uint32_t mantissa = magnitude & ((1u << kind.mantissa_bits) - 1);
  const int lowest = 1 - kind.bias() - kind.mantissa_bits;  // exponent of the smallest subnormal
  if (exponent == 0) return sign * std::ldexp(mantissa, lowest);
  return sign * std::ldexp(mantissa + (1u << kind.mantissa_bits), lowest + exponent - 1);
}

// The bits nearest to `value`, ties to even. Magnitudes that round past the largest finite one give
// infinity, or the largest finite one where `saturate` is set or the kind has no infinity.
inline std::uint32_t encode_float(const FloatKind& kind, double value, bool saturate = false) {
  const std::uint32_t sign = std::signbit(value) ? kind.sign_bit() : 0;
  if (std::isnan(value)) return sign | (kind.sign_bit() - 1);
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  const std::uint32_t beyond = saturate || !kind.ieee_top ? kind.largest() : kind.largest() + 1;
  if (std::isinf(magnitude)) return sign | beyond;
  const int lowest_normal = 1 - kind.bias();
  const int exponent = std::max(std::ilogb(magnitude), lowest_normal);
  // In units of the last place the significand is an integer of mantissa_bits + 1 bits at most, or
  // the next power of two; added (not or-ed) to the exponent field it carries by itself.
  const double units = std::nearbyint(std::ldexp(magnitude, kind.mantissa_bits - exponent));
  const std::int64_t bits =
      (static_cast<std::int64_t>(exponent - lowest_normal) << kind.mantissa_bits) +
      static_cast<std::int64_t>(units);
  return sign | (bits > kind.largest() ? beyond : static_cast<std::uint32_t>(bits));
}

// The one conversion that scalar fall-backs do per element, hence without ldexp.
inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t exponent = bits >> 10 & 31;
  const std::uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t widened = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | widened << 23 | mantissa << 13);
}
inline std::uint16_t float_to_half(float value) {
  return static_cast<std::uint16_t>(encode_float(kHalfKind, value));
}
inline float bfloat16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}
inline std::uint16_t float_to_bfloat16(float value) {
  return static_cast<std::uint16_t>(encode_float(kBrainKind, value));
}

}  // namespace lowbit
