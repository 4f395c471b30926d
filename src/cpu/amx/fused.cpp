// Attention of many rows by tiles: 32 rows x 32 columns are 4 accumulators of 16 x 16, two tiles of
// rows and two of columns the rest of the eight.
#include "cpu/generic/fused_many.h"

namespace lowbit::cpu {
namespace {

// As intrinsics, but ordered with what else reads and writes memory (GCC's are not).
template <int kTile>
LOWBIT_INLINE void tile_load(const void* from, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
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

struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// c[32][32] (+)= a[32][32 * steps] b; step i of b is 16 pairs at b + i * 16 * b_stride, and the
// second tile of columns follows at + 64. Strides in bytes.
template <bool kAdd>
LOWBIT_INLINE void tile_product(const std::uint16_t* a, std::int64_t a_stride, const std::byte* b,
                                std::int64_t b_stride, int steps, float* c, std::int64_t c_stride) {
  const char* rows = reinterpret_cast<const char*>(a);
  char* out = reinterpret_cast<char*>(c);
  if constexpr (kAdd) {
    tile_load<0>(out, c_stride);
    tile_load<1>(out + 64, c_stride);
    tile_load<2>(out + 16 * c_stride, c_stride);
    tile_load<3>(out + 16 * c_stride + 64, c_stride);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int i = 0; i < steps; ++i) {
    const std::byte* columns = b + i * 16 * b_stride;
    tile_load<4>(rows + i * 64, a_stride);
    tile_load<6>(columns, b_stride);
    tile_multiply<0, 4, 6>();
    tile_load<7>(columns + 64, b_stride);
    tile_multiply<1, 4, 7>();
    tile_load<5>(rows + 16 * a_stride + i * 64, a_stride);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(out, c_stride);
  tile_store<1>(out + 64, c_stride);
  tile_store<2>(out + 16 * c_stride, c_stride);
  tile_store<3>(out + 16 * c_stride + 64, c_stride);
}

struct TileProducts {
  static constexpr int kRows = 32;
  static constexpr int kTaskRows = 64;

  // Tiles are ours from here on, and given back: what is in use has to be saved at every switch of
  // threads.
  struct Session {
    Session() {
      TileConfig config;
      for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = 16;
      }
      __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Session() { __asm__ volatile("tilerelease" ::: "memory"); }
  };

  static void scores(const ManyWork& work, const std::byte* keys, int blocks) {
    const std::int64_t block_bytes = std::int64_t{work.padded} * kCacheBlock * 2;
    for (int r = 0; r < work.rows; r += kRows) {
      for (int block = 0; block < blocks; ++block) {
        for (int column = 0; column < kCacheBlock; column += 32) {
          tile_product<false>(work.query + r * work.padded, work.padded * 2,
                              keys + block * block_bytes + column * 4, kCacheBlock * 4,
                              work.padded / 32,
                              work.scores + r * kSpan + block * kCacheBlock + column, kSpan * 4);
        }
      }
    }
  }

  static void values(const ManyWork& work, const std::byte* values, int blocks) {
    for (int r = 0; r < work.rows; r += kRows) {
      for (int i = 0; i < work.padded; i += 32) {
        tile_product<true>(work.weights + r * kSpan, kSpan * 2, values + i * 4,
                           std::int64_t{work.padded} * 4, blocks * kCacheBlock / 32,
                           work.acc + r * work.padded + i, work.padded * 4);
      }
    }
  }
};

constexpr ManyRows kMany = many_rows<TileProducts>("amx");

}  // namespace

const ManyRows& many_rows_amx() {
  return kMany;
}

}  // namespace lowbit::cpu
