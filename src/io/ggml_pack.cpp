// Between ggml's blocks and our formats without rounding. Both have the same codes and fp16 scales;
// only their places differ, the sign that Q8_0's scale may have, and MXFP4's scales, which are
// powers of two further apart than fp16 reaches and then share an exponent.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <climits>
#include <cmath>
#include <string>
#include <vector>

#include "format/checks.h"
#include "format/floats.h"
#include "format/pack.h"
#include "io/ggml_blocks.h"
#include "lowbit/error.h"

namespace lowbit {
namespace {

using ggml::Byte;
using ggml::load16;

constexpr int kLargestBlock = 256;

// One block as codes of its exact format.
struct Codes {
  Byte* codes;  // block_elems
  std::uint16_t scale = 0, minimum = 0;
};

bool finite(std::uint16_t half) {
  return (half & 0x7c00) != 0x7c00;
}

// MXFP4: the scale's power of two; E2M1 itself, without ggml's factor of 2.
int mx_power(Byte e8m0) {
  return e8m0 - 127;
}
constexpr int kMostMxPower = 125;  // 6 * 2^126 is no float32

bool all_zero(const Byte* codes) {
  return std::all_of(codes, codes + 32, [](Byte code) { return (code & 7) == 0; });
}

std::uint16_t half_of_power(int power) {
  return static_cast<std::uint16_t>(power >= -14 ? (power + 15) << 10 : 1 << (power + 24));
}

// False if the block has no lossless counterpart.
bool read_block(std::uint32_t type, const Byte* b, int exponent, Codes& out) {
  const auto fives = [&](const Byte* at) {
    ggml::read_nibbles(at + 4, 16, out.codes);
    const std::uint32_t high = ggml::load32(at);
    for (int i = 0; i < 32; ++i) out.codes[i] |= static_cast<Byte>((high >> i & 1) << 4);
  };
  switch (type) {
    case 2:  // Q4_0
      ggml::read_nibbles(b + 2, 16, out.codes);
      out.scale = load16(b);
      break;
    case 3:  // Q4_1
      ggml::read_nibbles(b + 4, 16, out.codes);
      out.scale = load16(b);
      out.minimum = load16(b + 2);
      break;
    case 6:  // Q5_0
      fives(b + 2);
      out.scale = load16(b);
      break;
    case 7:  // Q5_1
      fives(b + 4);
      out.scale = load16(b);
      out.minimum = load16(b + 2);
      break;
    case 8: {  // Q8_0: ours has scales of at least 0
      out.scale = load16(b) & 0x7fff;
      const bool negative = (load16(b) & 0x8000) != 0;
      for (int i = 0; i < 32; ++i) {
        const int code = static_cast<std::int8_t>(b[2 + i]);
        if (code == -128) return false;
        out.codes[i] = static_cast<Byte>((negative ? -code : code) + 128);
      }
      break;
    }
    case 34:  // TQ1_0
    case 35:  // TQ2_0
      type == 34 ? ggml::read_tq1_codes(b, out.codes) : ggml::read_tq2_codes(b, out.codes);
      for (int i = 0; i < 256; ++i) out.codes[i] = static_cast<Byte>(out.codes[i] + 7);
      out.scale = load16(b + (type == 34 ? 52 : 64));
      break;
    default:  // MXFP4
      ggml::read_nibbles(b + 1, 16, out.codes);
      out.scale = half_of_power(all_zero(out.codes) ? 0 : mx_power(b[0]) - exponent);
      break;
  }
  return finite(out.scale) && finite(out.minimum);
}

// The exponent under which all scales of an MXFP4 matrix are fp16 numbers, if there is one.
std::optional<int> mx_exponent(const GgmlMatrix& matrix) {
  int low = INT_MAX, high = INT_MIN;
  const Byte* blocks = ggml::bytes_of(matrix.blocks.data());
  for (std::size_t at = 0; at < matrix.blocks.size(); at += 17) {
    Byte codes[32];
    ggml::read_nibbles(blocks + at + 1, 16, codes);
    if (all_zero(codes)) continue;
    low = std::min(low, mx_power(blocks[at]));
    high = std::max(high, mx_power(blocks[at]));
  }
  if (high > kMostMxPower) return std::nullopt;
  if (low >= -14 && high <= 15) return 0;  // also where every weight is zero
  if (low == INT_MAX) return 0;
  const int exponent = low - (high - 14) >= -24 ? high - 14 : high - 15;
  return low - exponent >= -24 ? std::optional(exponent) : std::nullopt;
}

// F16 and BF16: the codes are the weights.
std::optional<int> pack_elements(const GgmlMatrix& matrix, std::span<const std::int64_t> rows,
                                 const Layout& layout, std::span<std::byte> packed,
                                 const Threads& threads) {
  // Gathered rows, in the byte order of this machine.
  std::vector<std::uint16_t> own(static_cast<std::size_t>(layout.n * layout.k));
  const Byte* blocks = ggml::bytes_of(matrix.blocks.data());
  threads.run(layout.n, [&](std::int64_t i) {
    const std::int64_t from = rows.empty() ? i : rows[static_cast<std::size_t>(i)];
    for (std::int64_t k = 0; k < layout.k; ++k) {
      own[static_cast<std::size_t>(i * layout.k + k)] = load16(blocks + 2 * (from * layout.k + k));
    }
  });
  const DType dtype = layout.format == Format::kFp16 ? DType::kFloat16 : DType::kBFloat16;
  const MatrixView view{own.data(), dtype, layout.n, layout.k, layout.k, 1};
  if (first_nonfinite(view, threads) >= 0) return std::nullopt;
  return quantize(view, layout, packed, threads);
}

void check_exact(const char* who, const GgmlTypeInfo& type, const Layout& layout,
                 std::int64_t rows) {
  const auto fail = [who](const std::string& text) {
    throw Error(ErrorCode::kValue, std::string(who) + ": " + text);
  };
  if (!type.exact) fail(std::string(type.name) + " has no exact counterpart among the formats");
  if (layout.format != *type.exact) {
    fail(std::string(type.name) + " goes with " + std::string(format_info(*type.exact).name) +
         ", got " + std::string(format_info(layout.format).name));
  }
  if (layout.n != rows) {
    fail("expected a layout of " + std::to_string(rows) + " rows, got " + std::to_string(layout.n));
  }
}

}  // namespace

std::optional<int> ggml_pack(const GgmlMatrix& matrix, std::span<const std::int64_t> rows,
                             const Layout& layout, std::span<std::byte> packed,
                             const Threads& threads) {
  ggml::check_matrix("ggml_pack", matrix, rows);
  check_packed("ggml_pack", packed, layout);
  const GgmlTypeInfo& type = ggml_type_info(matrix.type);
  check_exact("ggml_pack", type, layout,
              rows.empty() ? matrix.n : static_cast<std::int64_t>(rows.size()));
  if (layout.k != matrix.k || layout.group_size != type.exact_group_size) {
    throw Error(ErrorCode::kValue,
                "ggml_pack: expected a layout of " + std::to_string(matrix.k) +
                    " inputs with group size " + std::to_string(type.exact_group_size) + ", got " +
                    std::to_string(layout.k) + " and " + std::to_string(layout.group_size));
  }
  if (type.block_elems == 1) return pack_elements(matrix, rows, layout, packed, threads);
  const bool is_mx = *type.exact == Format::kFp4;
  const std::optional<int> exponent = is_mx ? mx_exponent(matrix) : 0;
  if (!exponent) return std::nullopt;

  std::atomic<bool> lossless = true;
  threads.run(layout.tiles, [&](std::int64_t tile) {
    std::vector<Byte> codes(static_cast<std::size_t>(kTileRows * layout.k),
                            static_cast<Byte>(format_info(layout.format).padding_code));
    std::vector<std::uint16_t> scales(static_cast<std::size_t>(2 * kTileRows * layout.groups));
    TileRows tile_rows{};
    for (int r = 0; r < kTileRows; ++r) {
      const auto at = static_cast<std::size_t>(r);
      Byte* own = codes.data() + r * layout.k;
      std::uint16_t* own_scales = scales.data() + 2 * r * layout.groups;
      tile_rows.codes[at] = own;
      const std::int64_t row = tile * kTileRows + r;
      if (row >= layout.n) continue;
      tile_rows.scales[at] = own_scales;
      tile_rows.minima[at] = own_scales + layout.groups;
      const std::int64_t from = rows.empty() ? row : rows[static_cast<std::size_t>(row)];
      const Byte* block =
          ggml::bytes_of(matrix.blocks.data()) + from * layout.groups * type.block_bytes;
      for (std::int64_t g = 0; g < layout.groups; ++g) {
        Codes one{own + g * type.block_elems};
        if (!read_block(type.number, block + g * type.block_bytes, *exponent, one)) {
          lossless = false;
          return;
        }
        own_scales[g] = one.scale;
        own_scales[layout.groups + g] = one.minimum;
      }
    }
    pack_tile(tile_rows, layout, packed.data() + tile * layout.tile_bytes);
  });
  return lossless ? exponent : std::nullopt;
}

namespace {

// scale * 2^exponent as a half, if it is one.
std::optional<std::uint16_t> scaled_half(std::uint16_t half, int exponent) {
  if (exponent == 0) return half;
  const double value = std::ldexp(static_cast<double>(half_to_float(half)), exponent);
  const auto bits = static_cast<std::uint16_t>(encode_float(kHalfKind, value));
  if (!finite(bits) || static_cast<double>(half_to_float(bits)) != value) return std::nullopt;
  return bits;
}

void put16(Byte* at, std::uint16_t value) {
  at[0] = static_cast<Byte>(value & 0xff);
  at[1] = static_cast<Byte>(value >> 8);
}

void put_nibbles(const Byte* codes, Byte* at) {
  for (int j = 0; j < 16; ++j)
    at[j] = static_cast<Byte>((codes[j] & 15) | (codes[j + 16] & 15) << 4);
}

void put_fives(const Byte* codes, Byte* at) {
  std::uint32_t high = 0;
  for (int i = 0; i < 32; ++i) high |= static_cast<std::uint32_t>(codes[i] >> 4 & 1) << i;
  put16(at, static_cast<std::uint16_t>(high & 0xffff));
  put16(at + 2, static_cast<std::uint16_t>(high >> 16));
  put_nibbles(codes, at + 4);
}

bool write_mx(Codes in, int exponent, Byte* b) {
  const float scale = std::fabs(half_to_float(in.scale));
  const Byte flip = (in.scale & 0x8000) != 0 ? 8 : 0;
  int power = 0;
  if (scale == 0 || all_zero(in.codes)) {
    std::fill_n(in.codes, 32, Byte{0});
  } else {
    int twice = 0;
    if (std::frexp(scale, &twice) != 0.5f) return false;
    power = twice - 1 + exponent;
    if (power < -127 || power > kMostMxPower) return false;
    for (int i = 0; i < 32; ++i) in.codes[i] ^= flip;
  }
  b[0] = static_cast<Byte>(power + 127);
  put_nibbles(in.codes, b + 1);
  return true;
}

// The inverse of read_block for blocks of 32.
bool write_block(std::uint32_t type, const Codes& in, int exponent, Byte* b) {
  if (type == 39) return write_mx(in, exponent, b);
  const std::optional<std::uint16_t> scale = scaled_half(in.scale, exponent);
  const std::optional<std::uint16_t> minimum = scaled_half(in.minimum, exponent);
  if (!scale || !minimum) return false;
  put16(b, *scale);
  switch (type) {
    case 2:
      put_nibbles(in.codes, b + 2);
      break;
    case 3:
      put16(b + 2, *minimum);
      put_nibbles(in.codes, b + 4);
      break;
    case 6:
      put_fives(in.codes, b + 2);
      break;
    case 7:
      put16(b + 2, *minimum);
      put_fives(in.codes, b + 4);
      break;
    default:  // Q8_0
      for (int i = 0; i < 32; ++i) b[2 + i] = static_cast<Byte>(in.codes[i] - 128);
      break;
  }
  return true;
}

}  // namespace

bool ggml_unpack(std::span<const std::byte> packed, const Layout& layout, int exponent,
                 std::span<const std::int64_t> rows, std::uint32_t type_number,
                 std::span<std::byte> blocks, const Threads& threads) {
  check_packed("ggml_unpack", packed, layout);
  const GgmlTypeInfo& type = ggml_type_info(type_number);
  const std::int64_t count = rows.empty() ? layout.n : static_cast<std::int64_t>(rows.size());
  check_exact("ggml_unpack", type, layout, layout.n);
  if (type.block_elems > 32) {
    throw Error(ErrorCode::kValue,
                "ggml_unpack: " + std::string(type.name) + " is read, but not written");
  }
  // check_matrix wants the rows of what is read: here they index the packed matrix.
  ggml::check_matrix("ggml_unpack", {blocks, type_number, count, layout.k}, {});
  for (const std::int64_t row : rows) {
    if (row < 0 || row >= layout.n) {
      throw Error(ErrorCode::kValue, "ggml_unpack: expected rows from 0 to " +
                                         std::to_string(layout.n - 1) + ", got " +
                                         std::to_string(row));
    }
  }
  auto* out = reinterpret_cast<Byte*>(blocks.data());
  if (type.block_elems == 1 && exponent != 0) return false;
  const std::int64_t row_bytes = layout.k / type.block_elems * type.block_bytes;
  std::atomic<bool> lossless = true;
  threads.run(count, [&](std::int64_t i) {
    const std::int64_t row = rows.empty() ? i : rows[static_cast<std::size_t>(i)];
    const std::byte* tile = packed.data() + row / kTileRows * layout.tile_bytes;
    const int r = static_cast<int>(row % kTileRows);
    Byte* to = out + i * row_bytes;
    const auto half = [tile](std::int64_t at) { return load16(ggml::bytes_of(tile + at)); };
    if (type.block_elems == 1) {
      for (std::int64_t k = 0; k < layout.k; ++k) {
        put16(to + 2 * k, half(k / 2 * kUnitBytes + 4 * r + k % 2 * 2));
      }
      return;
    }
    std::vector<Byte> codes(static_cast<std::size_t>(layout.k_padded));
    unpack_row(tile, layout, r, codes.data());
    const bool minima = format_info(layout.format).scale_kind == ScaleKind::kGroupMinimum;
    for (std::int64_t b = 0; b < layout.k / 32; ++b) {
      const std::int64_t g = 32 * b / layout.group_size;
      Codes one{codes.data() + 32 * b, half(layout.scales_offset(g) + 2 * r)};
      if (minima) one.minimum = half(layout.minima_offset(g) + 2 * r);
      if (!write_block(type.number, one, exponent, to + b * type.block_bytes)) {
        lossless = false;
        return;
      }
    }
  });
  return lossless;
}

}  // namespace lowbit
