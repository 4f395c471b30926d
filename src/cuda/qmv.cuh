// Decode and small batches, M <= 32: out[m][n] = sum_k x[m][k] W[n][k], at the memory's speed.
//
// The weights are the m16 operand of mma.m16n8k16, the tokens its n8: at M = 1 a weight costs 1/8
// multiplication instruction. Codes enter as exact small numbers; a group's fp32 accumulators are
// multiplied by its scale (kernels.md: 4 FMAs per 32 weights and lane instead of 16), minima by the
// sum of the activations, which a multiplication by ones yields: up to 8 tokens once for all row
// tiles of a warp.
//
// Every warp is a stream of its own. It owns `tiles_per_warp` row tiles and every warps_k-th chunk
// of 2 or 4 blocks of 64 inputs of its thread block's share of K, and copies what it needs, codes,
// scales and activations, into a private ring with cp.async: no barrier of the whole thread block
// until the end. A chunk of one row tile is a unit: its copies, waits and addresses are paid once
// for up to 4 blocks (one block per unit took 150 instructions per block, of which 60 multiply). Up
// to 8 tokens a chunk's activations go to registers once, for all row tiles. At the end the warps
// along K, then the thread blocks of the cluster along K, are summed in a fixed order through
// (distributed) shared memory: deterministic, and no workspace.
//
// Preconditions: K a multiple of 64, rows of x 16-byte aligned, M <= 8 kT.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/dequant.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/grouped.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/qmv_shape.h"

