// What a packed matrix means: the inverse of quantize.cpp's bit placement, and values in float64,
// where scale * code + minimum is exact.
#include <cmath>
#include <cstring>

#include "format/checks.h"
#include "format/floats.h"
#include "lowbit/linear.h"
#include "reference/reference.h"

namespace lowbit::reference {
namespace {

template <typename T>
T get(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return little_endian(value);
}

}  // namespace

std::uint32_t code_at(const std::byte* packed_tile, const Layout& layout, int r, std::int64_t k) {
  const std::int64_t g = layout.group_size != 0 ? k / layout.group_size : 0;
  const std::int64_t i = k - g * layout.group_size;  // input within the group
  const std::int64_t inputs = layout.group_inputs(g);
  const std::byte* codes = packed_tile + layout.codes_offset(g);
  const std::int64_t b = i % 4;
  const int bit = 4 * r + static_cast<int>(b);  // in the bit plane's word of these four inputs
  const auto byte = [](const std::byte* at) { return std::to_integer<std::uint32_t>(*at); };
  const auto plane_bit = [&](const std::byte* plane) {
    return byte(plane + i / 4 * 8 + bit / 8) >> (bit % 8) & 1;
  };
  switch (format_info(layout.format).bits) {
    case 16:
      return get<std::uint16_t>(codes + i / 2 * kUnitBytes + 4 * r + i % 2 * 2);
    case 8:
      return byte(codes + i / 4 * kUnitBytes + 4 * r + b);
    case 3:
      return (byte(codes + i / 16 * kUnitBytes + 4 * r + b) >> (i % 16 / 4 * 2) & 3) |
             plane_bit(codes + inputs / 16 * kUnitBytes) << 2;
    default:
      break;
  }
  const std::uint32_t low = byte(codes + i / 8 * kUnitBytes + 4 * r + b) >> (i % 8 / 4 * 4) & 15;
  if (format_info(layout.format).bits == 4) return low;
  return low | plane_bit(codes + inputs / 8 * kUnitBytes) << 4;
}

double code_value(const FormatInfo& info, std::uint32_t code) {
  switch (info.code_kind) {
    case CodeKind::kInteger:
      return static_cast<double>(code) - info.zero_point;
    case CodeKind::kTable:
      return info.codebook[code];
    case CodeKind::kFloat:
      break;
  }
  switch (info.format) {
    case Format::kFp8E4M3:
      return decode_float(kFp8E4M3Kind, code);
    case Format::kFp8E5M2:
      return decode_float(kFp8E5M2Kind, code);
    case Format::kFp16:
      return decode_float(kHalfKind, code);
    default:
      return decode_float(kBrainKind, code);
  }
}

double weight_at(const std::byte* packed_tile, const Layout& layout, int exponent, int r,
                 std::int64_t k) {
  const FormatInfo& info = format_info(layout.format);
  const double value = code_value(info, code_at(packed_tile, layout, r, k));
  const std::int64_t g = layout.group_size != 0 ? k / layout.group_size : 0;
  double scale = 1;
  double minimum = 0;
  if (info.scale_kind == ScaleKind::kRow) {
    scale = get<float>(packed_tile + layout.scales_offset(g) + 4 * r);
  } else if (info.grouped()) {
    scale = half_to_float(get<std::uint16_t>(packed_tile + layout.scales_offset(g) + 2 * r));
    if (info.scale_kind == ScaleKind::kGroupMinimum) {
      minimum = half_to_float(get<std::uint16_t>(packed_tile + layout.minima_offset(g) + 2 * r));
    }
  }
  return std::ldexp(scale * value + minimum, exponent);
}

void dequantize(std::span<const std::byte> packed, const Layout& layout, int exponent,
                const MutableMatrixView& out) {
  check_dequantize(packed, layout, out);
  for (std::int64_t row = 0; row < layout.n; ++row) {
    const std::byte* tile = packed.data() + row / kTileRows * layout.tile_bytes;
    const int r = static_cast<int>(row % kTileRows);
    for (std::int64_t k = 0; k < layout.k; ++k) {
      store_weight(out, row, k, weight_at(tile, layout, exponent, r, k));
    }
  }
}

}  // namespace lowbit::reference
