// Scalar decoding of packed tiles: what every expander is, written without vectors.
#pragma once

#include <cstdint>

#include "cpu/generic/convert.h"
#include "lowbit/format.h"

namespace lowbit::cpu {
namespace {

[[maybe_unused]] inline std::uint32_t load_word(const std::byte* p) {
  std::uint32_t word;
  std::memcpy(&word, p, 4);  // little-endian hosts only, as the whole library
  return word;
}

// The stored code of row r (0..15) and input k of a group whose codes start at `codes` and that
// holds `inputs` inputs.
[[maybe_unused]] inline std::uint32_t code_at(int bits, const std::byte* codes, std::int64_t inputs,
                                              int r, std::int64_t k) {
  const auto byte = [&](std::int64_t i) { return static_cast<std::uint32_t>(codes[i]); };
  const auto plane_bit = [&](const std::byte* plane) {
    const std::int64_t position = k % 4 + 4 * r;
    return (static_cast<std::uint32_t>(plane[k / 4 * 8 + position / 8]) >> (position % 8)) & 1u;
  };
  switch (bits) {
    case 16:
      return byte(k / 2 * 64 + 4 * r + k % 2 * 2) | (byte(k / 2 * 64 + 4 * r + k % 2 * 2 + 1) << 8);
    case 8:
      return byte(k / 4 * 64 + 4 * r + k % 4);
    case 4:
    case 5: {
      const std::uint32_t low = (byte(k / 8 * 64 + 4 * r + k % 4) >> (k % 8 / 4 * 4)) & 15u;
      return bits == 4 ? low : low | (plane_bit(codes + inputs * 8) << 4);
    }
    default: {
      const std::uint32_t low = (byte(k / 16 * 64 + 4 * r + k % 4) >> (k % 16 / 4 * 2)) & 3u;
      return low | (plane_bit(codes + inputs * 4) << 2);
    }
  }
}

// Value of an fp8 code; NaN codes cannot occur in packed weights but decode to NaN.
[[maybe_unused]] inline float fp8_value(bool e4m3, std::uint32_t code) {
  if (!e4m3) return fast_half_to_float(static_cast<std::uint16_t>(code << 8));
  const float sign = (code & 0x80u) != 0 ? -1.0f : 1.0f;
  if ((code & 0x7fu) == 0x7fu) return bits_to_float(0x7fc00000u);
  // Exponent and mantissa moved into float32's fields, then the biases' difference: 127 - 7 = 120.
  return sign * bits_to_float((code & 0x7fu) << 20) * 0x1p120f;
}

// The number that a stored code stands for, before its scale.
[[maybe_unused]] inline float code_value(const FormatInfo& info, std::uint32_t code) {
  switch (info.code_kind) {
    case CodeKind::kInteger:
      return static_cast<float>(static_cast<int>(code) - info.zero_point);
    case CodeKind::kTable:
      return info.codebook[code];
    case CodeKind::kFloat:
      break;
  }
  switch (info.format) {
    case Format::kFp16:
      return fast_half_to_float(static_cast<std::uint16_t>(code));
    case Format::kBf16:
      return bits_to_float(code << 16);
    default:
      return fp8_value(info.format == Format::kFp8E4M3, code);
  }
}

}  // namespace
}  // namespace lowbit::cpu
