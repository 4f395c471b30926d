// AMX tiles: instructions as functions, all eight tiles of 16 rows x 64 bytes.
#pragma once

#include <cstdint>

#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

// As intrinsics, but ordered with what else reads and writes memory (GCC's are not).
template <int kTile>
LOWBIT_INLINE void tile_load(const void* from, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
// Of what will not be read again soon: passes by L1 instead of taking the place of something else.
template <int kTile>
LOWBIT_INLINE void tile_load_once(const void* from, std::int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile)
                   : "memory");
}
template <int kTile>
LOWBIT_INLINE void tile_store(void* to, std::int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LOWBIT_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTo, int kA, int kB>
LOWBIT_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}
// Signed bytes.
template <int kTo, int kA, int kB>
LOWBIT_INLINE void tile_multiply_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}
// Signed bytes (A) times unsigned ones (B).
template <int kTo, int kA, int kB>
LOWBIT_INLINE void tile_multiply_unsigned() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}

struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles are ours from here on, and given back: what is in use has to be saved at every switch of
// threads.
struct TileSession {
  TileSession() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  explicit TileSession(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
  // Tiles 4 and 7 (A) and 5 and 6 (B) of `depth` bytes along the sum.
  explicit TileSession(int depth) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = static_cast<std::uint16_t>(tile == 4 || tile == 7 ? depth : 64);
      config.rows[tile] = static_cast<std::uint8_t>(tile == 5 || tile == 6 ? depth / 4 : 16);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileSession() { __asm__ volatile("tilerelease" ::: "memory"); }
};

}  // namespace
}  // namespace lowbit::cpu
