// One row per format. Everything that differs between formats is here; sizes, messages, tests and
// the table in the documentation iterate over these rows.
#include "lowbit/format.h"

#include <array>
#include <string>

#include "lowbit/error.h"

namespace lowbit {
namespace {

// Normal quantiles scaled to [-1, 1] with an exact zero: Dettmers et al., QLoRA, appendix E.
constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
// The same construction for three bits (offset 1 - (1/16 + 1/14) / 2).
constexpr float kNf3[8] = {
    -1.0f,
    -0.5350227355957031f,
    -0.2469314038753510f,
    0.0f,
    0.1833375245332718f,
    0.3819939494132996f,
    0.6229856610298157f,
    1.0f,
};
// OCP E2M1 with the sign in bit 3. Code 8 is minus zero: decoded, never produced.
constexpr float kFp4[16] = {
    0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f,
};

constexpr float kLargestBf16 = 3.3895313892515355e38f;  // 0x7f7f

constexpr std::array<FormatInfo, kFormatCount> kFormats = {{
    // format, name, bits, code kind, scale kind, zero point, code min, max, padding, codebook, max
    {Format::kSymInt4, "sym_int4", 4, CodeKind::kInteger, ScaleKind::kGroup, 8, 0, 15, 8, {}, 8},
    {Format::kAsymInt4,
     "asym_int4",
     4,
     CodeKind::kInteger,
     ScaleKind::kGroupMinimum,
     0,
     0,
     15,
     0,
     {},
     15},
    {Format::kSymInt5, "sym_int5", 5, CodeKind::kInteger, ScaleKind::kGroup, 16, 0, 31, 16, {}, 16},
    {Format::kAsymInt5,
     "asym_int5",
     5,
     CodeKind::kInteger,
     ScaleKind::kGroupMinimum,
     0,
     0,
     31,
     0,
     {},
     31},
    {Format::kSymInt8,
     "sym_int8",
     8,
     CodeKind::kInteger,
     ScaleKind::kGroup,
     128,
     1,
     255,
     128,
     {},
     127},
    {Format::kNf3, "nf3", 3, CodeKind::kTable, ScaleKind::kGroup, 0, 0, 7, 3, kNf3, 1},
    {Format::kNf4, "nf4", 4, CodeKind::kTable, ScaleKind::kGroup, 0, 0, 15, 7, kNf4, 1},
    {Format::kFp4, "fp4", 4, CodeKind::kTable, ScaleKind::kGroup, 0, 0, 15, 0, kFp4, 6},
    {Format::kFp8E4M3, "fp8_e4m3", 8, CodeKind::kFloat, ScaleKind::kRow, 0, 0, 0xfe, 0, {}, 448},
    {Format::kFp8E5M2, "fp8_e5m2", 8, CodeKind::kFloat, ScaleKind::kRow, 0, 0, 0xfb, 0, {}, 57344},
    {Format::kFp16, "fp16", 16, CodeKind::kFloat, ScaleKind::kNone, 0, 0, 0xfbff, 0, {}, 65504},
    {Format::kBf16,
     "bf16",
     16,
     CodeKind::kFloat,
     ScaleKind::kNone,
     0,
     0,
     0xff7f,
     0,
     {},
     kLargestBf16},
}};

constexpr bool rows_in_order() {
  for (int i = 0; i < kFormatCount; ++i) {
    if (static_cast<int>(kFormats[i].format) != i) return false;
  }
  return true;
}
static_assert(rows_in_order(), "a format's number is its row");

constexpr std::array<std::string_view, kFormatCount + 1> kNames = {
    "sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "nf3",  "nf4",
    "fp4",      "fp8",       "fp8_e4m3", "fp8_e5m2",  "fp16",     "bf16",
};

std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace

std::span<const FormatInfo> formats() {
  return kFormats;
}

const FormatInfo& format_info(Format format) {
  const int number = static_cast<int>(format);
  if (number >= kFormatCount) {
    throw Error(ErrorCode::kValue,
                "format: expected a number from 0 to " + std::to_string(kFormatCount - 1) +
                    ", got " + std::to_string(number) + "; was it written by a newer version?");
  }
  return kFormats[static_cast<std::size_t>(number)];
}

std::span<const std::string_view> format_names() {
  return kNames;
}

Format parse_format(std::string_view name) {
  if (name == "fp8") return Format::kFp8E5M2;
  for (const FormatInfo& info : kFormats) {
    if (info.name == name) return info.format;
  }
  std::string names;
  for (std::string_view known : kNames) {
    if (!names.empty()) names += ", ";
    names += "'" + std::string(known) + "'";
  }
  throw Error(ErrorCode::kValue,
              "low_bit: expected one of " + names + ", got '" + std::string(name) + "'");
}

std::int64_t code_bytes(Format format, std::int64_t k) {
  // 16 rows x 32 inputs x bits / 8: whole units of 64 bytes, bit planes included.
  return k / kInputBlock * (kTileRows * kInputBlock / 8) * format_info(format).bits;
}

std::int64_t Layout::group_inputs(std::int64_t g) const {
  if (group_size == 0) return k_padded;
  const std::int64_t rest = k_padded - g * group_size;
  return rest < group_size ? rest : group_size;
}

std::int64_t Layout::codes_offset(std::int64_t g) const {
  switch (format_info(format).scale_kind) {
    case ScaleKind::kGroup:
      return g * group_bytes + g / 2 * kUnitBytes;
    case ScaleKind::kGroupMinimum:
      return g * (group_bytes + kUnitBytes);
    case ScaleKind::kRow:
      return kUnitBytes;
    case ScaleKind::kNone:
      break;
  }
  return 0;
}

std::int64_t Layout::scales_offset(std::int64_t g) const {
  switch (format_info(format).scale_kind) {
    case ScaleKind::kGroup: {
      // The block follows the codes of its pair; the second group's scales are its second half.
      const std::int64_t last = (g | 1) < groups ? (g | 1) : g;
      return codes_offset(last) + code_bytes(format, group_inputs(last)) + g % 2 * (kUnitBytes / 2);
    }
    case ScaleKind::kGroupMinimum:
      return codes_offset(g) + code_bytes(format, group_inputs(g));
    case ScaleKind::kRow:
    case ScaleKind::kNone:
      break;
  }
  return 0;
}

std::int64_t Layout::minima_offset(std::int64_t g) const {
  return scales_offset(g) + kUnitBytes / 2;
}

Layout make_layout(Format format, std::int64_t n, std::int64_t k, int group_size) {
  const FormatInfo& info = format_info(format);
  const auto fail = [&info](const std::string& text) {
    throw Error(ErrorCode::kValue, "layout of " + std::string(info.name) + ": " + text);
  };
  if (n < 0 || k < 0) {
    fail("expected sizes >= 0, got n=" + std::to_string(n) + ", k=" + std::to_string(k));
  }
  if (info.grouped()) {
    if (group_size == 0) group_size = kDefaultGroupSize;
    bool known = false;
    for (int size : kGroupSizes) known = known || size == group_size;
    if (!known) fail("expected group_size 32, 64, 128 or 256, got " + std::to_string(group_size));
  } else if (group_size != 0) {
    fail("this format has no groups: expected group_size 0, got " + std::to_string(group_size) +
         "; leave group_size out");
  }

  // With 2^56 weights at most 2^57 bytes are needed (16 bits each; scales and padding are bounded
  // by the limits on n and k), so nothing below can overflow 64 bits. No machine addresses more.
  constexpr std::int64_t kMostWeights = std::int64_t{1} << 56;
  constexpr std::int64_t kLongestSide = std::int64_t{1} << 48;
  if (n > kLongestSide || k > kLongestSide ||
      (k > 0 && round_up(n, kTileRows) > kMostWeights / round_up(k, kInputBlock))) {
    fail(
        "the packed size of n=" + std::to_string(n) + " x k=" + std::to_string(k) +
        " overflows: expected at most 2^56 weights and sides of at most 2^48; is the shape right?");
  }

  Layout layout{};
  layout.format = format;
  layout.group_size = group_size;
  layout.n = n;
  layout.k = k;
  layout.tiles = (n + kTileRows - 1) / kTileRows;
  layout.k_padded = round_up(k, kInputBlock);
  layout.groups = info.grouped() ? (layout.k_padded + group_size - 1) / group_size : 1;
  layout.group_bytes = code_bytes(format, info.grouped() ? group_size : layout.k_padded);
  const std::int64_t codes = code_bytes(format, layout.k_padded);
  switch (info.scale_kind) {
    case ScaleKind::kGroup:
      layout.tile_bytes = codes + (layout.groups + 1) / 2 * kUnitBytes;
      break;
    case ScaleKind::kGroupMinimum:
      layout.tile_bytes = codes + layout.groups * kUnitBytes;
      break;
    case ScaleKind::kRow:
      layout.tile_bytes = codes + kUnitBytes;
      break;
    case ScaleKind::kNone:
      layout.tile_bytes = codes;
      break;
  }
  return layout;
}

}  // namespace lowbit
