#include "format/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "format/checks.h"
#include "format/floats.h"
#include "lowbit/error.h"
#include "lowbit/pack.h"

namespace lowbit {
namespace {

// Four codes at a time. Shifts stay inside their byte, so the order of bytes does not matter.
std::uint32_t load4(const void* at) {
  std::uint32_t four;
  std::memcpy(&four, at, 4);
  return four;
}
void store4(void* at, std::uint32_t four) {
  std::memcpy(at, &four, 4);
}
constexpr std::uint32_t bytes_of(unsigned value) {
  return 0x01010101u * value;
}

// The plane of highest bits: four bits of word w belong to row r's inputs 4w..4w+3.
void pack_plane(const std::uint8_t* codes, std::int64_t inputs, int r, int bit, std::byte* plane) {
  for (std::int64_t w = 0; w < inputs / 4; ++w) {
    unsigned four = 0;
    for (int b = 0; b < 4; ++b) four |= (codes[4 * w + b] >> bit & 1u) << b;
    plane[8 * w + r / 2] |= static_cast<std::byte>(four << (r % 2 * 4));
  }
}

void unpack_plane(const std::byte* plane, std::int64_t inputs, int r, int bit,
                  std::uint8_t* codes) {
  for (std::int64_t w = 0; w < inputs / 4; ++w) {
    const unsigned four = std::to_integer<unsigned>(plane[8 * w + r / 2]) >> (r % 2 * 4);
    for (int b = 0; b < 4; ++b) {
      codes[4 * w + b] = static_cast<std::uint8_t>(codes[4 * w + b] | (four >> b & 1u) << bit);
    }
  }
}

// Row r's codes of one group into its units, whose planes are zero so far.
void pack_group(const std::uint8_t* codes, int bits, std::int64_t inputs, int r, std::byte* out) {
  std::byte* row = out + 4 * r;
  switch (bits) {
    case 8:
      for (std::int64_t u = 0; u < inputs / 4; ++u) {
        store4(row + u * kUnitBytes, load4(codes + 4 * u));
      }
      return;
    case 3:
      for (std::int64_t u = 0; u < inputs / 16; ++u) {
        std::uint32_t unit = 0;
        for (int part = 0; part < 4; ++part) {
          unit |= (load4(codes + 16 * u + 4 * part) & bytes_of(3)) << (2 * part);
        }
        store4(row + u * kUnitBytes, unit);
      }
      return pack_plane(codes, inputs, r, 2, out + inputs / 16 * kUnitBytes);
    default:
      break;
  }
  for (std::int64_t u = 0; u < inputs / 8; ++u) {
    store4(row + u * kUnitBytes,
           (load4(codes + 8 * u) & bytes_of(15)) | (load4(codes + 8 * u + 4) & bytes_of(15)) << 4);
  }
  if (bits == 5) pack_plane(codes, inputs, r, 4, out + inputs / 8 * kUnitBytes);
}

void unpack_group(const std::byte* in, int bits, std::int64_t inputs, int r, std::uint8_t* codes) {
  const std::byte* row = in + 4 * r;
  switch (bits) {
    case 8:
      for (std::int64_t u = 0; u < inputs / 4; ++u) {
        store4(codes + 4 * u, load4(row + u * kUnitBytes));
      }
      return;
    case 3:
      for (std::int64_t u = 0; u < inputs / 16; ++u) {
        const std::uint32_t unit = load4(row + u * kUnitBytes);
        for (int part = 0; part < 4; ++part) {
          store4(codes + 16 * u + 4 * part, unit >> (2 * part) & bytes_of(3));
        }
      }
      return unpack_plane(in + inputs / 16 * kUnitBytes, inputs, r, 2, codes);
    default:
      break;
  }
  for (std::int64_t u = 0; u < inputs / 8; ++u) {
    const std::uint32_t unit = load4(row + u * kUnitBytes);
    store4(codes + 8 * u, unit & bytes_of(15));
    store4(codes + 8 * u + 4, unit >> 4 & bytes_of(15));
  }
  if (bits == 5) unpack_plane(in + inputs / 8 * kUnitBytes, inputs, r, 4, codes);
}

// ---- checks ----------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& who, const std::string& text) {
  throw Error(ErrorCode::kValue, who + ": " + text);
}

void check_count(const std::string& who, const Layout& layout, const char* part, std::size_t got,
                 std::int64_t expected) {
  if (got == static_cast<std::size_t>(expected)) return;
  fail(who, "expected " + std::to_string(expected) + " " + part + " for " +
                std::string(format_info(layout.format).name) + " [" + std::to_string(layout.n) +
                ", " + std::to_string(layout.k) + "] with group size " +
                std::to_string(layout.group_size) + ", got " + std::to_string(got));
}

template <typename View>
void check_parts(const std::string& who, const Layout& layout, const View& codes) {
  const FormatInfo& info = format_info(layout.format);
  if (info.scale_kind == ScaleKind::kNone) {
    fail(who, "the codes of " + std::string(info.name) +
                  " are the weights themselves; quantize and dequantize keep every bit of them");
  }
  const std::int64_t groups = layout.n * layout.groups;
  check_count(who, layout, "codes", codes.codes.size(), layout.n * layout.k);
  check_count(who, layout, "scales", codes.scales.size(), info.grouped() ? groups : 0);
  check_count(who, layout, "minima", codes.minima.size(),
              info.scale_kind == ScaleKind::kGroupMinimum ? groups : 0);
  check_count(who, layout, "row scales", codes.row_scales.size(),
              info.scale_kind == ScaleKind::kRow ? layout.n : 0);
}

void check_finite(const Layout& layout, const char* part, std::span<const std::uint16_t> halves) {
  for (std::size_t i = 0; i < halves.size(); ++i) {
    if ((halves[i] & 0x7c00) != 0x7c00) continue;
    const auto at = static_cast<std::int64_t>(i);
    fail("pack_codes", std::string(part) + "[" + std::to_string(at / layout.groups) + ", " +
                           std::to_string(at % layout.groups) + "] is " +
                           ((halves[i] & 0x3ff) != 0 ? "nan" : "infinite") +
                           "; every scale and minimum must be a finite fp16 number");
  }
}

[[noreturn]] void throw_bad_code(const Layout& layout, std::span<const std::uint8_t> codes,
                                 const std::array<bool, 256>& valid) {
  const auto bad =
      std::find_if(codes.begin(), codes.end(), [&valid](std::uint8_t c) { return !valid[c]; });
  if (bad == codes.end()) {
    fail("pack_codes", "a code changed while it was read; keep them still until it returns");
  }
  const std::int64_t at = bad - codes.begin();
  const auto first = std::find(valid.begin(), valid.end(), true) - valid.begin();
  const auto last = valid.rend() - std::find(valid.rbegin(), valid.rend(), true) - 1;
  fail("pack_codes",
       "codes[" + std::to_string(at / layout.k) + ", " + std::to_string(at % layout.k) + "] is " +
           std::to_string(*bad) + ", which " + std::string(format_info(layout.format).name) +
           " does not have: its codes are " + std::to_string(first) + " to " +
           std::to_string(last) +
           (format_info(layout.format).code_kind == CodeKind::kFloat ? " without infinities and NaN"
                                                                     : ""));
}

}  // namespace

