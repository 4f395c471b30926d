// Any batch on sm_90: out[m][n] = sum_k x[m][k] W[n][k] with wgmma, weights dequantized between
// shared memory and the registers of the A operand, activations as B in shared memory.
//
// A thread block multiplies up to 128 outputs x kTokens tokens: two warpgroups of 64 outputs, a row
// tile of 16 per warp. Up to 128 tokens two more take turns with them along K (with one of 64
// outputs three): what bounds a warp is the latency of dequantizing, and four warps per scheduler
// hide it. One more warp keeps a ring of stages full by the copy engine: three tensor maps, for
// codes, scales and activations, so that a copy takes the row tiles of the whole thread block at
// once (one bulk copy per row tile took twice as long, and cp.async by the multiplying warps half
// of their instructions). All of its lanes run the loop and one starts the copies: with a single
// lane the compiler cannot tell that addresses are uniform, and a stage takes four times as many
// instructions. Inputs past K and rows past M read as zeros.
//
// Scales. Up to 64 tokens (kScaleSums) codes enter as exact small numbers; the sums of a block of
// 64 inputs are multiplied by their scale in fp32, minima (up to 16 tokens) by the sum of the
// activations, which wgmma with ones yields. With more tokens that costs too much, and weights are
// scaled before the product and rounded once to the dtype of x, as a dequantized weight would be:
// for bf16, whose 8 bits cannot hold an fp16 scale, by two factors s = high + low, w = fma(q, high,
// q low); with minima in fp32. Then a warp dequantizes one k-step of 16 inputs, issues its wgmma,
// and dequantizes the next while up to three are in flight: an A operand in registers holds a warp
// at its next wgmma until the tensor core takes it, so what is to overlap must stand between two of
// them.
//
// A thread block goes through its share of tiles, the ring running on across them; what is left
// over when every thread block had the same number of tiles, the thread blocks of a cluster share
// along K, and sum in order through distributed shared memory: deterministic, and no workspace.
#pragma once

#include <cuda.h>

#include "cuda/qmv.cuh"
#include "cuda/wgmma.cuh"

namespace lowbit::cuda {

struct QmmParams {
  const std::uint8_t* w;  // for scales of rows
  std::uint8_t* out;
  const void* bias;
  const float* token_scales;  // of activations in e4m3
  const std::int32_t* ends;   // of the tokens of each expert; nullptr: one matrix for all tokens
  std::int64_t tile_bytes;
  std::int64_t out_stride;
  std::int32_t m, n;
  std::int32_t stages;               // of the whole K
  std::int32_t tiles;                // row tiles of a thread block
  std::int32_t token_groups;         // tiles of tokens
  std::int32_t works;                // tiles of outputs x tokens
  std::int32_t rounds;               // tiles that every thread block has for itself
  std::int32_t splits, split_shift;  // 2^shift thread blocks of a cluster share a tile after that
  std::int32_t experts, row_groups;  // with experts; tiles of outputs of each
  std::int32_t group_shift, group_bytes;
  std::int32_t scale_bytes;       // of a stage and row tile
  std::int32_t block_scale_step;  // from a block's scales to the next block's, in a stage
  std::uint32_t zero_pair;
  float factor;
  DType bias_dtype;
  Format format;
  bool minima;
  bool weights_once;  // no other thread block reads the same weights
  bool vector_out;    // out's rows are aligned to 16 bytes
};

struct QmmMaps {
  CUtensorMap x, codes, scales;
};

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
// A warpgroup transposes its results in shared memory, so many tokens at a time.
constexpr int kQmmFlip = 32;
constexpr int kQmmFlipBytes = 64 * 2 + 16;  // of a token: 64 outputs and, against conflicts, 16
// Floats between the tokens of a thread block's sums; lanes of one store fall into different banks.
LOWBIT_HD constexpr int qmm_run(int groups) {
  return groups * 64 + 4;
}

// Tokens whose sums one turn hands to the other at a time.
LOWBIT_HD constexpr int qmm_turn_tokens(int tokens) {
  return tokens < 64 ? tokens : 64;
}

LOWBIT_HD constexpr int qmm_fixed_bytes(Kind kind, int tokens, int groups) {
  const int sums =
      qmm_turns(kind, tokens, groups) > 1 ? qmm_turn_tokens(tokens) * qmm_run(groups) * 4 : 0;
  return 1024 + table_bytes(kind) +
         groups * (tokens < kQmmFlip ? tokens : kQmmFlip) * kQmmFlipBytes + sums + 256;
}
LOWBIT_HD constexpr int qmm_stage_bytes(Kind kind, Scales scales, int tokens, int groups) {
  return (is_raw(kind) ? 1 : qmm_stage_blocks(kind, tokens)) * tokens * 128 +
         groups * 4 *
             (qmm_stage_blocks(kind, tokens) * 2 * kBlockInputs * kind_bits(kind) +
              qmm_scale_room(kind, scales, tokens));
}
// Stages of the ring; a multiple of the turns, so that a slot always belongs to the same one.
LOWBIT_HD constexpr int qmm_ring(Kind kind, Scales scales, int tokens, int groups) {
  const int stages = (227 * 1024 - qmm_fixed_bytes(kind, tokens, groups)) /
                     qmm_stage_bytes(kind, scales, tokens, groups);
  const int turns = qmm_turns(kind, tokens, groups);
  const int most = turns == 1 ? 8 : 16;  // barriers for 16 have room
  return (stages > most ? most : stages) / turns * turns;
}
LOWBIT_HD constexpr int qmm_shared_bytes(Kind kind, Scales scales, int tokens, int groups) {
  return qmm_fixed_bytes(kind, tokens, groups) +
         qmm_ring(kind, scales, tokens, groups) * qmm_stage_bytes(kind, scales, tokens, groups);
}

// A group's scale (and minimum) of one row, ready to multiply pairs of weights.
template <bool kBf16>
struct PairScale {
  std::uint32_t high, low;  // bf16: s = high + low; fp16: s and the minimum
  float scale, minimum;     // bf16 with minima

