// The loop over tiles and blocks of tokens of the 256-bit kernels that take a tile at a time.
#pragma once

#include "cpu/generic/ymm_prepare.h"

namespace lowbit::cpu {
namespace {

// one(count, bytes, quads, meta, token, tile) for every tile and block: `count` tokens as a
// constant, the first of them number `token` of the call; the tile's bytes; and the block's
// activations as prepare_quads left them.
template <Quad kKind, int kTokens, bool kFixed, class One>
LOWBIT_INLINE void for_tiles(const RowBlock& rows, const Activations& a, std::int64_t first_token,
                             std::int64_t tile_begin, std::int64_t tile_end,
                             std::int64_t token_begin, std::int64_t token_end, One&& one) {
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for_blocks<kKind, kTokens, kFixed>(
        a, token_begin, token_end, first_token,
        [&](auto count, const std::byte* quads, const std::byte* meta, std::int64_t token)
            LOWBIT_LAMBDA { one(count, bytes, quads, meta, token, tile); });
  }
}

}  // namespace
}  // namespace lowbit::cpu
