// The low-bit formats: one row of facts each, and where every byte of a packed matrix lies.
// The byte layouts are drawn in docs/formats.md; everything else iterates over the table here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace lowbit {

// The numbers are part of the operators' schemas: append, never reorder.
enum class Format : std::uint8_t {
  kSymInt4 = 0,
  kAsymInt4 = 1,
  kSymInt5 = 2,
  kAsymInt5 = 3,
  kSymInt8 = 4,
  kNf3 = 5,
  kNf4 = 6,
  kFp4 = 7,
  kFp8E4M3 = 8,
  kFp8E5M2 = 9,
  kFp16 = 10,
  kBf16 = 11,
};
inline constexpr int kFormatCount = 12;  // 13 names: "fp8" is another name of fp8_e5m2

// How a stored code becomes a number (before its scale).
enum class CodeKind : std::uint8_t {
  kInteger,  // code - zero_point
  kTable,    // codebook[code]
  kFloat,    // the code's own bits are a float: e4m3fn, e5m2, fp16, bf16
};

// What is stored beside the codes.
enum class ScaleKind : std::uint8_t {
  kGroup,         // fp16 scale per group:                     w = s * value
  kGroupMinimum,  // fp16 scale and fp16 minimum per group:    w = s * value + m
  kRow,           // fp32 scale per output row:                w = s * value
  kNone,          // the code is the weight
};

struct FormatInfo {
  Format format;
  std::string_view name;  // the documented low_bit name
  int bits;               // bits per code: 3, 4, 5, 8 or 16
  CodeKind code_kind;
  ScaleKind scale_kind;
  int zero_point;              // kInteger: stored code of the value 0 (sym: 8, 16, 128; asym: 0)
  int code_min, code_max;      // stored codes a quantizer may produce
  std::uint16_t padding_code;  // the stored code that fills padding: decodes to zero
  std::span<const float> codebook;  // kTable: 2^bits entries, ascending for nf3 and nf4; else empty
  float value_max;                  // largest magnitude of value(code): the absmax maps to it

  bool grouped() const {
    return scale_kind == ScaleKind::kGroup || scale_kind == ScaleKind::kGroupMinimum;
  }
};

std::span<const FormatInfo> formats();             // kFormatCount rows, in the order of Format
const FormatInfo& format_info(Format format);      // throws Error(kValue) for a number out of range
std::span<const std::string_view> format_names();  // the 13 documented names, in documented order
Format parse_format(std::string_view name);        // throws Error(kValue) listing all 13 names

inline constexpr int kTileRows = 16;    // output rows per row tile
inline constexpr int kUnitBytes = 64;   // codes come in units of 64 bytes
inline constexpr int kInputBlock = 32;  // inputs are padded to a multiple of this
inline constexpr int kDefaultGroupSize = 64;
inline constexpr int kGroupSizes[] = {32, 64, 128, 256};

// Geometry of one packed matrix of N outputs x K inputs. A row tile is 16 output rows times all
// inputs, stored as one sequential stream; the packed matrix is `tiles` row tiles of `tile_bytes`,
// every one a multiple of 64 bytes.
//
// Inside a row tile:
//   kGroup         for each pair of groups: codes(g), codes(g+1), 64-byte scale block
//                  {16 fp16 scales of g, 16 fp16 scales of g+1}; a lone last group has its codes
//                  and a block whose second half is zero
//   kGroupMinimum  for each group: codes(g), 64-byte block {16 fp16 scales, 16 fp16 minima}
//   kRow           64-byte block {16 fp32 scales}, then the codes of all inputs
//   kNone          the codes of all inputs
// Codes of a group of k inputs (k a multiple of 32; the last group may be short):
//   16-bit         units of 16 rows x 2 k: row r owns bytes 4r..4r+3, little-endian codes k, k+1
//   8-bit          units of 16 rows x 4 k: row r owns bytes 4r..4r+3, byte 4r+b holds k = b
//   4-bit          units of 16 rows x 8 k: byte 4r+b holds k = b low nibble, k = 4+b high nibble
//   5-bit          all 4-bit units (low four bits), then the plane of fifth bits: 8 bytes per
//                  16 rows x 4 k, bit (4r+b) of the little-endian 64-bit word belongs to k = b
//   3-bit          2-bit units of 16 rows x 16 k (low two bits): byte 4r+b holds k = b, 4+b, 8+b,
//                  12+b from its lowest bits up; then the plane of third bits as for 5-bit
struct Layout {
  Format format;
  int group_size;            // 32, 64, 128 or 256; 0 for kRow and kNone
  std::int64_t n, k;         // logical outputs and inputs
  std::int64_t tiles;        // ceil(n / 16)
  std::int64_t k_padded;     // k rounded up to a multiple of 32
  std::int64_t groups;       // ceil(k / group_size); 1 for kRow and kNone
  std::int64_t tile_bytes;   // bytes of one row tile
  std::int64_t group_bytes;  // code bytes of a full group (kRow, kNone: of all inputs)

  std::int64_t bytes() const { return tiles * tile_bytes; }
  // Padded inputs in group g: group_size, fewer in a short last group, k_padded if not grouped.
  std::int64_t group_inputs(std::int64_t g) const;
  // Byte offsets inside a row tile.
  std::int64_t codes_offset(std::int64_t g) const;
  std::int64_t scales_offset(std::int64_t g) const;  // 16 fp16 (kRow: 16 fp32); not for kNone
  std::int64_t minima_offset(std::int64_t g) const;  // 16 fp16; kGroupMinimum only
};

// Code bytes of 16 rows x k inputs (k a multiple of 32).
std::int64_t code_bytes(Format format, std::int64_t k);

// group_size 0 means the default (64 where the format has groups). Throws Error(kValue) for a
// group size outside kGroupSizes, for one given to a format without groups, for negative sizes and
// for sizes whose byte count would overflow.
Layout make_layout(Format format, std::int64_t n, std::int64_t k, int group_size = 0);

}  // namespace lowbit