namespace lowbit::cuda {

struct QmvParams {
  const std::uint8_t* w;
  const std::uint8_t* x;
  std::uint8_t* out;
  const void* bias;
  const std::int32_t* ends;  // of the tokens of each expert; nullptr: one matrix for all tokens
  std::int64_t tile_bytes;
  std::int64_t x_stride_bytes;
  std::int64_t out_stride;           // elements
  std::int32_t m, n, tiles, blocks;  // m with experts: at most, of one thread block
  std::int32_t experts, rows;        // with experts: rows of x
  std::int32_t items;                // thread blocks along y: runs of tokens of one expert
  std::int32_t codes_at, scales_at, group_shift, group_bytes;
  std::int32_t scale_bytes;  // of a unit
  std::int32_t tiles_per_warp, warps_n, warps_k, splits, slots, act_slots;
  std::uint32_t zero_pair;
  float factor;  // 2^exponent
  DType bias_dtype;
  CodebookPairs codebook;
  bool minima, half_groups;  // half_groups: group size 32, two scales per block
  std::size_t shared_bytes;
};

template <Kind kKind, bool kBf16, int kT, Scales kScales>
__global__ void __launch_bounds__(qmv_threads(kT), 1)
    qmv_kernel(const __grid_constant__ QmvParams p) {
  constexpr int kBlockBytes = 2 * kBlockInputs * kind_bits(kKind);  // 16 rows x 64 k
  constexpr int kChunk = chunk_blocks(kKind, kT);
  constexpr int kMostSlots = ring_slots(kKind, kT);
  const int slots = kMostSlots == 2 || kT > 1 ? kMostSlots : p.slots;
  constexpr int kTiles = qmv_tiles(kT);
  constexpr bool kGrouped = !has_row_scale(kKind);
  // Groups of 32 and minima: constants but for Scales::kAny.
  const bool half_groups = kScales == Scales::kAny && p.half_groups;
  const bool minima = kScales == Scales::kMinima || (kScales == Scales::kAny && p.minima);
  // Up to 8 tokens a chunk's activations stay in registers while the row tiles pass by, and with
  // them what the sums of a block start from: integers enter as 128 + code, and sums at
  // -(128 + zero point) x the sum of the activations, which costs nothing per row tile. (In fp16
  // 1024 + code would cost accuracy.)
  constexpr bool kHeld = kScales != Scales::kAny && kT == 1;
  constexpr bool kShifted = kHeld && kBf16 && (kKind == Kind::kInt4 || kKind == Kind::kInt5);
  constexpr bool kOffsets = kHeld && (kShifted || kScales == Scales::kMinima);
  extern __shared__ __align__(128) std::uint8_t smem[];

  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int warps = p.warps_n * p.warps_k;
  const int warp_n = warp % p.warps_n;
  const int warp_k = warp / p.warps_n;
  const int split = blockIdx.x % p.splits;
  const int row_group = blockIdx.x / p.splits;
  const int first_tile = (row_group * p.warps_n + warp_n) * p.tiles_per_warp;
  const int chunks = (p.blocks + kChunk - 1) / kChunk;
  const int chunk_begin = chunks * split / p.splits + warp_k;
  const int chunk_end = chunks * (split + 1) / p.splits;

  // [table][16 zero bytes, padded][rings][activations]
  std::uint8_t* const zeros = smem + table_bytes(kKind);
  std::uint8_t* const rings = zeros + 128;
  const int slot_bytes = kChunk * kBlockBytes + p.scale_bytes;
  // 64 inputs of each token per block, 16-byte pieces xor-ed with the token.
  const int act_block_bytes = p.m * 128;

  // With experts the thread block's tokens are those of one of them.
  int m = p.m;
  const std::uint8_t* w = p.w;
  const std::uint8_t* x = p.x;
  int first_token = 0;
  if (p.ends != nullptr) {
    fill_table<kKind>(smem, p.codebook, blockDim.x);
    wait_for_previous_kernel();
    const GroupItem item = group_item(p.ends, p.experts, p.rows,
                                      kT == 1   ? 3
                                      : kT == 2 ? 4
                                                : 5,
                                      static_cast<int>(blockIdx.y));
    if (item.expert < 0) return;
    m = item.tokens;
    w += static_cast<std::int64_t>(item.expert) * p.tiles * p.tile_bytes;
    first_token = item.first;
    x += first_token * p.x_stride_bytes;
  }
  std::uint8_t* const ring = rings + warp * (slots * slot_bytes);
  const std::uint32_t ring_at = shared_address(ring);
  const std::uint32_t acts_at = shared_address(rings + warps * (slots * slot_bytes)) +
                                warp * (p.act_slots * kChunk * act_block_bytes);

  allow_next_kernel();

  // ---- what is issued next: tile issue_tile of chunk issue_chunk into slot issue_slot
  const std::uint64_t policy = evict_first_policy();
  const std::uint8_t* const tile_base = w + min(first_tile, p.tiles - 1) * p.tile_bytes + lane * 16;
  const std::uint8_t* issue_base = tile_base;
  int issue_tile = 0;
  int issue_chunk = chunk_begin;
  int issue_slot = 0;
  int issue_act = 0;

  const bool copies_scales = kGrouped && lane * 16 < p.scale_bytes;
  // Where the chunk's codes and scales are in a row tile, and whether all its blocks exist.
  int codes_from = 0, scales_from = 0;
  bool whole = true;
  const auto enter_chunk = [&] {
    codes_from = p.codes_at + issue_chunk * (kChunk * kBlockBytes);
    if constexpr (kGrouped) {
      scales_from =
          p.scales_at + (issue_chunk * (kChunk * kBlockInputs) >> p.group_shift) * p.group_bytes;
    }
    whole = (issue_chunk + 1) * kChunk <= p.blocks;
  };
  enter_chunk();
  const auto issue_weights = [&] {
    if (issue_chunk < chunk_end) {
      const std::uint32_t to = ring_at + issue_slot * slot_bytes + lane * 16;
      const std::uint8_t* const from = issue_base + codes_from;
      const std::uint8_t* scales = issue_base + scales_from;
      if (whole) {
#pragma unroll
        for (int at = 0; at < kChunk * kBlockBytes; at += 512) {
          if (at + 512 <= kChunk * kBlockBytes || at + lane * 16 < kChunk * kBlockBytes) {
            cp_async_weights(to + at, from + at, policy);
          }
        }
      } else {  // in place of blocks past the last, which meet zeros, the last one and its scales
        const int first = issue_chunk * kChunk;
        for (int at = lane * 16; at < kChunk * kBlockBytes; at += 512) {
          const int block = min(at / kBlockBytes, p.blocks - 1 - first);
          cp_async_weights(to + at - lane * 16,
                           from - lane * 16 + block * kBlockBytes + at % kBlockBytes, policy);
        }
        if constexpr (kGrouped) {
          const int last = (p.blocks * kBlockInputs - 1 >> p.group_shift) * p.group_bytes;
          const int own = scales_from - p.scales_at + lane * 16;
          scales -= max(0, own - (last + lane * 16 % p.group_bytes));
        }
      }
      if constexpr (kGrouped) {
        if (copies_scales) cp_async_weights(to + kChunk * kBlockBytes, scales, policy);
      }
    }
    issue_slot = issue_slot + 1 == slots ? 0 : issue_slot + 1;
    if (++issue_tile == p.tiles_per_warp) {
      issue_tile = 0;
      issue_base = tile_base;
      issue_chunk += p.warps_k;
      enter_chunk();
    } else if (first_tile + issue_tile < p.tiles) {  // past the end: the last tile again, unused
      issue_base += p.tile_bytes;
    }
  };
  const auto issue_activations = [&](int chunk) {
    if (chunk < chunk_end) {
      constexpr int kPieces = kChunk * 8;      // of 16 bytes, per token
      constexpr int kRows = kLanes / kPieces;  // at a time
      const int piece = lane % kPieces;
      int row = lane / kPieces;
      const std::uint8_t* from = x + row * p.x_stride_bytes + chunk * (kChunk * 128) + piece * 16;
      std::uint32_t to = acts_at + issue_act * (kChunk * act_block_bytes) +
                         piece / 8 * act_block_bytes + row * 128;
      const bool exists = chunk * kChunk + piece / 8 < p.blocks;  // zeros past the last block
#pragma unroll 1
      for (; row < m; row += kRows) {
        const std::uint32_t at = to + ((piece % 8 ^ row % 8) << 4);
        if (exists) {
          cp_async_shared_use(at, from);
        } else {
          store4_shared(at, 0, 0, 0, 0);
        }
        from += kRows * p.x_stride_bytes;
        to += kRows * 128;
      }
    }
    issue_act = issue_act + 1 == p.act_slots ? 0 : issue_act + 1;
  };

  // ---- fill the ring: weights do not depend on the previous kernel, activations do. One unit goes
  // before them, for activations arrive behind all that was asked for earlier: with the whole ring
  // ahead of them the first multiplication waited for 70 KB instead of 35. One loop, because
  // ptxas 13.0 gives a second copy of issue_weights() a descriptor in an odd uniform register,
  // an illegal instruction.
#pragma unroll 1
  for (int i = 0; i < slots - 1; ++i) {
    issue_weights();
    if (i == 0) {
      if (threadIdx.x < 8) reinterpret_cast<std::uint32_t*>(zeros)[threadIdx.x] = 0;
      if (p.ends == nullptr) {
        fill_table<kKind>(smem, p.codebook, blockDim.x);
        wait_for_previous_kernel();
      }
      const int chunks_ahead = kHeld ? 1 : (slots - 1 + p.tiles_per_warp - 1) / p.tiles_per_warp;
      for (int c = 0; c < chunks_ahead; ++c) issue_activations(chunk_begin + c * p.warps_k);
    }
    cp_async_commit();
  }
  __syncthreads();  // zeros and table

  const Decoding how{p.zero_pair, smem, static_cast<std::uint32_t>(lane * 4)};
  const std::uint32_t zeros_at = shared_address(zeros);
  // This lane's row of the activation matrices, or zeros beyond the last token.
  std::uint32_t act_row[kT];
  bool act_valid[kT];
#pragma unroll
  for (int t = 0; t < kT; ++t) {
    const int row = t * 8 + lane % 8;
    act_valid[t] = row < m;
    act_row[t] = row * 128;
  }

  // B of a block: k-step 2i in b[t][i][0..1], 2i + 1 in b[t][i][2..3].
  const auto load_activations = [&](std::uint32_t(&b)[kT][2][4], std::uint32_t from) {
#pragma unroll
    for (int t = 0; t < kT; ++t) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int piece = part * 4 + lane / 8;
        const std::uint32_t at = from + act_row[t] + ((piece ^ (lane & 7)) << 4);
        ldmatrix_x4(b[t][part], act_valid[t] ? at : zeros_at);
      }
    }
  };

  std::uint32_t held[kHeld ? kChunk : 1][kT][2][4];
  float offsets[kOffsets ? kChunk : 1][4];
  const auto hold_activations = [&](std::uint32_t from) {
#pragma unroll
    for (int block = 0; block < kChunk; ++block) {
      load_activations(held[block], from + block * act_block_bytes);
    }
    if constexpr (kOffsets) {
      constexpr std::uint32_t kOne = kBf16 ? 0x3f803f80u : 0x3c003c00u;
      const std::uint32_t factor = kShifted ? p.zero_pair : kOne;
      const std::uint32_t factors[4] = {factor, factor, factor, factor};
#pragma unroll
      for (int block = 0; block < kChunk; ++block) {
        offsets[block][0] = offsets[block][1] = offsets[block][2] = offsets[block][3] = 0;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const auto& b = held[block][0][step / 2];
          mma_m16n8k16<kBf16>(offsets[block], factors, b[step % 2 * 2], b[step % 2 * 2 + 1]);
        }
      }
    }
  };
  float acc[kTiles][kT][4] = {};
  int slot = 0;
  int act = 0;
  for (int chunk = chunk_begin; chunk < chunk_end; chunk += p.warps_k) {
    const std::uint32_t act_from = acts_at + act * (kChunk * act_block_bytes);
    act = act + 1 == p.act_slots ? 0 : act + 1;
    const int blocks = min(kChunk, p.blocks - chunk * kChunk);
    const int first_group = chunk * (kChunk * kBlockInputs) >> p.group_shift;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      if (r >= p.tiles_per_warp) break;
      if (slots == kMostSlots) {
        cp_async_wait<kMostSlots - 2>();
      } else {
        cp_async_wait<0>();  // two
      }
      __syncwarp();  // every lane's copies are here; every lane has left the slot issued below
      if constexpr (kHeld) {
        if (r == 0) {
          hold_activations(act_from);
          __syncwarp();  // every lane has read what the next chunk's activations replace
          issue_activations(chunk + p.warps_k);
        }
      } else {
        if (issue_tile == 0) issue_activations(issue_chunk);
      }
      issue_weights();
      cp_async_commit();
      const std::uint8_t* const unit = ring + slot * slot_bytes;
      slot = slot + 1 == slots ? 0 : slot + 1;

      if constexpr (kHeld) {
        // Words {scale of row g, of row g + 8}, with minima then {minimum g, g + 8}.
        const std::uint8_t* const scales =
            unit + kChunk * kBlockBytes + lane / 4 * (minima ? 8 : 4);
#pragma unroll
        for (int block = 0; block < kChunk; ++block) {
          LaneCodes<kKind> codes;
          codes.load(unit + block * kBlockBytes, lane);
          float sums[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[i] = !kGrouped ? acc[r][0][i] : kShifted ? offsets[block][i] : 0.0f;
          }
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            std::uint32_t a[4];
            codes.template operand<kBf16, kShifted>(a, step, how);
            const auto& b = held[block][0][step / 2];
            mma_m16n8k16<kBf16>(sums, a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
          }
          if constexpr (kGrouped) {
            const auto* const at = reinterpret_cast<const __half2*>(
                scales + (block * kBlockInputs >> p.group_shift) * p.group_bytes);
            const float2 scale = __half22float2(at[0]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              acc[r][0][i] = fmaf(i < 2 ? scale.x : scale.y, sums[i], acc[r][0][i]);
            }
            if constexpr (kScales == Scales::kMinima) {
              // The offsets are the sums of the activations, shifted -128 times them.
              constexpr float kBack = kShifted ? -0.0078125f : 1.0f;
              const float2 minimum = __half22float2(at[1]);
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                acc[r][0][i] =
                    fmaf((i < 2 ? minimum.x : minimum.y) * kBack, offsets[block][i], acc[r][0][i]);
              }
            }
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[r][0][i] = sums[i];
          }
        }
        continue;
      }
