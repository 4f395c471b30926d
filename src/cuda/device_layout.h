// Where a code lies in memory: in the canonical tile (docs/formats.md) and in the order the CUDA
// kernels read. The device order is a permutation of the canonical bits inside each row tile, so
// that moving a weight to a GPU and back gives the same bytes. Plain C++: the tests walk every bit
// of it without a GPU.
//
// Device order of one row tile (16 outputs x all inputs), tile_bytes as in the canonical layout:
//   kGroup, kGroupMinimum   codes of all blocks, then the scales of all groups, then zero padding
//   kRow                    64 bytes of fp32 scales as they were, then the codes of all blocks
//   kNone                   16 x k_padded row-major, so that all tiles are one row-major matrix
//
// A block is 16 outputs x 64 inputs (32 in a last half block), stored lane by lane in the order in
// which the 32 lanes of a warp hold the A operand of mma.m16n8k16 (and, row tile per warp, of
// wgmma.m64nNk16): one 16-byte shared-memory load per lane feeds four multiplications. In k-step j
// (16 inputs) lane 4g+t owns four pairs
//   pair 0: row g,   k 2t, 2t+1        pair 2: row g,   k 2t+8, 2t+9
//   pair 1: row g+8, k 2t, 2t+1        pair 3: row g+8, k 2t+8, 2t+9
// Inside a lane (c = 4j + pair counts the pairs, h = 0, 1 the half of a pair):
//   int4   word j:                 nibble pair + 4h   (one mask yields both halves, 16 bits apart)
//   lut4   word j:                 nibble 2 pair + h  (a byte is an index into a table of pairs)
//   8-bit  word 2j + pair/2:       byte (pair & 1) + 2h; words 0..3 of all lanes, then words 4..7
//   int5   as int4, then a plane:  bit c + 16h of one word per lane (half block: c + 8h of 16 bits)
//   lut3   three words per lane:   pair c < 15 is six bits at 6 (c % 5) of word c / 5; pair 15 is
//          the top two bits of the three; two words of all lanes, then the third of all lanes.
//          Half block: one word and 16 bits per lane, see bit_of()
// Scales of group G: half2 {row g, row g+8} for g = 0..7; with minima: {s g, s g+8, m g, m g+8}.
#pragma once

#include <cstdint>

#include "lowbit/format.h"

#if defined(__CUDACC__)
#define LOWBIT_HD __host__ __device__ __forceinline__
#else
#define LOWBIT_HD inline
#endif

