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
// instructions. Inputs past K read as zeros; rows past M are not read where it can be helped, for
// the copy engine takes long for rows that do not exist: fewer tokens than a tile are copied by
// themselves, and the last of several tiles ends at the last token, some of which the tile before
// has had.
//
// Scales. Up to 64 tokens (kScaleSums) codes enter as exact small numbers; the sums of a block of
// 64 inputs are multiplied by their scale in fp32, minima (up to 16 tokens) by the sum of the
// activations, which the warps of a warpgroup share out. With more tokens that costs too much, and
// weights are scaled before the product and rounded once to the dtype of x, as a dequantized weight
// would be: for bf16, whose 8 bits cannot hold an fp16 scale, by two factors s = high + low, w =
// fma(q, high, q low); with minima in fp32. Then a warp dequantizes one k-step of 16 inputs, issues
// its wgmma, and dequantizes the next while up to three are in flight: an A operand in registers
// holds a warp at its next wgmma until the tensor core takes it, so what is to overlap must stand
// between two of them.
//
// A thread block goes through its share of tiles, the ring running on across them; what is left
// over when every thread block had the same number of tiles, the thread blocks of a cluster share
// along K, and sum in order through distributed shared memory: deterministic, and no workspace.
#pragma once

#include <cuda.h>

#include "cuda/dequant.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/grouped.cuh"
#include "cuda/launch.cuh"
#include "cuda/qmm_shape.h"
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
  std::int32_t act_bytes;            // of a stage
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
  CodebookPairs codebook;
  bool minima;
  bool weights_once;  // no other thread block reads the same weights
  bool vector_out;    // out's rows are aligned to 16 bytes
  bool pair_out;      // to 4
};

