// The placement of codes and scales in one row tile (drawn in docs/formats.md), for those that have
// them row by row.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "lowbit/format.h"

namespace lowbit {

// Where the parts of the 16 rows of a tile are. Every row has k_padded codes.
struct TileRows {
  std::array<const std::uint8_t*, kTileRows> codes;
  std::array<const std::uint16_t*, kTileRows> scales, minima;  // null: zeros
  std::array<const float*, kTileRows> row_scales;              // null: zeros
};

// Writes every byte of the tile.
void pack_tile(const TileRows& rows, const Layout& layout, std::byte* packed_tile);

// The k_padded codes of row r of a tile.
void unpack_row(const std::byte* packed_tile, const Layout& layout, int r, std::uint8_t* codes);

// Which stored codes a format has: true at index c if c may be packed.
std::array<bool, 256> valid_codes(const FormatInfo& info);

}  // namespace lowbit