  __device__ __forceinline__ void set(float s, float m, bool minima) {
    if constexpr (kBf16) {
      if (minima) {
        scale = s;
        minimum = m;
      } else {
        high = float_pair<true>(s, s);
        const float rest = s - __uint_as_float(high & 0xffff0000u);
        low = float_pair<true>(rest, rest);
      }
    } else {
      high = float_pair<false>(s, s);
      low = float_pair<false>(m, m);
    }
  }

  template <bool kMinima>
  __device__ __forceinline__ std::uint32_t apply(std::uint32_t pair) const {
    if constexpr (!kBf16) {
      return fma_pair<false>(pair, high, low);
    } else if constexpr (kMinima) {
      const float first = fmaf(__uint_as_float(pair << 16), scale, minimum);
      const float second = fmaf(__uint_as_float(pair & 0xffff0000u), scale, minimum);
      return float_pair<true>(first, second);
    } else {
      return fma_pair<true>(pair, high, fma_pair<true>(pair, low, 0x80008000u));
    }
  }
};

// Large tiles need more registers than an even share: the copying warps, a whole warpgroup then,
// give theirs away.
LOWBIT_HD constexpr int qmm_threads(Kind kind, int tokens, int groups) {
  return groups * qmm_turns(kind, tokens, groups) * 128 + 128;
}

// Registers that wgmma wrote are read after the wait before, not earlier.
template <int kCount>
__device__ __forceinline__ void settle(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <Kind kKind, bool kBf16, int kTokens, int kGroups, Scales kScales>
__global__ void __launch_bounds__(qmm_threads(kKind, kTokens, kGroups), 1)
    qmm_kernel(const __grid_constant__ QmmParams p, const __grid_constant__ QmmMaps maps) {
  constexpr int kBlockBytes = 2 * kBlockInputs * kind_bits(kKind);
  constexpr int kBlocks = qmm_stage_blocks(kKind, kTokens);
  constexpr int kRing = qmm_ring(kKind, kScales, kTokens, kGroups);
  constexpr int kTurns = qmm_turns(kKind, kTokens, kGroups);
  constexpr int kTiles = kGroups * 4;                 // at most
  constexpr int kThreads = kTiles * kTurns * kLanes;  // that multiply
  constexpr bool kRaw = is_raw(kKind);
  constexpr int kActBytes = (kRaw ? 1 : kBlocks) * kTokens * 128;
  constexpr int kCodeBytes = kTiles * kBlocks * kBlockBytes;
  constexpr int kScaleBytes = kTiles * qmm_scale_room(kKind, kScales, kTokens);
  constexpr int kFlip = kTokens < kQmmFlip ? kTokens : kQmmFlip;
  constexpr int kRun = qmm_run(kGroups);
  constexpr bool kGrouped = !has_row_scale(kKind);
  constexpr bool kScaleSums = kGrouped && ((kScales == Scales::kPlain && kTokens <= 64) ||
                                           (kScales == Scales::kMinima && kTokens <= 16));
  constexpr bool kOnes = kScaleSums && kScales == Scales::kMinima;
  static_assert(kRing >= 3 && kRing >= 2 * kTurns, "too few stages");

  extern __shared__ __align__(1024) std::uint8_t smem_raw[];
  // The swizzle works on absolute addresses: the activations start at a multiple of 1024.
  std::uint8_t* const acts = smem_raw + (1024 - (shared_address(smem_raw) & 1023)) % 1024;
  std::uint8_t* const codes_ring = acts + kRing * kActBytes;
  std::uint8_t* const scales_ring = codes_ring + kRing * kCodeBytes;
  std::uint8_t* const table_base = scales_ring + kRing * kScaleBytes;
  std::uint8_t* const flips = table_base + table_bytes(kKind);
  std::uint8_t* const turn_sums = flips + kGroups * kFlip * kQmmFlipBytes;
  const std::uint32_t barriers =
      shared_address(turn_sums) + (kTurns > 1 ? qmm_turn_tokens(kTokens) * kRun * 4 : 0);
  const auto full = [&](int slot) { return barriers + slot * 8; };
  const auto empty = [&](int slot) { return barriers + (kRing + slot) * 8; };

  // What this thread block does: tiles of its own, then its part of a shared one. Experts have
  // tiles of outputs x a run of their tokens, one run after the other.
  struct Job {
    int first_row, first_token, tokens;
    int first_tile;  // of the expert's matrix
    int split, begin, steps;
  };
  const auto dense_job = [&](int work, int split, int begin, int end) {
    const int row_group = work / p.token_groups;
    const int first_token = (work - row_group * p.token_groups) * kTokens;
    return Job{row_group * (p.tiles * 16),
               first_token,
               min(kTokens, p.m - first_token),
               0,
               split,
               begin,
               end - begin};
  };
  const auto job_at = [&](int round, Job& job) {
    const int own = round * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    if (p.ends != nullptr) {
      const int run = own / p.row_groups;
      constexpr int kShift = kTokens == 8     ? 3
                             : kTokens == 16  ? 4
                             : kTokens == 32  ? 5
                             : kTokens == 64  ? 6
                             : kTokens == 128 ? 7
                                              : 8;
      const GroupItem item = group_item(p.ends, p.experts, p.m, kShift, run);
      job = {(own - run * p.row_groups) * (p.tiles * 16),
             item.first,
             item.tokens,
             item.expert * ((p.n + 15) / 16),
             -1,
             0,
             p.stages};
      return item.expert >= 0;
    }
    if (round < p.rounds) {
      job = dense_job(own, -1, 0, p.stages);
      return true;
    }
    const int cluster = static_cast<int>(blockIdx.x) >> p.split_shift;
    const int split = static_cast<int>(blockIdx.x) & (p.splits - 1);
    const int work = p.rounds * static_cast<int>(gridDim.x) + cluster;
    if (round > p.rounds || work >= p.works) return false;
    job = dense_job(work, p.splits == 1 ? -1 : split, p.stages * split >> p.split_shift,
                    p.stages * (split + 1) >> p.split_shift);
    return true;
  };

  allow_next_kernel();
  if (threadIdx.x >= kThreads) {
    // ---- the warp that copies. All its lanes follow, so that the compiler sees uniform values;
    // one starts the copies. It need not wait for the others: they for its barriers.
    give_registers<kTurns == 1 ? 40 : 32>();
    if (threadIdx.x / kLanes != kThreads / kLanes) return;
    if (threadIdx.x % kLanes < kRing) {
      barrier_init(full(threadIdx.x % kLanes), 1);
      barrier_init(empty(threadIdx.x % kLanes), kTiles);
      barrier_init_fence();
    }
    if (threadIdx.x == kThreads) {
      prefetch_map(&maps.codes);
      if constexpr (kGrouped) prefetch_map(&maps.scales);
      prefetch_map(&maps.x);
    }
    __syncwarp();
    named_barrier_arrive(1, kThreads + kLanes);
    const bool leader = elect_lane();
    const std::uint64_t policy = p.weights_once ? evict_first_policy() : evict_normal_policy();
    const std::uint32_t bytes = kActBytes + p.tiles * (kBlocks * kBlockBytes + p.scale_bytes);
    const std::uint32_t acts_at = shared_address(acts);
    const std::uint32_t codes_at = shared_address(codes_ring);
    const std::uint32_t scales_at = shared_address(scales_ring);
    Job job{};
    const auto copy_weights = [&](int step, int slot) {
      const int stage = job.begin + step;
      const int tile = job.first_tile + job.first_row / 16;
      barrier_expect(full(slot), bytes);
      tensor_load(codes_at + slot * kCodeBytes, &maps.codes, stage * (kBlocks * kBlockBytes / 8),
                  tile, full(slot), policy);
      if constexpr (kGrouped) {
        const int group = stage * (kBlocks * kBlockInputs) >> p.group_shift;
        tensor_load(scales_at + slot * kScaleBytes, &maps.scales, group * (p.group_bytes / 4), tile,
                    full(slot), policy);
      }
    };
    const auto copy_activations = [&](int step, int slot) {
      constexpr int kBoxes = kRaw ? 1 : kBlocks;
      constexpr int kBoxInputs = kRaw ? 2 * kBlockInputs : kBlockInputs;
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        tensor_load(acts_at + slot * kActBytes + i * (kTokens * 128), &maps.x,
                    ((job.begin + step) * kBoxes + i) * kBoxInputs, job.first_token, full(slot));
      }
    };
    // The ring is filled once without waiting: weights do not depend on the previous kernel,
    // activations do.
    int ahead = 0;
    const auto fill = [&](auto copy) {
      int slot = 0;
#pragma unroll 1
      for (int round = 0; slot < kRing && job_at(round, job); ++round) {
#pragma unroll 1
        for (int step = 0; slot < kRing && step < job.steps; ++step, ++slot) {
          if (leader) copy(step, slot);
        }
      }
      ahead = slot;
    };
    if (p.ends != nullptr) wait_for_previous_kernel();
    fill(copy_weights);
    wait_for_previous_kernel();
    fill(copy_activations);
    int slot = 0;
    std::uint32_t parity = 0;  // of the release to wait for
#pragma unroll 1
    for (int round = 0, skip = ahead; job_at(round, job); ++round) {
#pragma unroll 1
      for (int step = min(skip, job.steps); step < job.steps; ++step) {
        barrier_wait(empty(slot), parity);
        if (leader) {
          copy_weights(step, slot);
          copy_activations(step, slot);
        }
        if (++slot == kRing) {
          slot = 0;
          parity ^= 1;
        }
      }
      skip -= min(skip, job.steps);
    }
    return;
  }

  // ---- the warps that multiply
  fill_table<kKind, kBf16>(table_base, p.format, kThreads);
  named_barrier(1, kThreads + kLanes);
  take_registers<kTurns == 1 ? 232 : 112>();
  const int lane = threadIdx.x % kLanes;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kLanes, 0);  // uniform to the compiler
  const int tile = warp % kTiles;  // past p.tiles: nothing of use, and dropped
  const int turn = kTurns == 1 ? 0 : warp / kTiles;
  const std::uint8_t* const table = table_base + lane * 4;
  const std::uint8_t* const my_codes = codes_ring + tile * (kBlocks * kBlockBytes);
  const std::uint8_t* const my_scales =
      scales_ring + tile * p.scale_bytes +
      lane / 4 * (kScales == Scales::kMinima || (kScales == Scales::kAny && p.minima) ? 8 : 4);
  const std::uint32_t acts_at = shared_address(acts);
  int slot = turn;
  std::uint32_t parity = 0;
  int stage_count = 0;  // of all jobs before
  const auto next_slot = [&] {
    slot += kTurns;
    if (slot >= kRing) {
      slot = turn;
      parity ^= 1;
    }
  };
  const auto activations_of = [&](int s) {
    return wgmma_descriptor(acts_at + slot * kActBytes + s * (kTokens * 128));
  };

