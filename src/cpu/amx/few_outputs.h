// Outputs of few tokens.
#pragma once

#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

// Outputs of row tiles [first, first + tiles); sum(token, tile) is what the epilogue gets. Whole
// lines go past the caches: reading them first, which a store does, takes the buffers that weights
// come through. After the last of them there has to be a fence.
template <class Sum>
LOWBIT_INLINE void write_outputs(const Epilogue& epilogue, std::int64_t first_token, std::int64_t m,
                                 std::int64_t first, std::int64_t tiles, Sum&& sum) {
  const RowBlock& rows = epilogue.rows;
  const bool whole = rows.out_dtype == DType::kFloat32;
  const std::int64_t bytes = whole ? 4 : 2;
  const bool lines =
      reinterpret_cast<std::uintptr_t>(rows.out) % 64 == 0 && rows.out_stride * bytes % 64 == 0;
  const std::int64_t full = rows.layout.n / kTileRows;  // row tiles without padding
  for (std::int64_t t = 0; t < m; ++t) {
    std::byte* out =
        static_cast<std::byte*>(rows.out) + (first_token + t) * rows.out_stride * bytes;
    const auto value = [&](std::int64_t tile)
                           LOWBIT_LAMBDA { return epilogue.value(tile, sum(t, tile)); };
    for (std::int64_t tile = first; tile < first + tiles; ++tile) {
      if (lines && whole && tile < full) {
        _mm512_stream_ps(reinterpret_cast<float*>(out + tile * 64), value(tile));
      } else if (lines && !whole && tile % 2 == 0 && tile + 1 < first + tiles && tile + 1 < full) {
        const __m256i low = to_16_bits(rows.out_dtype, value(tile));
        const __m256i high = to_16_bits(rows.out_dtype, value(tile + 1));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + tile * 32),
                            _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
        ++tile;
      } else {
        epilogue.store(first_token + t, tile, sum(t, tile));
      }
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
