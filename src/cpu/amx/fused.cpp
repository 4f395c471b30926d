// Attention of many rows by tiles: 32 rows of the left side x 32 query rows are 4 accumulators of
// 16 x 16, two tiles of rows and two of columns the rest of the eight.
#include "cpu/amx/tiles.h"
#include "cpu/generic/fused_many.h"

namespace lowbit::cpu {
namespace {

struct TileProducts {
  static constexpr int kRows = 32;
  static constexpr int kTaskRows = 64;

  using Session = TileSession;

  // c[m][32] (+)= a b, `steps` panels [m][32] of a and 16 pairs of b each. m is a multiple of 32.
  template <bool kAdd>
  static void multiply(const std::uint16_t* a, int m, int steps, const std::uint16_t* b, float* c) {
    constexpr int kStride = kRows * 4;  // of b and c, in bytes
    for (int row = 0; row < m; row += 32) {
      float* out = c + row * kRows;
      if constexpr (kAdd) {
        tile_load<0>(out, kStride);
        tile_load<1>(out + 16, kStride);
        tile_load<2>(out + 16 * kRows, kStride);
        tile_load<3>(out + 16 * kRows + 16, kStride);
      } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
      }
      const std::uint16_t *left = a + row * kPanel, *right = b;
      for (int i = 0; i < steps; ++i) {
        tile_load<4>(left, kPanel * 2);
        tile_load<6>(right, kStride);
        tile_multiply<0, 4, 6>();
        tile_load<7>(right + 32, kStride);
        tile_multiply<1, 4, 7>();
        tile_load<5>(left + 16 * kPanel, kPanel * 2);
        tile_multiply<2, 5, 6>();
        tile_multiply<3, 5, 7>();
        left += m * kPanel;
        right += 16 * kRows * 2;
      }
      tile_store<0>(out, kStride);
      tile_store<1>(out + 16, kStride);
      tile_store<2>(out + 16 * kRows, kStride);
      tile_store<3>(out + 16 * kRows + 16, kStride);
    }
  }
};

constexpr ManyRows kMany = many_rows<TileProducts>("amx");

}  // namespace

const ManyRows& many_rows_amx() {
  return kMany;
}

}  // namespace lowbit::cpu
