// The wgmma kernel's cut of a thread block: warps, shared memory, what a cluster can share. Plain
// C++.
#pragma once

#include "cuda/kinds.h"

namespace lowbit::cuda {

// Blocks of 64 inputs in a stage; with activations of 8 bits two of them are 128 bytes.
LOWBIT_HD constexpr int qmm_stage_blocks(Kind kind, int tokens) {
  return tokens <= 32 || is_raw(kind) ? 2 : 1;
}
// Room for the scales of a row tile and stage.
LOWBIT_HD constexpr int qmm_scale_room(Kind kind, Scales scales, int tokens) {
  if (has_row_scale(kind)) return 0;
  const int block = scales == Scales::kPlain ? 32 : scales == Scales::kMinima ? 64 : 128;
  return block * qmm_stage_blocks(kind, tokens);
}
// Warpgroups that share their outputs and take turns along K; `groups`, 1 or 2, is how many have
// outputs of their own, 64 each. Codes that need no dequantizing need no turns.
LOWBIT_HD constexpr int qmm_turns(Kind kind, int tokens, int groups) {
  return is_raw(kind) ? 1 : groups == 1 ? 4 : tokens <= 128 ? 2 : 1;
}
// Sums move between warps as they lie in registers: for a run of 8 tokens four floats per lane.
LOWBIT_HD constexpr int qmm_run_bytes(int groups) {
  return groups * 4 * kLanes * 16;
}
// Runs that the turns exchange at a time.
LOWBIT_HD constexpr int qmm_pass_runs(int tokens) {
  return tokens < 64 ? tokens / 8 : 8;
}
// From 128 tokens on results are transposed in shared memory: with turns all of a token's outputs,
// a row of so many bytes; without, per warpgroup, so many tokens at a time.
LOWBIT_HD constexpr int qmm_out_bytes(int groups) {
  return groups * 64 * 2 + 16;
}
constexpr int kQmmFlip = 32;
constexpr int kQmmFlipBytes = 64 * 2 + 16;  // of a token: 64 outputs and, against conflicts, 16

LOWBIT_HD constexpr int qmm_end_bytes(Kind kind, int tokens, int groups) {
  const int turns = qmm_turns(kind, tokens, groups);
  if (turns == 1) return groups * kQmmFlip * kQmmFlipBytes;
  const int sums = (turns - 1) * qmm_pass_runs(tokens) * qmm_run_bytes(groups);
  const int out = tokens >= 128 ? tokens * qmm_out_bytes(groups) : 0;
  return sums > out ? sums : out;
}
// Sums of the activations of a stage's blocks, for minima: per warpgroup, of two stages.
LOWBIT_HD constexpr int qmm_sums_bytes(Kind kind, Scales scales, int tokens, int groups) {
  if (scales != Scales::kMinima || tokens > 16) return 0;
  return groups * qmm_turns(kind, tokens, groups) * 2 * qmm_stage_blocks(kind, tokens) * tokens * 4;
}
LOWBIT_HD constexpr int qmm_fixed_bytes(Kind kind, Scales scales, int tokens, int groups) {
  return 1024 + table_bytes(kind) + qmm_end_bytes(kind, tokens, groups) +
         qmm_sums_bytes(kind, scales, tokens, groups) + 256;
}
LOWBIT_HD constexpr int qmm_stage_bytes(Kind kind, Scales scales, int tokens, int groups) {
  return (is_raw(kind) ? 1 : qmm_stage_blocks(kind, tokens)) * tokens * 128 +
         groups * 4 *
             (qmm_stage_blocks(kind, tokens) * 2 * kBlockInputs * kind_bits(kind) +
              qmm_scale_room(kind, scales, tokens));
}
// Stages of the ring; a multiple of the turns, so that a slot always belongs to the same one.
LOWBIT_HD constexpr int qmm_ring(Kind kind, Scales scales, int tokens, int groups) {
  const int stages = (227 * 1024 - qmm_fixed_bytes(kind, scales, tokens, groups)) /
                     qmm_stage_bytes(kind, scales, tokens, groups);
  const int turns = qmm_turns(kind, tokens, groups);
  const int most = turns == 1 ? 8 : 16;  // barriers for 16 have room
  return (stages > most ? most : stages) / turns * turns;
}
LOWBIT_HD constexpr int qmm_shared_bytes(Kind kind, Scales scales, int tokens, int groups) {
  return qmm_fixed_bytes(kind, scales, tokens, groups) +
         qmm_ring(kind, scales, tokens, groups) * qmm_stage_bytes(kind, scales, tokens, groups);
}

// A cluster's sums: a thread block owns so many of the runs, and the others write theirs to where
// its ring was.
LOWBIT_HD constexpr int qmm_owned_runs(int tokens, int splits) {
  return tokens / 8 >= splits ? tokens / 8 / splits : 1;
}
// Thread blocks that can share a tile: what they write must fit there.
LOWBIT_HD constexpr int qmm_most_splits(Kind kind, Scales scales, int tokens, int groups) {
  const int room =
      qmm_ring(kind, scales, tokens, groups) * qmm_stage_bytes(kind, scales, tokens, groups);
  int splits = 8;
  while (splits > 1 && (splits - 1) * qmm_owned_runs(tokens, splits) * qmm_run_bytes(groups) > room)
    splits /= 2;
  return splits;
}

// Large tiles need more registers than an even share: the copying warps, a whole warpgroup then,
// give theirs away.
LOWBIT_HD constexpr int qmm_threads(Kind kind, int tokens, int groups) {
  return groups * qmm_turns(kind, tokens, groups) * 128 + 128;
}

}  // namespace lowbit::cuda