#pragma nv_diagnostic push
#pragma nv_diag_suppress 128
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        std::uint32_t b[kT][2][4];
        load_activations(b, act_from + block * act_block_bytes);
        LaneCodes<kKind> codes;
        codes.load(unit + block * kBlockBytes, lane);
        if constexpr (has_row_scale(kKind)) {
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            std::uint32_t a[4];
            codes.template operand<kBf16>(a, step, how);
#pragma unroll
            for (int t = 0; t < kT; ++t) {
              mma_m16n8k16<kBf16>(acc[r][t], a, b[t][step / 2][step % 2 * 2],
                                  b[t][step / 2][step % 2 * 2 + 1]);
            }
          }
        } else {
          // Words {scale of row g, of row g + 8}, with minima then {minimum g, g + 8}.
          const int group =
              ((chunk * kChunk + block) * kBlockInputs >> p.group_shift) - first_group;
          const std::uint8_t* const scales =
              unit + kChunk * kBlockBytes + group * p.group_bytes + lane / 4 * (minima ? 8 : 4);
          float sums[kT][4] = {};
          const auto scale_into = [&](float2 s) {
#pragma unroll
            for (int t = 0; t < kT; ++t) {
              acc[r][t][0] = fmaf(s.x, sums[t][0], acc[r][t][0]);
              acc[r][t][1] = fmaf(s.x, sums[t][1], acc[r][t][1]);
              acc[r][t][2] = fmaf(s.y, sums[t][2], acc[r][t][2]);
              acc[r][t][3] = fmaf(s.y, sums[t][3], acc[r][t][3]);
            }
          };
          const auto scale_at = [&](int bytes) {
            return __half22float2(*reinterpret_cast<const __half2*>(scales + bytes));
          };
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            std::uint32_t a[4];
            codes.template operand<kBf16>(a, step, how);
#pragma unroll
            for (int t = 0; t < kT; ++t) {
              mma_m16n8k16<kBf16>(sums[t], a, b[t][step / 2][step % 2 * 2],
                                  b[t][step / 2][step % 2 * 2 + 1]);
            }
            if (step == 1 && half_groups) {
              scale_into(scale_at(0));
#pragma unroll
              for (int t = 0; t < kT; ++t) {
                sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = 0;
              }
            }
          }
          scale_into(scale_at(half_groups ? p.group_bytes : 0));
          if (minima) {  // minimum x sum of the activations: one more product, by ones
            constexpr std::uint32_t kOne = kBf16 ? 0x3f803f80u : 0x3c003c00u;
            const std::uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
            for (int part = 0; part < 2; ++part) {
#pragma unroll
              for (int t = 0; t < kT; ++t) {
                if (part == 0 || half_groups) {
                  sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = 0;
                }
                mma_m16n8k16<kBf16>(sums[t], ones, b[t][part][0], b[t][part][1]);
                mma_m16n8k16<kBf16>(sums[t], ones, b[t][part][2], b[t][part][3]);
              }
              if (part == 0 && half_groups) scale_into(scale_at(4));
            }
            scale_into(scale_at(4 + (half_groups ? p.group_bytes : 0)));
          }
        }
      }
