// Plain conversions between the activation types and float32. Everything is in an anonymous
// namespace: this file is compiled once per instruction set and no copy may leak into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "lowbit/quantize.h"

namespace lowbit::cpu {
namespace {

[[maybe_unused]] inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Exact, subnormals included: the magnitude is shifted into place and scaled by 2^112, which float
// arithmetic does without rounding; infinity and NaN need their exponent filled by hand.
[[maybe_unused]] inline float fast_half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  std::uint32_t bits = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  return bits_to_float(sign | bits);
}

// Nearest, ties to even; NaN stays NaN.
[[maybe_unused]] inline std::uint16_t fast_float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
    const std::uint32_t sum = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return static_cast<std::uint16_t>(sign | (sum - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

[[maybe_unused]] inline std::uint16_t fast_float_to_bfloat16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline float load_float(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const std::uint16_t half = static_cast<const std::uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? bits_to_float(std::uint32_t{half} << 16)
                                   : fast_half_to_float(half);
}

[[maybe_unused]] inline void store_float(void* data, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<std::uint16_t*>(data)[i] =
        dtype == DType::kBFloat16 ? fast_float_to_bfloat16(value) : fast_float_to_half(value);
  }
}

}  // namespace
}  // namespace lowbit::cpu