struct QmmMaps {
  CUtensorMap x, codes, scales;
};

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
  constexpr int kRuns = kTokens / 8;
  constexpr int kRunBytes = qmm_run_bytes(kGroups);
  constexpr bool kGrouped = !has_row_scale(kKind);
  constexpr bool kScaleSums = kGrouped && ((kScales == Scales::kPlain && kTokens <= 64) ||
                                           (kScales == Scales::kMinima && kTokens <= 16));
  constexpr bool kSumsX = kScaleSums && kScales == Scales::kMinima;
  static_assert(kRing >= 3 && kRing >= 2 * kTurns, "too few stages");

  extern __shared__ __align__(1024) std::uint8_t smem_raw[];
  // The swizzle works on absolute addresses: the activations start at a multiple of 1024.
  std::uint8_t* const acts = smem_raw + (1024 - (shared_address(smem_raw) & 1023)) % 1024;
  std::uint8_t* const codes_ring = acts + kRing * kActBytes;
  std::uint8_t* const scales_ring = codes_ring + kRing * kCodeBytes;
  std::uint8_t* const table_base = scales_ring + kRing * kScaleBytes;
  std::uint8_t* const end_base = table_base + table_bytes(kKind);  // the turns' sums, or flips
  std::uint8_t* const x_sums_base = end_base + qmm_end_bytes(kKind, kTokens, kGroups);
  const std::uint32_t barriers =
      shared_address(x_sums_base) + qmm_sums_bytes(kKind, kScales, kTokens, kGroups);
  const auto full = [&](int slot) { return barriers + slot * 8; };
  const auto empty = [&](int slot) { return barriers + (kRing + slot) * 8; };

  // What this thread block does: tiles of its own, then its part of a shared one. Experts have
  // tiles of outputs x a run of their tokens, one run after the other.
  struct Job {
    int first_row, first_token, tokens;
    int done;        // of the tokens, which the tile before has
    int first_tile;  // of the expert's matrix
    int split, begin, steps;
  };
  const auto dense_job = [&](int work, int split, int begin, int end) {
    const int row_group = work / p.token_groups;
    // The last tile ends at the last token: the copy engine takes longer for rows past it.
    const int first = (work - row_group * p.token_groups) * kTokens;
    const int first_token = min(first, max(0, p.m - kTokens));
    return Job{row_group * (p.tiles * 16),
               first_token,
               min(kTokens, p.m - first_token),
               first - first_token,
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
             0,
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
    // ---- the warps that copy, one the weights and one the activations: weights do not depend on
    // the previous kernel, activations do, and neither shall wait for the other. All lanes follow,
    // so that the compiler sees uniform values; one starts the copies.
    give_registers<kTurns == 1 ? 40 : 32>();
    const int copier = __shfl_sync(0xffffffffu, threadIdx.x / kLanes, 0) - kThreads / kLanes;
    if (copier > 1) return;
    if (copier == 0) {
      if (threadIdx.x % kLanes < kRing) {
        barrier_init(full(threadIdx.x % kLanes), 2);
        barrier_init(empty(threadIdx.x % kLanes), kTiles);
      }
      if (threadIdx.x == kThreads) {
        prefetch_map(&maps.codes);
        if constexpr (kGrouped) prefetch_map(&maps.scales);
      }
      barrier_init_fence();
      __syncwarp();
      named_barrier_arrive(1, kThreads + kLanes);
      named_barrier_arrive(4, 2 * kLanes);
    } else {
      if (threadIdx.x == kThreads + kLanes) prefetch_map(&maps.x);
      named_barrier(4, 2 * kLanes);
    }
    const bool leader = elect_lane();
    const auto each_stage = [&](auto copy) {
      int slot = 0;
      std::uint32_t parity = 1;  // the first time round nothing has to be released
      Job job{};
#pragma unroll 1
      for (int round = 0; job_at(round, job); ++round) {
#pragma unroll 1
        for (int step = 0; step < job.steps; ++step) {
          barrier_wait(empty(slot), parity);
          if (leader) copy(job, job.begin + step, slot);
          if (++slot == kRing) {
            slot = 0;
            parity ^= 1;
          }
        }
      }
    };
    if (copier == 0) {
      const std::uint64_t policy = p.weights_once ? evict_first_policy() : evict_normal_policy();
      const std::uint32_t bytes = p.tiles * (kBlocks * kBlockBytes + p.scale_bytes);
      const std::uint32_t codes_at = shared_address(codes_ring);
      const std::uint32_t scales_at = shared_address(scales_ring);
      if (p.ends != nullptr) wait_for_previous_kernel();
      each_stage([&](const Job& job, int stage, int slot) {
        const int tile = job.first_tile + job.first_row / 16;
        barrier_expect(full(slot), bytes);
        tensor_load(codes_at + slot * kCodeBytes, &maps.codes, stage * (kBlocks * kBlockBytes / 8),
                    tile, full(slot), policy);
        if constexpr (kGrouped) {
          const int group = stage * (kBlocks * kBlockInputs) >> p.group_shift;
          tensor_load(scales_at + slot * kScaleBytes, &maps.scales, group * (p.group_bytes / 4),
                      tile, full(slot), policy);
        }
      });
    } else {
      const std::uint32_t acts_at = shared_address(acts);
      wait_for_previous_kernel();
      each_stage([&](const Job& job, int stage, int slot) {
        constexpr int kBoxes = kRaw ? 1 : kBlocks;
        constexpr int kBoxInputs = kRaw ? 2 * kBlockInputs : kBlockInputs;
        barrier_expect(full(slot), p.act_bytes);
#pragma unroll
        for (int i = 0; i < kBoxes; ++i) {
          tensor_load(acts_at + slot * kActBytes + i * (kTokens * 128), &maps.x,
                      (stage * kBoxes + i) * kBoxInputs, job.first_token, full(slot));
        }
      });
    }
    return;
  }

  // ---- the warps that multiply
  fill_table<kKind>(table_base, p.codebook, kThreads);
  named_barrier(1, kThreads + kLanes);
  take_registers<kTurns == 1 ? 232 : 112>();
  const int lane = threadIdx.x % kLanes;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kLanes, 0);  // uniform to the compiler
  const int tile = warp % kTiles;  // past p.tiles: nothing of use, and dropped
  const int turn = kTurns == 1 ? 0 : warp / kTiles;
  const Decoding how{p.zero_pair, table_base, static_cast<std::uint32_t>(lane * 4)};
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
      // A block's products go to `sums`, and while they are made the next block is dequantized from
      // codes that were loaded before: what a warp waits for is under way.
      float sums[kTokens / 2];
      std::uint32_t a[kBlocks][4][4] = {};
      LaneCodes<kKind> codes[kBlocks];
      float2 scale[kBlocks] = {}, minimum[kBlocks] = {};
      __half2 next_scale[kBlocks] = {}, next_minimum[kBlocks] = {};
      // Minima are multiplied by sums of the activations. Each warp of the warpgroup sums 8 tokens
      // of a block, by multiplying them with ones, for all four of them; the other half of the room
      // belongs to the stage before.
      constexpr int kRoom = kBlocks * kTokens;
      static_assert(!kSumsX || kRoom <= 32, "a warp for every 8 tokens of a block");
      const int group = tile / 4 + kGroups * turn;
      float* const x_sums = reinterpret_cast<float*>(x_sums_base) + group * (2 * kRoom);
      int room = 0;
      const auto sum_activations = [&] {
        const int item = tile % 4;
        if (item * 8 >= kRoom) return;
        const std::uint32_t from = acts_at + slot * kActBytes + item * 1024 + lane % 8 * 128;
        constexpr std::uint32_t kOne = kBf16 ? 0x3f803f80u : 0x3c003c00u;
        constexpr std::uint32_t kOnes[4] = {kOne, kOne, kOne, kOne};
        float sum[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          std::uint32_t b[4];
          ldmatrix_x4(b, from + ((half * 4 + lane / 8 ^ lane % 8) << 4));
          mma_m16n8k16<kBf16>(sum, kOnes, b[0], b[1]);
          mma_m16n8k16<kBf16>(sum, kOnes, b[2], b[3]);
        }
        if (lane < 4) {
          reinterpret_cast<float2*>(x_sums + room + item * 8)[lane] = make_float2(sum[0], sum[1]);
        }
      };
      // The stage at `slot`, once it is there.
      const auto load = [&] {
        barrier_wait(full(slot), parity);
#pragma unroll
        for (int s = 0; s < kBlocks; ++s) {
          codes[s].load(my_codes + slot * kCodeBytes + s * kBlockBytes, lane);
          const auto* scales = reinterpret_cast<const __half2*>(my_scales + slot * kScaleBytes +
                                                                s * p.block_scale_step);
          next_scale[s] = scales[0];
          if constexpr (kSumsX) next_minimum[s] = scales[1];
        }
        if constexpr (kSumsX) sum_activations();
      };
      const auto dequantize = [&](auto place) {
        constexpr int s = decltype(place)::value;
#pragma unroll
        for (int j = 0; j < 4; ++j) codes[s].template operand<kBf16>(a[s][j], j, how);
        scale[s] = __half22float2(next_scale[s]);
        if constexpr (kSumsX) minimum[s] = __half22float2(next_minimum[s]);
      };
      const auto multiply = [&](std::uint64_t b, auto place) {
        constexpr int s = decltype(place)::value;
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; ++j) Wgmma<kBf16, kTokens>::run(sums, a[s][j], b + 2 * j, j > 0);
        wgmma_commit();
      };
      const auto fold = [&](auto place, int from) {
        constexpr int s = decltype(place)::value;
        [[maybe_unused]] float2 x[kSumsX ? kRuns : 1];
        if constexpr (kSumsX) {
#pragma unroll
          for (int run = 0; run < kRuns; ++run) {
            x[run] =
                reinterpret_cast<const float2*>(x_sums + from + s * kTokens + run * 8)[lane % 4];
          }
        }
        wgmma_wait<0>();
        settle(sums);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          acc[i] = fmaf(i & 2 ? scale[s].y : scale[s].x, sums[i], acc[i]);
          if constexpr (kSumsX) {
            acc[i] =
                fmaf(i & 2 ? minimum[s].y : minimum[s].x, i & 1 ? x[i / 4].y : x[i / 4].x, acc[i]);
          }
        }
      };
      constexpr std::integral_constant<int, 0> kFirst;
      constexpr std::integral_constant<int, kBlocks - 1> kLast;
      if (steps > 0) {
        load();
        dequantize(kFirst);
      }
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const std::uint32_t done = empty(slot);
        const int present = room;
        multiply(activations_of(0), kFirst);
        if constexpr (kBlocks == 2) dequantize(kLast);
        if constexpr (kSumsX) {  // all four warps have written, and read what is written next
          named_barrier(5 + group, 128);
          room ^= kRoom;
        }
        if constexpr (kBlocks == 2) {
          fold(kFirst, present);
          multiply(activations_of(1), kLast);
        }
        next_slot();
        if (step + 1 < steps) {
          load();
          if constexpr (kBlocks == 2) dequantize(kFirst);
        }
        fold(kLast, present);
        if (lane == 0) barrier_arrive(done);
        // No registers for a second A operand: other warps multiply meanwhile.
        if constexpr (kBlocks == 1) {
          if (step + 1 < steps) dequantize(kFirst);
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
            std::uint32_t pair = codes.template pair<kBf16>(4 * j + i, how);
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
    // Which turn ends up with the sums of a run.
    const auto mine = [&](int run) { return kTurns == 1 || run % kTurns == turn; };
    const std::uint32_t lane_place = (tile * kLanes + lane) * 16;
    // The last job may be shared: nobody of the cluster sends before all have left their rings.
    if (job.split >= 0) {
      named_barrier(1, kThreads);
      cluster_arrive();
    }
    if constexpr (kTurns > 1) {
      constexpr int kPass = qmm_pass_runs(kTokens);
      const std::uint32_t exchange = shared_address(end_base) + lane_place;
#pragma unroll
      for (int from = 0; from < kRuns; from += kPass) {
#pragma unroll
        for (int run = from; run < from + kPass; ++run) {
          if (!mine(run)) {
            const int sender = turn < run % kTurns ? turn : turn - 1;
            store4_shared(exchange + ((run - from) * (kTurns - 1) + sender) * kRunBytes,
                          acc[4 * run], acc[4 * run + 1], acc[4 * run + 2], acc[4 * run + 3]);
          }
        }
        named_barrier(1, kThreads);
#pragma unroll
        for (int run = from; run < from + kPass; ++run) {
          if (mine(run)) {
#pragma unroll
            for (int sender = 0; sender < kTurns - 1; ++sender) {
              const float4 part =
                  load4_shared(exchange + ((run - from) * (kTurns - 1) + sender) * kRunBytes);
              acc[4 * run] += part.x;
              acc[4 * run + 1] += part.y;
              acc[4 * run + 2] += part.z;
              acc[4 * run + 3] += part.w;
            }
          }
        }
        named_barrier(1, kThreads);
      }
    }

    int owned_from = job.done, owned_to = tokens;
    if (job.split >= 0) {
      const int owned = qmm_owned_runs(kTokens, p.splits);
      const int owned_shift = 31 - __clz(owned);
      const int first = job.split * owned;  // runs of 8 tokens
      owned_from = max(job.done, first * 8);
      owned_to = min(tokens, (first + owned) * 8);
      const std::uint32_t landing = shared_address(acts) + lane_place;
      cluster_wait();
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const int owner = run >> owned_shift;
        if (mine(run) && owner != job.split && run * 8 < tokens) {
          const int place = (job.split - (job.split > owner)) * owned + run - owner * owned;
          store4_in_cluster(landing + place * kRunBytes, owner, acc[4 * run], acc[4 * run + 1],
                            acc[4 * run + 2], acc[4 * run + 3]);
        }
      }
      cluster_arrive();
      cluster_wait();
      // Its own sums first, then the others' by rank.
      std::uint32_t at = landing;
#pragma unroll 1
      for (int other = 1; other < p.splits; ++other) {
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          if (mine(run) && run >= first && run < first + owned) {
            const float4 part = load4_shared(at + (run - first) * kRunBytes);
            acc[4 * run] += part.x;
            acc[4 * run + 1] += part.y;
            acc[4 * run + 2] += part.z;
            acc[4 * run + 3] += part.w;
          }
        }
        at += owned * kRunBytes;
      }
    }
    const int row = tile * 16 + lane / 4;
    const float factor[2] = {row_factor(row), row_factor(row + 8)};
    const float bias[2] = {row_bias(row), row_bias(row + 8)};
    const auto packed = [&](int run, int half) {
      return float_pair<kBf16>(fmaf(acc[4 * run + 2 * half], factor[half], bias[half]),
                               fmaf(acc[4 * run + 2 * half + 1], factor[half], bias[half]));
    };
    auto* const out = reinterpret_cast<std::uint16_t*>(p.out) + first_row;
    // 8 outputs of a token, 16 bytes in shared memory.
    const auto store_piece = [&](int token, int first, const std::uint8_t* piece) {
      if (token < owned_from || token >= owned_to || first >= rows) return;
      std::uint16_t* const at = out + (first_token + token) * p.out_stride + first;
      if (p.vector_out && first + 8 <= rows) {
        *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(piece);
      } else {
        const int count = min(8, rows - first);
        for (int e = 0; e < count; ++e) at[e] = reinterpret_cast<const std::uint16_t*>(piece)[e];
      }
    };
    if constexpr (kTurns > 1 && kTokens >= 128) {
      constexpr int kOutBytes = qmm_out_bytes(kGroups);
      const std::uint32_t to =
          shared_address(end_base) + lane % 8 * kOutBytes + tile * 32 + lane / 8 % 2 * 16;
#pragma unroll
      for (int run = 0; run < kRuns; run += 2 * kTurns) {
#pragma unroll
        for (int own = 0; own < kTurns; ++own) {
          const int a = run + own, b = run + own + kTurns;
          if (mine(a) && a * 8 < owned_to && b * 8 + 8 > owned_from) {
            stmatrix_x4_transposed(to + (lane < 16 ? a : b) * (8 * kOutBytes), packed(a, 0),
                                   packed(a, 1), packed(b, 0), packed(b, 1));
          }
        }
      }
      named_barrier(1, kThreads);
      constexpr int kPieces = kTiles * 2;
#pragma unroll
      for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
        store_piece(i / kPieces, i % kPieces * 8,
                    end_base + i / kPieces * kOutBytes + i % kPieces * 16);
      }
      named_barrier(1, kThreads);
    } else if constexpr (kTurns > 1) {
      // A warp transposes a run, 16 outputs x 8 tokens: then four lanes have 8 outputs of a token.
      const int pair_row = tile * 16 + lane % 4 * 2;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        if (mine(run) && run * 8 + 8 > owned_from && run * 8 < owned_to) {
          const std::uint32_t pairs[2] = {transpose8x8(packed(run, 0)),
                                          transpose8x8(packed(run, 1))};
          const int token = run * 8 + lane / 4;
          if (token >= owned_from && token < owned_to) {
            std::uint16_t* const to = out + (first_token + token) * p.out_stride + pair_row;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int left = rows - pair_row - 8 * half;
              if (p.pair_out && left >= 2) {
                *reinterpret_cast<std::uint32_t*>(to + 8 * half) = pairs[half];
              } else {
                if (left >= 1) to[8 * half] = static_cast<std::uint16_t>(pairs[half]);
                if (left >= 2) to[8 * half + 1] = static_cast<std::uint16_t>(pairs[half] >> 16);
              }
            }
          }
        }
      }
    } else {
      // Per warpgroup, kQmmFlip tokens at a time, so that a token's 64 outputs are stored together.
      const int group = tile / 4;
      std::uint8_t* const flip = end_base + group * (kQmmFlip * kQmmFlipBytes);
      const std::uint32_t to = shared_address(flip) + (lane / 16 * 8 + lane % 8) * kQmmFlipBytes +
                               tile % 4 * 32 + lane / 8 % 2 * 16;
#pragma unroll
      for (int from = 0; from < kTokens; from += kQmmFlip) {
        if (from < owned_to && from + kQmmFlip > owned_from) {
#pragma unroll
          for (int t = 0; t < kQmmFlip / 8; t += 2) {
            const int at = from / 8 + t;
            stmatrix_x4_transposed(to + t * (8 * kQmmFlipBytes), packed(at, 0), packed(at, 1),
                                   packed(at + 1, 0), packed(at + 1, 1));
          }
          named_barrier(2 + group, 128);
#pragma unroll
          for (int i = threadIdx.x % 128; i < kQmmFlip * 8; i += 128) {
            store_piece(from + i / 8, group * 64 + i % 8 * 8,
                        flip + i / 8 * kQmmFlipBytes + i % 8 * 16);
          }
          named_barrier(2 + group, 128);
        }
      }
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