#pragma nv_diagnostic pop
    }
  }

  // ---- sum the warps along K, then the blocks of the cluster, in order. Sums lie in shared memory
  // as in registers, 16 bytes per lane, row tile and 8 tokens: no bank is asked for twice. A pair
  // is a lane's two tokens of one row.
  cp_async_wait<0>();
  __syncthreads();  // the rings become room for partial sums
  constexpr int kTilePairs = kT * kLanes * 2;
  const int warp_pairs = p.tiles_per_warp * kTilePairs;
  auto* const partial = reinterpret_cast<float2*>(rings);
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    if (r >= p.tiles_per_warp) break;
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      reinterpret_cast<float4*>(partial + warp * warp_pairs)[(r * kT + t) * kLanes + lane] =
          make_float4(acc[r][t][0], acc[r][t][1], acc[r][t][2], acc[r][t][3]);
    }
  }
  __syncthreads();
  const int pairs = p.warps_n * warp_pairs;
  const int first_row = row_group * p.warps_n * p.tiles_per_warp * 16;
  const auto token_of = [&](int pair) { return pair / (kLanes * 2) % kT * 8 + pair / 2 % 4 * 2; };
  // Warp i of a row tile's warps along K is i * warps_n + its place along N.
  const auto sum_of_warps = [&](int pair) {
    const float2* at = partial + pair;
    float2 sum = *at;
#pragma unroll 4
    for (int i = 1; i < p.warps_k; ++i) {
      at += pairs;
      sum.x += at->x;
      sum.y += at->y;
    }
    return sum;
  };
  const auto finish = [&](int pair, float2 sum) {
    const std::int64_t n = first_row + pair / kTilePairs * 16 + pair % 2 * 8 + pair / 8 % 8;
    if (n >= p.n) return;
    float scale = 1;
    if constexpr (has_row_scale(kKind)) {
      scale = reinterpret_cast<const float*>(w + n / 16 * p.tile_bytes)[n % 16];
    }
    const float bias = bias_at(p.bias, p.bias_dtype, n);
    const int token = token_of(pair);
    const std::int64_t at = (first_token + token) * p.out_stride + n;
    store_out<kBf16>(p.out, at, sum.x * p.factor * scale + bias);
    if (token + 1 < m) store_out<kBf16>(p.out, at + p.out_stride, sum.y * p.factor * scale + bias);
  };
  if (p.splits == 1) {
    for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
      if (token_of(pair) < m) finish(pair, sum_of_warps(pair));
    }
    return;
  }
  float2* const block_sum = partial + p.warps_k * pairs;
  for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
    if (token_of(pair) < m) block_sum[pair] = sum_of_warps(pair);
  }
  cluster_barrier();
  const std::uint32_t block_sum_at = shared_address(block_sum);
  for (int pair = pairs * split / p.splits + threadIdx.x; pair < pairs * (split + 1) / p.splits;
       pair += blockDim.x) {
    if (token_of(pair) >= m) continue;
    float2 sum{};
    for (int rank = 0; rank < p.splits; ++rank) {
      sum.x += load_from_cluster(block_sum_at + 8 * pair, rank);
      sum.y += load_from_cluster(block_sum_at + 8 * pair + 4, rank);
    }
    finish(pair, sum);
  }
  cluster_barrier();  // nobody leaves while its sums are being read
}

