// Attention of many rows by tiles: 32 rows x 32 columns are 4 accumulators of 16 x 16, two tiles of
// rows and two of columns the rest of the eight.
#include "cpu/amx/tiles.h"
#include "cpu/generic/fused_many.h"

namespace lowbit::cpu {
namespace {

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

  using Session = TileSession;

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