  if (p.ends != nullptr) wait_for_previous_kernel();
  Job job{};
  for (int round = 0; job_at(round, job); ++round) {
    // Stages of this job and turn.
    const int first_stage = (turn - stage_count) & (kTurns - 1);
    const int steps = (job.steps - first_stage + kTurns - 1) / kTurns;
    stage_count += job.steps;
    float acc[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0;

    if constexpr (kScaleSums) {
      // A block's products go to `sums`, and while they are made the next block is dequantized.
      float sums[kTokens / 2], ones_sums[kOnes ? kTokens / 2 : 1];
      std::uint32_t a[kBlocks][4][4] = {};
      float2 scale[kBlocks] = {}, minimum[kBlocks] = {};
      const auto dequantize = [&](auto place) {
        constexpr int s = decltype(place)::value;
        if (tile >= p.tiles) return;
        LaneCodes<kKind> codes;
        codes.load(my_codes + slot * kCodeBytes + s * kBlockBytes, lane);
        const auto* scales = reinterpret_cast<const __half2*>(my_scales + slot * kScaleBytes +
                                                              s * p.block_scale_step);
        scale[s] = __half22float2(scales[0]);
        if constexpr (kOnes) minimum[s] = __half22float2(scales[1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) codes.template operand<kBf16>(a[s][j], j, p.zero_pair, table);
      };
      const auto multiply = [&](auto place) {
        constexpr int s = decltype(place)::value;
        const std::uint64_t b = activations_of(s);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Wgmma<kBf16, kTokens>::run(sums, a[s][j], b + 2 * j, j > 0);
          if constexpr (kOnes) {
            constexpr std::uint32_t kOne = kBf16 ? 0x3f803f80u : 0x3c003c00u;
            const std::uint32_t ones[4] = {kOne, kOne, kOne, kOne};
            Wgmma<kBf16, kTokens>::run(ones_sums, ones, b + 2 * j, j > 0);
          }
        }
        wgmma_commit();
      };
      const auto fold = [&](auto place) {
        constexpr int s = decltype(place)::value;
        wgmma_wait<0>();
        settle(sums);
        if constexpr (kOnes) settle(ones_sums);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          acc[i] = fmaf(i & 2 ? scale[s].y : scale[s].x, sums[i], acc[i]);
          if constexpr (kOnes) {
            acc[i] = fmaf(i & 2 ? minimum[s].y : minimum[s].x, ones_sums[i], acc[i]);
          }
        }
      };
      constexpr std::integral_constant<int, 0> kFirst;
      if constexpr (kBlocks == 1) {
        // No registers for a second A operand: other warps fill the waits.
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          barrier_wait(full(slot), parity);
          dequantize(kFirst);
          multiply(kFirst);
          fold(kFirst);
          if (lane == 0) barrier_arrive(empty(slot));
          next_slot();
        }
      } else {
        constexpr std::integral_constant<int, 1> kSecond;
        if (steps > 0) {
          barrier_wait(full(slot), parity);
          dequantize(kFirst);
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          multiply(kFirst);
          dequantize(kSecond);
          fold(kFirst);
          multiply(kSecond);
          const std::uint32_t done = empty(slot);
          next_slot();
          if (step + 1 < steps) {
            barrier_wait(full(slot), parity);
            dequantize(kFirst);
          }
          fold(kSecond);
          if (lane == 0) barrier_arrive(done);
        }
      }
    } else if constexpr (kRaw) {
      // Two k-steps of 32 inputs per block. A lane's words hold rows g and g + 8 by turns of bytes:
      // one permutation per register.
      std::uint32_t a[4][4];
      int last_slot = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full(slot), parity);
        const std::uint64_t b = activations_of(0);
#pragma unroll
        for (int s = 0; s < kBlocks; ++s) {
          LaneCodes<kKind> codes;
          codes.load(my_codes + slot * kCodeBytes + s * kBlockBytes, lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = 2 * s + half;
            wgmma_wait<3>();
            if (j == 3 && step > 0 && lane == 0) barrier_arrive(empty(last_slot));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const std::uint32_t first = codes.words[4 * half + 2 * i];
              const std::uint32_t second = codes.words[4 * half + 2 * i + 1];
              a[j][2 * i] = __byte_perm(first, second, 0x6420);
              a[j][2 * i + 1] = __byte_perm(first, second, 0x7531);
            }
            wgmma_fence();
            WgmmaEight<kKind == Kind::kE4M3Raw, kTokens>::run(acc, a[j], b + 2 * j);
            wgmma_commit();
          }
        }
        last_slot = slot;
        next_slot();
      }
      wgmma_wait<0>();
      if (lane == 0 && steps > 0) barrier_arrive(empty(last_slot));
    } else {
      std::uint32_t a[4][4];
      // One block of 64 inputs; s is its place in the stage. When all of the block before is done,
      // `last_slot` is free.
      const auto block = [&](int s, int last_slot, bool release) {
        LaneCodes<kKind> codes;
        codes.load(my_codes + slot * kCodeBytes + s * kBlockBytes, lane);
        const std::uint64_t b = activations_of(s);
        const std::uint8_t* const scales = my_scales + slot * kScaleBytes + s * p.block_scale_step;
        const auto scale_at = [&](int bytes) {
          return __half22float2(*reinterpret_cast<const __half2*>(scales + bytes));
        };
        PairScale<kBf16> pair_scale[2];  // rows g, g + 8
        const auto set_scales = [&](int from) {
          const bool minima = kScales == Scales::kMinima || (kScales == Scales::kAny && p.minima);
          const float2 scale = scale_at(from);
          float2 minimum = {0, 0};
          if (minima) minimum = scale_at(from + 4);
          pair_scale[0].set(scale.x, minimum.x, minima);
          pair_scale[1].set(scale.y, minimum.y, minima);
        };
        if constexpr (kGrouped) set_scales(0);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma_wait<3>();
          if (j == 3 && release && lane == 0) barrier_arrive(empty(last_slot));
          if constexpr (kGrouped && kScales == Scales::kAny) {
            if (j == 2) set_scales(p.group_bytes);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            std::uint32_t pair = codes.template pair<kBf16>(4 * j + i, p.zero_pair, table);
            if constexpr (kGrouped) {
              const PairScale<kBf16>& scale = pair_scale[i & 1];
              if constexpr (kScales == Scales::kMinima) {
                pair = scale.template apply<true>(pair);
              } else if constexpr (kScales == Scales::kAny && kBf16) {
                pair =
                    p.minima ? scale.template apply<true>(pair) : scale.template apply<false>(pair);
              } else {
                pair = scale.template apply<false>(pair);
              }
            }
            a[j][i] = pair;
          }
          wgmma_fence();
          Wgmma<kBf16, kTokens>::run(acc, a[j], b + 2 * j, 1);
          wgmma_commit();
        }
      };
      int last_slot = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full(slot), parity);
        block(0, last_slot, step > 0);
        if constexpr (kBlocks == 2) block(1, 0, false);
        last_slot = slot;
        next_slot();
      }
      wgmma_wait<0>();
      if (lane == 0 && steps > 0) barrier_arrive(empty(last_slot));
    }
    settle(acc);

    // ---- out
    const int first_token = job.first_token;
    const int first_row = job.first_row;
    const int tokens = job.tokens;
    if constexpr (kRaw) {
#pragma unroll
      for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = t * 8 + lane % 4 * 2 + i;
          const float scale = token < tokens ? p.token_scales[first_token + token] : 0.0f;
          acc[4 * t + i] *= scale;
          acc[4 * t + 2 + i] *= scale;
        }
      }
    }
    const int rows = min(p.tiles * 16, p.n - first_row);
    const auto row_factor = [&](int row) {
      float factor = p.factor;
      if constexpr (!kGrouped) {
        const int n = first_row + row;
        if (row < rows) {
          const std::uint8_t* const at = p.w + (job.first_tile + n / 16) * p.tile_bytes;
          factor *= reinterpret_cast<const float*>(at)[n % 16];
        }
      }
      return factor;
    };
    const auto row_bias = [&](int row) {
      return row < rows ? bias_at(p.bias, p.bias_dtype, first_row + row) : 0.0f;
    };
    // Visits accumulators and their places in `sums`, [token][row] from token `from` on.
    const auto each_sum = [&](float* sums, int from, auto count, auto visit) {
#pragma unroll
      for (int t = 0; t < decltype(count)::value / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(sums[(t * 8 + lane % 4 * 2 + i % 2) * kRun + tile * 16 + lane / 4 + i / 2 * 8],
                acc[4 * (from / 8 + t) + i]);
        }
      }
    };
    const auto write_sum = [](float& sum, float mine) { sum = mine; };
    if constexpr (kTurns > 1) {
      constexpr std::integral_constant<int, qmm_turn_tokens(kTokens)> kPass;
      auto* const sums = reinterpret_cast<float*>(turn_sums);
#pragma unroll
      for (int from = 0; from < kTokens; from += kPass.value) {
#pragma unroll
        for (int other = 1; other < kTurns; ++other) {
          if (turn == other) each_sum(sums, from, kPass, write_sum);
          named_barrier(1, kThreads);
          if (turn == 0) each_sum(sums, from, kPass, [](float& sum, float& mine) { mine += sum; });
          named_barrier(1, kThreads);
        }
      }
    }

    if (job.split < 0) {
      if (kTurns == 1 || turn == 0) {
        // Transposed per warpgroup, kFlip tokens at a time, so that a token's 64 outputs are stored
        // together.
        const int group = tile / 4;
        std::uint8_t* const flip = flips + group * (kFlip * kQmmFlipBytes);
        const int row = tile * 16 + lane / 4;
        const float factor[2] = {row_factor(row), row_factor(row + 8)};
        const float bias[2] = {row_bias(row), row_bias(row + 8)};
        const auto packed = [&](int t, int half) {
          return float_pair<kBf16>(fmaf(acc[4 * t + 2 * half], factor[half], bias[half]),
                                   fmaf(acc[4 * t + 2 * half + 1], factor[half], bias[half]));
        };
        const std::uint32_t to = shared_address(flip) + (lane / 16 * 8 + lane % 8) * kQmmFlipBytes +
                                 tile % 4 * 32 + lane / 8 % 2 * 16;
#pragma unroll
        for (int from = 0; from < kTokens; from += kFlip) {
          if (from < tokens) {
            if constexpr (kTokens == 8) {
              stmatrix_x2_transposed(to, packed(0, 0), packed(0, 1));
            } else {
#pragma unroll
              for (int t = 0; t < kFlip / 8; t += 2) {
                const int at = from / 8 + t;
                stmatrix_x4_transposed(to + t * (8 * kQmmFlipBytes), packed(at, 0), packed(at, 1),
                                       packed(at + 1, 0), packed(at + 1, 1));
              }
            }
            named_barrier(2 + group, 128);
#pragma unroll
            for (int i = threadIdx.x % 128; i < kFlip * 8; i += 128) {
              const int token = from + i / 8;
              const int first = group * 64 + i % 8 * 8;
              if (token < tokens && first < rows) {
                const std::uint8_t* piece = flip + i / 8 * kQmmFlipBytes + i % 8 * 16;
                auto* out = reinterpret_cast<std::uint16_t*>(p.out) +
                            (first_token + token) * p.out_stride + first_row + first;
                if (p.vector_out && first + 8 <= rows) {
                  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(piece);
                } else {
                  const int count = min(8, rows - first);
                  for (int e = 0; e < count; ++e) {
                    out[e] = reinterpret_cast<const std::uint16_t*>(piece)[e];
                  }
                }
              }
            }
            named_barrier(2 + group, 128);
          }
        }
      }
    } else {
      // The last job: nobody needs the ring any more, which is where the sums go.
      if constexpr (kTurns == 1) named_barrier(1, kThreads);
      auto* const sums = reinterpret_cast<float*>(acts);
      constexpr std::integral_constant<int, kTokens> kAll;
      if (turn == 0) each_sum(sums, 0, kAll, write_sum);
      cluster_barrier();
      // The thread blocks share the tokens; a thread has four outputs of a token.
      constexpr int kRows = kTiles * 16;
      const int first = threadIdx.x % (kRows / 4) * 4;
      float factor[4], bias[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        factor[i] = row_factor(first + i);
        bias[i] = row_bias(first + i);
      }
      const std::uint32_t sums_at = shared_address(sums);
      for (int token = job.split + threadIdx.x / (kRows / 4) * p.splits;
           token < tokens && first < rows; token += kThreads / (kRows / 4) * p.splits) {
        float4 sum = {0, 0, 0, 0};
#pragma unroll
        for (int from = 0; from < 8; from += 4) {
          float4 parts[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (from + i < p.splits) {
              parts[i] = load4_from_cluster(sums_at + 4 * (token * kRun + first), from + i);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (from + i < p.splits) {
              sum.x += parts[i].x;
              sum.y += parts[i].y;
              sum.z += parts[i].z;
              sum.w += parts[i].w;
            }
          }
        }
        const std::uint32_t low =
            float_pair<kBf16>(fmaf(sum.x, factor[0], bias[0]), fmaf(sum.y, factor[1], bias[1]));
        const std::uint32_t high =
            float_pair<kBf16>(fmaf(sum.z, factor[2], bias[2]), fmaf(sum.w, factor[3], bias[3]));
        auto* out = reinterpret_cast<std::uint16_t*>(p.out) + (first_token + token) * p.out_stride +
                    first_row + first;
        if (p.vector_out && first + 4 <= rows) {
          *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
        } else {
          const std::uint16_t values[4] = {
              static_cast<std::uint16_t>(low), static_cast<std::uint16_t>(low >> 16),
              static_cast<std::uint16_t>(high), static_cast<std::uint16_t>(high >> 16)};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (first + e < rows) out[e] = values[e];
          }
        }
      }
      cluster_meet();  // nobody leaves while its sums are being read
    }
  }
}

