// What quantizing means: chooses scales and codes one weight at a time and places every bit by the
// drawing in lowbit/format.h. All arithmetic is IEEE float32 unless it says otherwise.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "format/checks.h"
#include "format/floats.h"
#include "lowbit/linear.h"
#include "lowbit/quantize.h"

#include "reference/reference.h"

namespace lowbit::reference {
namespace {

// The weight as quantizers see it: float32, divided by 2^exponent, rounded once.
float scaled_weight(const MatrixView& weight, std::int64_t row, std::int64_t col, int exponent) {
  const float value = static_cast<float>(element(weight, row, col));
  return static_cast<float>(std::ldexp(static_cast<double>(value), -exponent));
}

struct Extremes {
  float max, min;
  float magnitude() const { return std::fabs(std::fmax(max, -min)); }  // never minus zero
};

Extremes extremes(const std::vector<float>& group) {
  Extremes e{group[0], group[0]};
  for (float w : group) {
    e.max = std::fmax(e.max, w);
    e.min = std::fmin(e.min, w);
  }
  return e;
}

// Minus zero is never stored: the bytes must not depend on the order in which zeros were compared.
std::uint16_t half_without_minus_zero(float value) {
  const std::uint16_t bits = float_to_half(value);
  return (bits & 0x7fff) == 0 ? 0 : bits;
}

struct Scale {
  float scale, minimum;                    // as stored, widened
  std::uint16_t scale_half, minimum_half;  // not for row scales
};

Scale choose_scale(const FormatInfo& info, const std::vector<float>& group) {
  const Extremes e = extremes(group);
  Scale s{};
  if (info.scale_kind == ScaleKind::kRow) {
    s.scale = e.magnitude() / info.value_max;
    return s;
  }
  if (info.scale_kind == ScaleKind::kGroupMinimum) {
    s.scale_half = half_without_minus_zero((e.max - e.min) / info.value_max);
    s.minimum_half = half_without_minus_zero(e.min);
  } else if (info.code_kind == CodeKind::kInteger && info.code_min == 0) {
    // Two's complement reaches one step further below zero: the largest magnitude goes there.
    const float m = e.max > -e.min ? e.max : e.min;
    s.scale_half = half_without_minus_zero(m / -info.value_max);
  } else {
    s.scale_half = half_without_minus_zero(e.magnitude() / info.value_max);
  }
  s.scale = half_to_float(s.scale_half);
  s.minimum = half_to_float(s.minimum_half);
  return s;
}

template <typename T>
void put(std::byte* at, T value) {
  value = little_endian(value);
  std::memcpy(at, &value, sizeof value);
}

void put_bits(std::byte* at, std::uint32_t bits, int shift) {
  *at |= static_cast<std::byte>(bits << shift);
}

// Writes a code into a tile that was zero there.
void put_code(std::byte* tile, const Layout& layout, int r, std::int64_t k, std::uint32_t code) {
  const std::int64_t g = layout.group_size != 0 ? k / layout.group_size : 0;
  const std::int64_t i = k - g * layout.group_size;  // input within the group
  const std::int64_t inputs = layout.group_inputs(g);
  std::byte* codes = tile + layout.codes_offset(g);
  const std::int64_t b = i % 4;
  std::byte* plane = nullptr;  // where the highest bit goes, if apart
  int plane_bit = 0;
  switch (format_info(layout.format).bits) {
    case 16:
      return put(codes + i / 2 * kUnitBytes + 4 * r + i % 2 * 2, static_cast<std::uint16_t>(code));
    case 8:
      return put(codes + i / 4 * kUnitBytes + 4 * r + b, static_cast<std::uint8_t>(code));
    case 4:
    case 5:
      put_bits(codes + i / 8 * kUnitBytes + 4 * r + b, code & 15, static_cast<int>(i % 8 / 4) * 4);
      plane = codes + inputs / 8 * kUnitBytes;
      plane_bit = 4;
      break;
    case 3:
      put_bits(codes + i / 16 * kUnitBytes + 4 * r + b, code & 3, static_cast<int>(i % 16 / 4) * 2);
      plane = codes + inputs / 16 * kUnitBytes;
      plane_bit = 2;
      break;
  }
  const int bit = 4 * r + static_cast<int>(b);  // of the 64-bit word of these four inputs
  if (format_info(layout.format).bits != 4) {
    put_bits(plane + i / 4 * 8 + bit / 8, code >> plane_bit & 1, bit % 8);
  }
}

}  // namespace

std::uint32_t nearest_code(const FormatInfo& info, float t) {
  switch (info.code_kind) {
    case CodeKind::kInteger: {
      const float q = std::nearbyint(t);
      const auto low = static_cast<float>(info.code_min - info.zero_point);
      const auto high = static_cast<float>(info.code_max - info.zero_point);
      return static_cast<std::uint32_t>(static_cast<int>(std::clamp(q, low, high)) +
                                        info.zero_point);
    }
    case CodeKind::kTable: {
      // nf3 and nf4 ascend over all entries; fp4 does so over its first half and mirrors it.
      const bool mirrored = info.codebook[0] == 0;
      const std::size_t entries = info.codebook.size() / (mirrored ? 2 : 1);
      const float x = mirrored ? std::fabs(t) : t;
      std::uint32_t code = 0;
      for (std::uint32_t next = 1; next < entries; ++next) {
        const float midpoint = (info.codebook[next - 1] + info.codebook[next]) / 2;
        if (x > midpoint || (x == midpoint && next % 2 == 0)) code = next;
      }
      return mirrored && t < 0 && code != 0 ? code + static_cast<std::uint32_t>(entries) : code;
    }
    case CodeKind::kFloat:
      break;
  }
  switch (info.format) {
    case Format::kFp16:
      return encode_float(kHalfKind, t);
    case Format::kBf16:
      return encode_float(kBrainKind, t);
    default:
      break;
  }
  const std::uint32_t code = encode_float(
      info.format == Format::kFp8E4M3 ? kFp8E4M3Kind : kFp8E5M2Kind, t, /*saturate=*/true);
  return code == 0x80 ? 0 : code;  // no minus zero
}

void quantize_tile(const MatrixView& weight, const Layout& layout, int exponent, std::int64_t tile,
                   std::byte* packed_tile) {
  const FormatInfo& info = format_info(layout.format);
  std::fill_n(packed_tile, layout.tile_bytes, std::byte{0});
  std::vector<float> group;
  for (int r = 0; r < kTileRows; ++r) {
    const std::int64_t row = tile * kTileRows + r;
    for (std::int64_t g = 0; g < layout.groups; ++g) {
      const std::int64_t first = g * layout.group_size;
      const std::int64_t padded_end = first + layout.group_inputs(g);
      const std::int64_t end = row < layout.n ? std::min(layout.k, padded_end) : first;
      group.clear();
      for (std::int64_t k = first; k < end; ++k) {
        group.push_back(scaled_weight(weight, row, k, exponent));
      }
      Scale s{};  // rows that pad the tile have scale 0
      if (!group.empty() && info.scale_kind != ScaleKind::kNone) s = choose_scale(info, group);
      for (std::int64_t k = first; k < padded_end; ++k) {
        std::uint32_t code = info.padding_code;
        if (k < end && info.scale_kind == ScaleKind::kNone) {
          code = nearest_code(info, group[static_cast<std::size_t>(k - first)]);
        } else if (k < end && s.scale != 0) {
          const float w = group[static_cast<std::size_t>(k - first)];
          code = nearest_code(info, (w - s.minimum) / s.scale);
        }
        put_code(packed_tile, layout, r, k, code);
      }
      if (info.grouped()) put(packed_tile + layout.scales_offset(g) + 2 * r, s.scale_half);
      if (info.scale_kind == ScaleKind::kGroupMinimum) {
        put(packed_tile + layout.minima_offset(g) + 2 * r, s.minimum_half);
      }
      if (info.scale_kind == ScaleKind::kRow) {
        put(packed_tile + layout.scales_offset(g) + 4 * r, s.scale);
      }
    }
  }
}

ScaleRange tile_range(const MatrixView& weight, const Layout& layout, std::int64_t tile) {
  const FormatInfo& info = format_info(layout.format);
  ScaleRange range;
  std::vector<float> group;
  for (std::int64_t row = tile * kTileRows; row < std::min((tile + 1) * kTileRows, layout.n);
       ++row) {
    for (std::int64_t g = 0; g < layout.groups; ++g) {
      const std::int64_t first = g * layout.group_size;
      const std::int64_t end = std::min(layout.k, first + layout.group_inputs(g));
      group.clear();
      for (std::int64_t k = first; k < end; ++k) {
        group.push_back(scaled_weight(weight, row, k, 0));
        range.finite = range.finite && std::isfinite(group.back());
      }
      if (group.empty()) continue;
      const Extremes e = extremes(group);
      if (info.scale_kind == ScaleKind::kGroupMinimum) {
        range.add(e.max - e.min);
        range.add_minimum(e.min);
      } else {
        range.add(e.magnitude());
      }
    }
  }
  return range;
}

int quantize(const MatrixView& weight, const Layout& layout, std::span<std::byte> packed) {
  check_quantize(weight, layout, packed);
  ScaleRange range;
  for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
    range.merge(tile_range(weight, layout, tile));
  }
  if (!range.finite) throw_nonfinite(weight, first_nonfinite(weight, serial_threads()));
  const int exponent = exponent_for(format_info(layout.format), range);
  for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
    quantize_tile(weight, layout, exponent, tile, packed.data() + tile * layout.tile_bytes);
  }
  return exponent;
}

}  // namespace lowbit::reference