namespace lowbit::cuda {

// How a lane's bits are laid out and become numbers; several formats share one.
// The last two, of kernels alone, are the fp8 types multiplied as they are by activations in e4m3.
enum class Kind : std::uint8_t {
  kInt4,
  kLut4,
  kInt5,
  kInt8,
  kLut3,
  kE4M3,
  kE5M2,
  kFull,
  kE4M3Raw,
  kE5M2Raw
};

LOWBIT_HD constexpr bool is_raw(Kind kind) {
  return kind == Kind::kE4M3Raw || kind == Kind::kE5M2Raw;
}

LOWBIT_HD constexpr int kind_bits(Kind kind) {
  switch (kind) {
    case Kind::kInt4:
    case Kind::kLut4:
      return 4;
    case Kind::kInt5:
      return 5;
    case Kind::kLut3:
      return 3;
    case Kind::kFull:
      return 16;
    default:
      return 8;
  }
}

LOWBIT_HD constexpr Kind kind_of(Format format) {
  switch (format) {
    case Format::kSymInt4:
    case Format::kAsymInt4:
      return Kind::kInt4;
    case Format::kSymInt5:
    case Format::kAsymInt5:
      return Kind::kInt5;
    case Format::kSymInt8:
      return Kind::kInt8;
    case Format::kNf3:
      return Kind::kLut3;
    case Format::kNf4:
    case Format::kFp4:
      return Kind::kLut4;
    case Format::kFp8E4M3:
      return Kind::kE4M3;
    case Format::kFp8E5M2:
      return Kind::kE5M2;
    default:
      return Kind::kFull;
  }
}

inline constexpr int kBlockInputs = 64;

// The geometry kernels need, small enough for a kernel argument.
struct Geometry {
  std::int64_t tiles;
  std::int64_t tile_bytes;
  std::int64_t n, k;
  std::int32_t k_padded;
  std::int32_t groups;
  std::int32_t group_size;         // 0 without groups
  std::int32_t device_codes;       // byte offset of block 0 in a device tile
  std::int32_t device_scales;      // byte offset of group 0's scales in a device tile
  std::int32_t group_scale_bytes;  // 32, with minima 64, without groups 0
  Kind kind;
  Format format;
};

inline Geometry make_geometry(const Layout& layout) {
  const FormatInfo& info = format_info(layout.format);
  Geometry geometry{};
  geometry.tiles = layout.tiles;
  geometry.tile_bytes = layout.tile_bytes;
  geometry.n = layout.n;
  geometry.k = layout.k;
  geometry.k_padded = static_cast<std::int32_t>(layout.k_padded);
  geometry.groups = static_cast<std::int32_t>(layout.groups);
  geometry.group_size = layout.group_size;
  geometry.kind = kind_of(layout.format);
  geometry.format = layout.format;
  if (info.scale_kind == ScaleKind::kRow) {
    geometry.device_codes = kUnitBytes;
  } else if (info.grouped()) {
    geometry.device_scales = static_cast<std::int32_t>(code_bytes(layout.format, layout.k_padded));
    geometry.group_scale_bytes = info.scale_kind == ScaleKind::kGroupMinimum ? 64 : 32;
  }
  return geometry;
}

// ---- canonical order ------------------------------------------------------------------------

struct CanonicalGroup {
  std::int64_t codes;   // byte offset of the group's codes in a row tile
  std::int32_t inputs;  // padded inputs in the group
};

LOWBIT_HD CanonicalGroup canonical_group(const Geometry& geometry, std::int32_t group) {
  if (geometry.group_size == 0) {
    return {geometry.kind == Kind::kE4M3 || geometry.kind == Kind::kE5M2 ? kUnitBytes : 0,
            geometry.k_padded};
  }
  const std::int64_t codes = std::int64_t{2} * geometry.group_size * kind_bits(geometry.kind);
  const std::int32_t rest = geometry.k_padded - group * geometry.group_size;
  return {geometry.group_scale_bytes == 64 ? group * (codes + kUnitBytes)
                                           : group * codes + group / 2 * kUnitBytes,
          rest < geometry.group_size ? rest : geometry.group_size};
}

// Byte offset of the 16 fp16 scales of a group; its minima follow 32 bytes later.
LOWBIT_HD std::int64_t canonical_scales(const Geometry& geometry, std::int32_t group) {
  const bool minima = geometry.group_scale_bytes == 64;
  const std::int32_t last = minima || (group | 1) >= geometry.groups ? group : (group | 1);
  const CanonicalGroup place = canonical_group(geometry, last);
  return place.codes + std::int64_t{2} * place.inputs * kind_bits(geometry.kind) +
         (minima ? 0 : group % 2 * (kUnitBytes / 2));
}

// The stored code of (row, k), row 0..15, k < k_padded.
LOWBIT_HD std::uint32_t canonical_code(const Geometry& geometry, const std::uint8_t* tile,
                                       std::int32_t row, std::int32_t k) {
  const std::int32_t group = geometry.group_size ? k / geometry.group_size : 0;
  const CanonicalGroup place = canonical_group(geometry, group);
  const std::uint8_t* codes = tile + place.codes;
  const std::int32_t i = geometry.group_size ? k - group * geometry.group_size : k;
  const int bits = kind_bits(geometry.kind);
  if (bits == 16) {
    const std::uint8_t* at = codes + std::int64_t{i / 2} * 64 + 4 * row + 2 * (i & 1);
    return at[0] | static_cast<std::uint32_t>(at[1]) << 8;
  }
  if (bits == 8) return codes[std::int64_t{i / 4} * 64 + 4 * row + (i & 3)];
  std::uint32_t code;
  std::int32_t plane;
  if (bits == 3) {
    code = codes[i / 16 * 64 + 4 * row + (i & 3)] >> (2 * ((i >> 2) & 3)) & 3;
    plane = place.inputs * 4;
  } else {
    code = codes[i / 8 * 64 + 4 * row + (i & 3)] >> (4 * ((i >> 2) & 1)) & 15;
    plane = place.inputs * 8;
  }
  if (bits == 4) return code;
  const std::int32_t bit = 4 * row + (i & 3);
  return code | (codes[plane + i / 4 * 8 + bit / 8] >> (bit % 8) & 1u) << (bits - 1);
}

// ---- device order ---------------------------------------------------------------------------

// Byte offset of block b and its k-steps of 16 inputs (4, or 2 in a half block).
LOWBIT_HD std::int64_t block_offset(const Geometry& geometry, std::int32_t b) {
  return geometry.device_codes + std::int64_t{b} * (2 * kBlockInputs * kind_bits(geometry.kind));
}
LOWBIT_HD int block_steps(const Geometry& geometry, std::int32_t b) {
  return geometry.k_padded - b * kBlockInputs >= kBlockInputs ? 4 : 2;
}

// Which lane owns (row, k mod 64), and as which half of which pair.
struct LanePlace {
  int lane, c, h;
};
LOWBIT_HD LanePlace lane_place(int row, int k) {
  const int step = k / 16 & 3;
  const int inner = k & 15;
  return {row % 8 * 4 + inner % 8 / 2, 4 * step + 2 * (inner / 8) + row / 8, inner & 1};
}
LOWBIT_HD int place_row(int lane, int c) {
  return lane / 4 + 8 * (c & 1);
}
LOWBIT_HD int place_k(int lane, int c, int h) {
  return c / 4 * 16 + (c >> 1 & 1) * 8 + lane % 4 * 2 + h;
}

// Bit offset inside a block of bit `bit` of the code of pair c, half h of a lane.
LOWBIT_HD int bit_of(Kind kind, int steps, int lane, int c, int h, int bit) {
  const int step = c / 4;
  const int pair = c % 4;
  switch (kind) {
    case Kind::kInt4:
      return lane * steps * 32 + step * 32 + 4 * (pair + 4 * h) + bit;
    case Kind::kLut4:
      return lane * steps * 32 + step * 32 + 4 * (2 * pair + h) + bit;
    case Kind::kInt5:
      if (bit < 4) return lane * steps * 32 + step * 32 + 4 * (pair + 4 * h) + bit;
      return 32 * steps * 32 + lane * steps * 8 + c + 4 * steps * h;
    case Kind::kLut3: {
      const int index = 3 * h + bit;  // bit of the six-bit pair
      if (steps == 4) {
        const int word = c < 15 ? c / 5 : index / 2;
        const int at = c < 15 ? 6 * (c % 5) + index : 30 + index % 2;
        return word < 2 ? lane * 64 + word * 32 + at : 32 * 64 + lane * 32 + at;
      }
      // Pairs 0..4 in the word, 5 and 6 in the low 12 of the 16 bits; pair 7: four bits on top of
      // the 16 bits, two on top of the word.
      if (c < 5) return lane * 32 + 6 * c + index;
      if (c < 7) return 32 * 32 + lane * 16 + 6 * (c - 5) + index;
      return index < 4 ? 32 * 32 + lane * 16 + 12 + index : lane * 32 + 30 + index - 4;
    }
    default:  // 8 bits
      return (step / 2 * 512 + lane * 16 + step % 2 * 8 + pair / 2 * 4 + (pair & 1) + 2 * h) * 8 +
             bit;
  }
}

// The stored code of (row, k) in a device tile.
LOWBIT_HD std::uint32_t device_code(const Geometry& geometry, const std::uint8_t* tile,
                                    std::int32_t row, std::int32_t k) {
  if (geometry.kind == Kind::kFull) {
    const std::uint8_t* at = tile + (std::int64_t{row} * geometry.k_padded + k) * 2;
    return at[0] | static_cast<std::uint32_t>(at[1]) << 8;
  }
  const std::int32_t b = k / kBlockInputs;
  const std::uint8_t* block = tile + block_offset(geometry, b);
  const int steps = block_steps(geometry, b);
  const LanePlace place = lane_place(row, k % kBlockInputs);
  const int bits = kind_bits(geometry.kind);
  if (geometry.kind != Kind::kLut3) {  // the low four or eight bits are neighbours
    const int low = bits == 8 ? 8 : 4;
    const int at = bit_of(geometry.kind, steps, place.lane, place.c, place.h, 0);
    std::uint32_t code = block[at / 8] >> (at % 8) & ((1u << low) - 1);
    if (bits == 5) {
      const int top = bit_of(geometry.kind, steps, place.lane, place.c, place.h, 4);
      code |= (block[top / 8] >> (top % 8) & 1u) << 4;
    }
    return code;
  }
  std::uint32_t code = 0;
  for (int bit = 0; bit < 3; ++bit) {
    const int at = bit_of(geometry.kind, steps, place.lane, place.c, place.h, bit);
    code |= (block[at / 8] >> (at % 8) & 1u) << bit;
  }
  return code;
}

// Byte offset in a device tile of the fp16 scale (minimum 0) or minimum (1) of a row of a group.
LOWBIT_HD std::int64_t device_scale(const Geometry& geometry, std::int32_t group, int row,
                                    int minimum) {
  const int bytes_per_g = geometry.group_scale_bytes / 8;  // 4 or 8
  return geometry.device_scales + std::int64_t{group} * geometry.group_scale_bytes +
         row % 8 * bytes_per_g + minimum * 4 + row / 8 * 2;
}

}  // namespace lowbit::cuda
