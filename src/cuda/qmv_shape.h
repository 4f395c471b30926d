// The decode kernel's cut of shared memory, needed by its launch and by select(). Plain C++.
#pragma once

#include <cstddef>

#include "cuda/kinds.h"

namespace lowbit::cuda {

// Tokens in steps of 8, the n of the multiplication.
LOWBIT_HD constexpr int qmv_token_tiles(std::int64_t m) {
  return m <= 8 ? 1 : m <= 16 ? 2 : 4;
}
// Threads: 128 registers each up to 16 tokens, then about 165.
LOWBIT_HD constexpr int qmv_threads(int token_tiles) {
  return token_tiles <= 2 ? 512 : 384;
}
// Row tiles a warp can hold accumulators for.
LOWBIT_HD constexpr int qmv_tiles(int token_tiles) {
  return token_tiles == 4 ? 4 : 8;
}
// Blocks of 64 inputs in a unit: about 2 KB of codes, half of it where activations need the room.
LOWBIT_HD constexpr int chunk_blocks(Kind kind, int token_tiles) {
  return kind_bits(kind) == 8 || token_tiles >= 2 ? 2 : 4;
}
// Ring slots per warp at most, of which all but one are in flight: 16 warps x 2176 B = 35 KB per SM
// for 4-bit types; the latency of HBM times its bandwidth is about 20 KB per SM.
LOWBIT_HD constexpr int ring_slots(Kind kind, int token_tiles) {
  return token_tiles == 1 ? (kind == Kind::kInt4 ? 3 : 2) : kind_bits(kind) < 8 ? 4 : 3;
}
// Activations of a chunk go to registers once and stay there for all row tiles.
inline bool qmv_holds(const Geometry& geometry, int token_tiles) {
  return token_tiles == 1 && geometry.group_size != 32;
}

inline int qmv_chunks(Kind kind, int token_tiles, std::int64_t k_padded) {
  const std::int64_t inputs = std::int64_t{chunk_blocks(kind, token_tiles)} * kBlockInputs;
  return static_cast<int>((k_padded + inputs - 1) / inputs);
}

// Chunks of a warp.
inline int qmv_rounds(const Geometry& geometry, int token_tiles, int warps_k, int splits) {
  const int chunks = qmv_chunks(geometry.kind, token_tiles, geometry.k_padded);
  const int share = (chunks + splits - 1) / splits;
  return (share + warps_k - 1) / warps_k;
}

// The slots in use: the third of a few tokens pays, measured, only where a warp has two row tiles
// and several chunks. (With one tile it would wait for activations that are copied too late.)
inline int qmv_slots(const Geometry& geometry, int token_tiles, int tiles_per_warp, int warps_k,
                     int splits) {
  const int most = ring_slots(geometry.kind, token_tiles);
  if (token_tiles > 1 || most < 3) return most;
  return tiles_per_warp == 2 && qmv_rounds(geometry, token_tiles, warps_k, splits) > 1 ? 3 : 2;
}

// Slots for activations per warp. One where registers hold them: the next chunk's are copied as
// soon as they are there. Else the newest chunk issued while chunk i is in use is
// i + (r - 1 + slots - 1) / r; no more than the warp has in all.
inline int qmv_act_slots(const Geometry& geometry, int token_tiles, int tiles_per_warp, int warps_k,
                         int splits) {
  if (qmv_holds(geometry, token_tiles)) return 1;
  const int rounds = qmv_rounds(geometry, token_tiles, warps_k, splits);
  const int slots = qmv_slots(geometry, token_tiles, tiles_per_warp, warps_k, splits);
  const int ahead = (tiles_per_warp - 1 + slots - 1) / tiles_per_warp + 1;
  return ahead < rounds ? ahead : rounds;
}

// Bytes of scales that belong to a unit.
inline int qmv_scale_bytes(const Geometry& geometry, int token_tiles) {
  if (geometry.group_size == 0) return 0;
  const int groups = chunk_blocks(geometry.kind, token_tiles) * kBlockInputs / geometry.group_size;
  return geometry.group_scale_bytes * (groups > 1 ? groups : 1);
}

inline std::size_t qmv_shared_bytes(const Geometry& geometry, int m, int tiles_per_warp,
                                    int warps_n, int warps_k, int splits) {
  const Kind kind = geometry.kind;
  const int token_tiles = qmv_token_tiles(m);
  const int chunk = chunk_blocks(kind, token_tiles);
  const int act_slots = qmv_act_slots(geometry, token_tiles, tiles_per_warp, warps_k, splits);
  const std::size_t warps = static_cast<std::size_t>(warps_n) * warps_k;
  const std::size_t unit = std::size_t(chunk) * 2 * kBlockInputs * kind_bits(kind) +
                           qmv_scale_bytes(geometry, token_tiles);
  const std::size_t rings =
      warps * (qmv_slots(geometry, token_tiles, tiles_per_warp, warps_k, splits) * unit +
               std::size_t(act_slots) * chunk * m * 128);
  // Sums as they lie in registers: 16 bytes per lane, row tile and 8 tokens.
  const std::size_t sums =
      (warps + (splits > 1 ? warps_n : 0)) * std::size_t(tiles_per_warp) * token_tiles * 512;
  return table_bytes(kind) + 128 + (rings > sums ? rings : sums);
}
inline constexpr std::size_t kMostSharedBytes = 227 * 1024;  // of a thread block on sm_90

}  // namespace lowbit::cuda