// Which of the kernel's variants the scales need.
inline Scales qmm_scales(const QmmParams& p) {
  return p.group_shift == 5 ? Scales::kAny : p.minima ? Scales::kMinima : Scales::kPlain;
}

template <Kind kKind>
int launch_qmm(const QmmParams& params, const QmmMaps& maps, bool bf16, const QmmShape& shape,
               unsigned thread_blocks, Stream stream);

template <Kind kKind, bool kBf16, int kTokens, int kGroups, Scales kScales>
int launch_qmm_kernel(const QmmParams& p, const QmmMaps& maps, const QmmShape& shape,
                      unsigned thread_blocks, Stream stream) {
  return launch_cluster(qmm_kernel<kKind, kBf16, kTokens, kGroups, kScales>, dim3(thread_blocks),
                        qmm_threads(kKind, kTokens, kGroups),
                        qmm_shared_bytes(kKind, kScales, kTokens, kGroups), p.splits, shape.early,
                        stream, {&p, &maps});
}

#define LOWBIT_DEFINE_QMM(kind)                                                                   \
  template <>                                                                                     \
  int launch_qmm<kind>(const QmmParams& p, const QmmMaps& maps, bool bf16, const QmmShape& shape, \
                       unsigned thread_blocks, Stream stream) {                                   \
    using std::integral_constant;                                                                 \
    const auto with_scales = [&](auto tokens, auto groups, auto scales) {                         \
      constexpr int kTokens = decltype(tokens)::value;                                            \
      constexpr int kGroups = decltype(groups)::value;                                            \
      constexpr Scales kScales = decltype(scales)::value;                                         \
      return bf16 ? launch_qmm_kernel<kind, true, kTokens, kGroups, kScales>(                     \
                        p, maps, shape, thread_blocks, stream)                                    \
                  : launch_qmm_kernel<kind, false, kTokens, kGroups, kScales>(                    \
                        p, maps, shape, thread_blocks, stream);                                   \
    };                                                                                            \
    const auto launch = [&](auto tokens, auto groups) {                                           \
      const Scales scales = qmm_scales(p);                                                        \
      if constexpr (!has_row_scale(kind)) {                                                       \
        if (scales == Scales::kAny) {                                                             \
          return with_scales(tokens, groups, integral_constant<Scales, Scales::kAny>{});          \
        }                                                                                         \
      }                                                                                           \
      if constexpr (kind == Kind::kInt4 || kind == Kind::kInt5) {                                 \
        if (scales == Scales::kMinima) {                                                          \
          return with_scales(tokens, groups, integral_constant<Scales, Scales::kMinima>{});       \
        }                                                                                         \
      }                                                                                           \
      return with_scales(tokens, groups, integral_constant<Scales, Scales::kPlain>{});            \
    };                                                                                            \
    const auto any = [&](auto tokens) {                                                           \
      return shape.rows <= 64 ? launch(tokens, integral_constant<int, 1>{})                       \
                              : launch(tokens, integral_constant<int, 2>{});                      \
    };                                                                                            \
    switch (shape.tokens) {                                                                       \
      case 8:                                                                                     \
        return any(integral_constant<int, 8>{});                                                  \
      case 16:                                                                                    \
        return any(integral_constant<int, 16>{});                                                 \
      case 32:                                                                                    \
        return any(integral_constant<int, 32>{});                                                 \
      case 64:                                                                                    \
        return any(integral_constant<int, 64>{});                                                 \
      case 128:                                                                                   \
        return launch(integral_constant<int, 128>{}, integral_constant<int, 2>{});                \
      default:                                                                                    \
        return launch(integral_constant<int, 256>{}, integral_constant<int, 2>{});                \
    }                                                                                             \
  }

// With activations of 8 bits: from 64 tokens on, tiles of 128 outputs.
#define LOWBIT_DEFINE_QMM_EIGHT(kind)                                                             \
  template <>                                                                                     \
  int launch_qmm<kind>(const QmmParams& p, const QmmMaps& maps, bool bf16, const QmmShape& shape, \
                       unsigned thread_blocks, Stream stream) {                                   \
    const auto launch = [&](auto tokens) {                                                        \
      constexpr int kTokens = decltype(tokens)::value;                                            \
      return bf16 ? launch_qmm_kernel<kind, true, kTokens, 2, Scales::kPlain>(                    \
                        p, maps, shape, thread_blocks, stream)                                    \
                  : launch_qmm_kernel<kind, false, kTokens, 2, Scales::kPlain>(                   \
                        p, maps, shape, thread_blocks, stream);                                   \
    };                                                                                            \
    return shape.tokens == 64    ? launch(std::integral_constant<int, 64>{})                      \
           : shape.tokens == 128 ? launch(std::integral_constant<int, 128>{})                     \
                                 : launch(std::integral_constant<int, 256>{});                    \
  }

}  // namespace lowbit::cuda