// Launches the kernel of one kind; defined by LOWBIT_DEFINE_QMV in one file per kind.
template <Kind kKind>
int launch_qmv(const QmvParams& params, bool bf16, const QmvShape& shape, Stream stream);

#define LOWBIT_DEFINE_QMV(kind)                                                                    \
  template <>                                                                                      \
  int launch_qmv<kind>(const QmvParams& params, bool bf16, const QmvShape& shape, Stream stream) { \
    const int rows = params.warps_n * params.tiles_per_warp;                                       \
    const dim3 grid(static_cast<unsigned>((params.tiles + rows - 1) / rows * params.splits),       \
                    static_cast<unsigned>(params.items));                                          \
    const auto threads = static_cast<unsigned>(params.warps_n * params.warps_k * kLanes);          \
    const std::size_t bytes = params.shared_bytes;                                                 \
    const auto launch = [&](auto kernel) {                                                         \
      return launch_cluster(kernel, grid, threads, bytes, params.splits, shape.early, stream,      \
                            {&params});                                                            \
    };                                                                                             \
    const auto tokens = [&](auto bf16_c, auto scales_c) {                                          \
      constexpr bool kB = decltype(bf16_c)::value;                                                 \
      constexpr Scales kS = decltype(scales_c)::value;                                             \
      return params.m <= 8    ? launch(qmv_kernel<kind, kB, 1, kS>)                                \
             : params.m <= 16 ? launch(qmv_kernel<kind, kB, 2, kS>)                                \
                              : launch(qmv_kernel<kind, kB, 4, kS>);                               \
    };                                                                                             \
    const auto scales = [&](auto scales_c) {                                                       \
      return bf16 ? tokens(std::true_type{}, scales_c) : tokens(std::false_type{}, scales_c);      \
    };                                                                                             \
    if constexpr (!has_row_scale(kind)) {                                                          \
      if (params.half_groups) return scales(std::integral_constant<Scales, Scales::kAny>{});       \
    }                                                                                              \
    if constexpr (kind == Kind::kInt4 || kind == Kind::kInt5) {                                    \
      if (params.minima) return scales(std::integral_constant<Scales, Scales::kMinima>{});         \
    }                                                                                              \
    return scales(std::integral_constant<Scales, Scales::kPlain>{});                               \
  }

}  // namespace lowbit::cuda
