// The device order of packed weights is a permutation of the canonical bits: walked bit by bit.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/codebooks.cuh"
#include "cuda/device_layout.h"
#include "lowbit/format.h"

namespace lowbit::cuda {
namespace {

struct Case {
  int k;
  int group_size;
};

std::vector<Case> cases(const FormatInfo& info) {
  std::vector<Case> all;
  for (int k : {1, 32, 40, 64, 96, 128, 160, 320, 1024}) {
    if (!info.grouped()) {
      all.push_back({k, 0});
      continue;
    }
    for (int group_size : kGroupSizes) all.push_back({k, group_size});
  }
  return all;
}

std::string label(const FormatInfo& info, const Case& c) {
  return std::string(info.name) + " k=" + std::to_string(c.k) +
         " g=" + std::to_string(c.group_size);
}

// Every code bit of a tile has one place in the device tile, inside the codes, shared with no
// other.
TEST(DeviceLayout, EveryCodeBitHasItsOwnPlace) {
  for (const FormatInfo& info : formats()) {
    for (const Case& c : cases(info)) {
      SCOPED_TRACE(label(info, c));
      const Geometry geometry = make_geometry(make_layout(info.format, 16, c.k, c.group_size));
      if (geometry.kind == Kind::kFull) continue;
      const std::int64_t code_bits = std::int64_t{16} * geometry.k_padded * info.bits;
      std::vector<bool> taken(static_cast<std::size_t>(geometry.tile_bytes * 8));
      for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < geometry.k_padded; ++k) {
          const int b = k / kBlockInputs;
          const LanePlace place = lane_place(row, k % kBlockInputs);
          EXPECT_EQ(place_row(place.lane, place.c), row);
          EXPECT_EQ(place_k(place.lane, place.c, place.h), k % kBlockInputs);
          for (int bit = 0; bit < info.bits; ++bit) {
            const std::int64_t at =
                block_offset(geometry, b) * 8 +
                bit_of(geometry.kind, block_steps(geometry, b), place.lane, place.c, place.h, bit);
            ASSERT_GE(at, geometry.device_codes * 8);
            ASSERT_LT(at, geometry.device_codes * 8 + code_bits);
            ASSERT_FALSE(taken[static_cast<std::size_t>(at)]) << "row " << row << " k " << k;
            taken[static_cast<std::size_t>(at)] = true;
          }
        }
      }
    }
  }
}

// Scales follow the codes, each in its own two bytes, and nothing reaches past the tile.
TEST(DeviceLayout, EveryScaleHasItsOwnPlace) {
  for (const FormatInfo& info : formats()) {
    if (!info.grouped()) continue;
    for (const Case& c : cases(info)) {
      SCOPED_TRACE(label(info, c));
      const Layout layout = make_layout(info.format, 16, c.k, c.group_size);
      const Geometry geometry = make_geometry(layout);
      std::vector<bool> taken(static_cast<std::size_t>(geometry.tile_bytes));
      const int minima = info.scale_kind == ScaleKind::kGroupMinimum ? 2 : 1;
      for (int group = 0; group < geometry.groups; ++group) {
        EXPECT_EQ(canonical_scales(geometry, group), layout.scales_offset(group));
        EXPECT_EQ(canonical_group(geometry, group).codes, layout.codes_offset(group));
        EXPECT_EQ(canonical_group(geometry, group).inputs, layout.group_inputs(group));
        for (int row = 0; row < 16; ++row) {
          for (int minimum = 0; minimum < minima; ++minimum) {
            const std::int64_t at = device_scale(geometry, group, row, minimum);
            ASSERT_GE(at, code_bytes(info.format, layout.k_padded));
            ASSERT_LE(at + 2, geometry.tile_bytes);
            ASSERT_FALSE(taken[static_cast<std::size_t>(at)]);
            taken[static_cast<std::size_t>(at)] = true;
          }
        }
      }
    }
  }
}

// Writes codes bit by bit where bit_of() says and reads them back through device_code().
TEST(DeviceLayout, CodesReadBack) {
  std::mt19937 random(7);
  for (const FormatInfo& info : formats()) {
    for (const Case& c : cases(info)) {
      SCOPED_TRACE(label(info, c));
      const Geometry geometry = make_geometry(make_layout(info.format, 16, c.k, c.group_size));
      if (geometry.kind == Kind::kFull) continue;
      std::vector<std::uint8_t> tile(static_cast<std::size_t>(geometry.tile_bytes));
      std::vector<std::uint32_t> codes(static_cast<std::size_t>(16 * geometry.k_padded));
      for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < geometry.k_padded; ++k) {
          const std::uint32_t code = random() & ((1u << info.bits) - 1);
          codes[static_cast<std::size_t>(row * geometry.k_padded + k)] = code;
          const int b = k / kBlockInputs;
          const LanePlace place = lane_place(row, k % kBlockInputs);
          for (int bit = 0; bit < info.bits; ++bit) {
            const std::int64_t at =
                block_offset(geometry, b) * 8 +
                bit_of(geometry.kind, block_steps(geometry, b), place.lane, place.c, place.h, bit);
            tile[static_cast<std::size_t>(at / 8)] |=
                static_cast<std::uint8_t>((code >> bit & 1) << (at % 8));
          }
        }
      }
      for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < geometry.k_padded; ++k) {
          ASSERT_EQ(device_code(geometry, tile.data(), row, k),
                    codes[static_cast<std::size_t>(row * geometry.k_padded + k)]);
        }
      }
    }
  }
}

TEST(DeviceLayout, CodebooksAndZeroPointsAreThoseOfTheFormats) {
  for (const FormatInfo& info : formats()) {
    for (std::size_t code = 0; code < info.codebook.size(); ++code) {
      EXPECT_EQ(codebook_entry(info.format, static_cast<int>(code)), info.codebook[code])
          << info.name << " code " << code;
    }
    if (info.code_kind == CodeKind::kInteger) {
      EXPECT_EQ(zero_point(info.format), info.zero_point) << info.name;
    }
    EXPECT_EQ(kind_bits(kind_of(info.format)), info.bits) << info.name;
  }
}

}  // namespace
}  // namespace lowbit::cuda
