// The public quantizers and dequantizers: checks, threads over row tiles.
#include "lowbit/quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "format/checks.h"
#include "lowbit/error.h"
#include "reference/reference.h"

namespace lowbit {

int quantize(const MatrixView& weight, const Layout& layout, std::span<std::byte> packed,
             const Threads& threads) {
  check_quantize(weight, layout, packed);
  std::vector<reference::ScaleRange> ranges(static_cast<std::size_t>(layout.tiles));
  threads.run(layout.tiles, [&](std::int64_t tile) {
    ranges[static_cast<std::size_t>(tile)] = reference::tile_range(weight, layout, tile);
  });
  reference::ScaleRange range;
  for (const reference::ScaleRange& r : ranges) range.merge(r);
  if (!range.finite) throw_nonfinite(weight);
  const int exponent = reference::exponent_for(format_info(layout.format), range);
  threads.run(layout.tiles, [&](std::int64_t tile) {
    reference::quantize_tile(weight, layout, exponent, tile,
                             packed.data() + tile * layout.tile_bytes);
  });
  return exponent;
}

void dequantize(std::span<const std::byte> packed, const Layout& layout, int exponent,
                const MutableMatrixView& out, const Threads& threads) {
  check_dequantize(packed, layout, out);
  threads.run(layout.n, [&](std::int64_t row) {
    const std::byte* tile = packed.data() + row / kTileRows * layout.tile_bytes;
    for (std::int64_t k = 0; k < layout.k; ++k) {
      reference::store_weight(
          out, row, k,
          reference::weight_at(tile, layout, exponent, static_cast<int>(row % kTileRows), k));
    }
  });
}

void dequantize_rows(std::span<const std::byte> packed, const Layout& layout, int exponent,
                     std::span<const std::int64_t> rows, const MutableMatrixView& out,
                     const Threads& threads) {
  check_rows(packed, layout, rows, out);
  threads.run(out.rows, [&](std::int64_t i) {
    const std::int64_t row = rows[static_cast<std::size_t>(i)];
    const std::byte* tile = packed.data() + row / kTileRows * layout.tile_bytes;
    for (std::int64_t k = 0; k < layout.k; ++k) {
      reference::store_weight(
          out, i, k,
          reference::weight_at(tile, layout, exponent, static_cast<int>(row % kTileRows), k));
    }
  });
}

std::int64_t first_nonfinite(const MatrixView& matrix, const Threads& threads) {
  static_cast<void>(threads);
  for (std::int64_t row = 0; row < matrix.rows; ++row) {
    for (std::int64_t col = 0; col < matrix.cols; ++col) {
      const auto value = static_cast<float>(reference::element(matrix, row, col));
      if (!std::isfinite(value)) return row * matrix.cols + col;
    }
  }
  return -1;
}

}  // namespace lowbit