std::array<bool, 256> valid_codes(const FormatInfo& info) {
  std::array<bool, 256> valid{};
  for (int c = 0; c < 256; ++c) {
    // A float's code_max is its largest negative number: the sign bit does not matter.
    const bool is_float = info.code_kind == CodeKind::kFloat;
    const int code = is_float ? c | 0x80 : c;
    valid[static_cast<std::size_t>(c)] = code >= info.code_min && code <= info.code_max;
  }
  return valid;
}

void pack_tile(const TileRows& rows, const Layout& layout, std::byte* packed_tile) {
  const FormatInfo& info = format_info(layout.format);
  const auto row_of = [](int r) { return static_cast<std::size_t>(r); };
  std::fill_n(packed_tile, layout.tile_bytes, std::byte{0});
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    for (int r = 0; r < kTileRows; ++r) {
      pack_group(rows.codes[row_of(r)] + g * layout.group_size, info.bits, layout.group_inputs(g),
                 r, packed_tile + layout.codes_offset(g));
      const auto put_half = [&](const std::uint16_t* halves, std::int64_t offset) {
        if (halves == nullptr) return;
        const std::uint16_t half = halves[g];
        packed_tile[offset + 2 * r] = static_cast<std::byte>(half & 0xff);
        packed_tile[offset + 2 * r + 1] = static_cast<std::byte>(half >> 8);
      };
      if (info.grouped()) put_half(rows.scales[row_of(r)], layout.scales_offset(g));
      if (info.scale_kind == ScaleKind::kGroupMinimum) {
        put_half(rows.minima[row_of(r)], layout.minima_offset(g));
      }
      if (info.scale_kind == ScaleKind::kRow && rows.row_scales[row_of(r)] != nullptr) {
        const auto bits = std::bit_cast<std::uint32_t>(*rows.row_scales[row_of(r)]);
        for (int b = 0; b < 4; ++b) {
          packed_tile[layout.scales_offset(g) + 4 * r + b] =
              static_cast<std::byte>(bits >> (8 * b) & 0xff);
        }
      }
    }
  }
}

void unpack_row(const std::byte* packed_tile, const Layout& layout, int r, std::uint8_t* codes) {
  const int bits = format_info(layout.format).bits;
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    unpack_group(packed_tile + layout.codes_offset(g), bits, layout.group_inputs(g), r,
                 codes + g * layout.group_size);
  }
}

void pack_codes(const CodesView& codes, const Layout& layout, std::span<std::byte> packed,
                const Threads& threads) {
  check_packed("pack_codes", packed, layout);
  check_parts("pack_codes", layout, codes);
  check_finite(layout, "scales", codes.scales);
  check_finite(layout, "minima", codes.minima);
  for (std::size_t i = 0; i < codes.row_scales.size(); ++i) {
    if (!std::isfinite(codes.row_scales[i])) {
      fail("pack_codes", "row_scales[" + std::to_string(i) + "] is not finite");
    }
  }
  const FormatInfo& info = format_info(layout.format);
  const std::array<bool, 256> valid = valid_codes(info);
  const std::vector<std::uint8_t> padding(static_cast<std::size_t>(layout.k_padded),
                                          static_cast<std::uint8_t>(info.padding_code));
  std::vector<char> bad(static_cast<std::size_t>(layout.tiles), 0);
  threads.run(layout.tiles, [&](std::int64_t tile) {
    TileRows rows{};
    std::vector<std::uint8_t> padded;  // rows that need padding are copied
    if (layout.k != layout.k_padded) {
      padded.assign(static_cast<std::size_t>(kTileRows * layout.k_padded),
                    static_cast<std::uint8_t>(info.padding_code));
    }
    char wrong = 0;
    for (int r = 0; r < kTileRows; ++r) {
      const std::int64_t row = tile * kTileRows + r;
      const auto at = static_cast<std::size_t>(r);
      rows.codes[at] = padding.data();
      if (row >= layout.n) continue;
      const std::uint8_t* own = codes.codes.data() + row * layout.k;
      for (std::int64_t k = 0; k < layout.k; ++k) wrong |= valid[own[k]] ? 0 : 1;
      if (!padded.empty()) {
        own = std::copy_n(own, layout.k, padded.data() + r * layout.k_padded) - layout.k;
      }
      rows.codes[at] = own;
      if (info.grouped()) rows.scales[at] = codes.scales.data() + row * layout.groups;
      if (!codes.minima.empty()) rows.minima[at] = codes.minima.data() + row * layout.groups;
      if (!codes.row_scales.empty()) rows.row_scales[at] = codes.row_scales.data() + row;
    }
    bad[static_cast<std::size_t>(tile)] = wrong;
    pack_tile(rows, layout, packed.data() + tile * layout.tile_bytes);
  });
  if (std::find(bad.begin(), bad.end(), 1) != bad.end()) {
    throw_bad_code(layout, codes.codes, valid);
  }
}

void unpack_codes(std::span<const std::byte> packed, const Layout& layout,
                  const MutableCodesView& codes, const Threads& threads) {
  check_packed("unpack_codes", packed, layout);
  check_parts("unpack_codes", layout, codes);
  threads.run(layout.tiles, [&](std::int64_t tile) {
    const std::byte* from = packed.data() + tile * layout.tile_bytes;
    const auto byte = [from](std::int64_t at) { return std::to_integer<std::uint32_t>(from[at]); };
    const auto half = [&](std::int64_t at) {
      return static_cast<std::uint16_t>(byte(at) | byte(at + 1) << 8);
    };
    std::vector<std::uint8_t> own(static_cast<std::size_t>(layout.k_padded));
    for (int r = 0; r < kTileRows && tile * kTileRows + r < layout.n; ++r) {
      const std::int64_t row = tile * kTileRows + r;
      unpack_row(from, layout, r, own.data());
      std::copy_n(own.data(), layout.k, codes.codes.data() + row * layout.k);
      for (std::int64_t g = 0; g < layout.groups; ++g) {
        const auto at = static_cast<std::size_t>(row * layout.groups + g);
        const std::int64_t scale = layout.scales_offset(g);
        if (!codes.scales.empty()) codes.scales[at] = half(scale + 2 * r);
        if (!codes.minima.empty()) codes.minima[at] = half(layout.minima_offset(g) + 2 * r);
        if (!codes.row_scales.empty()) {
          const std::int64_t low = scale + 4 * r;
          codes.row_scales[at] =
              std::bit_cast<float>(static_cast<std::uint32_t>(half(low)) |
                                   static_cast<std::uint32_t>(half(low + 2)) << 16);
        }
      }
    }
  });
}

}  // namespace lowbit
