// Medium batches on sm_90: out[m][n] = sum_k x[m][k] W[n][k] with wgmma, weights dequantized on
// the way from shared memory to the registers of the A operand, activations as B in shared memory.
//
// A thread block multiplies 128 or 256 outputs x kTokens tokens: two or four warpgroups of 64
// outputs, a row tile of 16 per warp. Each step takes 64 inputs, kStages of them in flight; a warp
// copies the codes and scales of its own row tile with cp.async, one thread the activations through
// a tensor map (rows past M read as zeros). While the tensor core multiplies one step, the warps
// dequantize the next into the other half of their A registers. The warpgroups are coupled only
// through the activations' stages, and may drift apart by a step, so that one uses the tensor cores
// while the other prepares.
//
// (Activations by cp.async need a proxy fence at every step, which compiles to a MEMBAR that waits
// for all copies in flight: 800 ns per step. Copies by the tensor map need none.)
//
// (Weights by bulk copies, 512 bytes of codes and 32 of scales per row tile and step, started by
// the lanes of one warp: the copy engine takes them one by one, and the kernel took twice as long.)
//
// Weights are multiplied by their scales before the product and rounded once to the dtype of x, as
// a dequantized weight would be: for bf16, whose 8 bits cannot hold an fp16 scale, by two factors
// s = high + low, w = fma(q, high, q low); with minima in fp32. (Scaling accumulators instead, as
// qmv does, costs kTokens / 2 FMAs per 32 weights and lane: too much from 64 tokens on.)
//
// Thread blocks of a cluster along K are summed in order through distributed shared memory.
#pragma once

#include <cuda.h>

#include "cuda/qmv.cuh"
#include "cuda/wgmma.cuh"

namespace lowbit::cuda {

struct QmmParams {
  const std::uint8_t* w;
  const std::uint8_t* x;
  std::uint8_t* out;
  const void* bias;
  std::int64_t tile_bytes;
  std::int64_t x_stride_bytes;
  std::int64_t out_stride;
  std::int32_t m, n, tiles, blocks;
  std::int32_t codes_at, scales_at, group_shift, group_bytes, scale_bytes;
  std::int32_t splits;
  std::uint32_t zero_pair;
  float factor;
  DType bias_dtype;
  Format format;
  bool minima, half_groups;
};

// Stages that fit beside the table of pairs (32 KB) with 8-bit codes, at most 8.
LOWBIT_HD constexpr int qmm_stages(Kind kind, int tokens, int tiles) {
  const int stage = tokens * 128 + tiles * (2 * kBlockInputs * kind_bits(kind) + 128);
  const int stages = (226 * 1024 - 2048 - table_bytes(kind)) / stage;
  return stages > 8 ? 8 : stages;
}
// Floats between the tokens of the block's sums: lanes of one store fall into different banks.
LOWBIT_HD constexpr int qmm_run(int tiles) {
  return tiles * 16 + 4;
}

LOWBIT_HD constexpr int qmm_shared_bytes(Kind kind, int tokens, int tiles, int scale_bytes) {
  const int ring = qmm_stages(kind, tokens, tiles) *
                   (tokens * 128 + tiles * (2 * kBlockInputs * kind_bits(kind) + scale_bytes));
  const int sums = tokens * qmm_run(tiles) * 4;
  return 1024 + table_bytes(kind) + 128 + (ring > sums ? ring : sums);
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

// kPlain: neither minima nor groups of 32.
template <Kind kKind, bool kBf16, int kTokens, int kTiles, bool kPlain>
__global__ void __launch_bounds__(kTiles* kLanes, kTokens <= 64 && kTiles == 8 ? 2 : 1)
    qmm_kernel(const __grid_constant__ QmmParams p, const __grid_constant__ CUtensorMap x_map) {
  constexpr int kBlockBytes = 2 * kBlockInputs * kind_bits(kKind);
  constexpr int kStages = qmm_stages(kKind, kTokens, kTiles);
  constexpr int kThreads = kTiles * kLanes;
  constexpr int kActBytes = kTokens * 128;
  extern __shared__ __align__(1024) std::uint8_t smem_raw[];
  // The swizzle works on absolute addresses: the activations start at a multiple of 1024.
  std::uint8_t* const acts = smem_raw + (1024 - (shared_address(smem_raw) & 1023)) % 1024;
  const int slot_bytes = kBlockBytes + p.scale_bytes;
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  std::uint8_t* const ring = acts + kStages * kActBytes + warp * (kStages * slot_bytes);
  // The table is last, but sums of the epilogue may overlap it: it is not needed by then.
  std::uint8_t* const table_base = acts + kStages * (kActBytes + kTiles * slot_bytes);
  const std::uint32_t barriers = shared_address(table_base) + table_bytes(kKind);
  const auto full = [&](int stage) { return barriers + stage * 8; };
  const auto empty = [&](int stage) { return barriers + (kStages + stage) * 8; };
  const std::uint32_t acts_at = shared_address(acts);
  const std::uint32_t ring_at = shared_address(ring);

  const int split = blockIdx.x;
  const int first_token = blockIdx.y * kTokens;
  const int row_group = blockIdx.z;
  const int tile = min(row_group * kTiles + warp, p.tiles - 1);
  const int kb_begin = p.blocks * split / p.splits;
  const int steps = p.blocks * (split + 1) / p.splits - kb_begin;

  allow_next_kernel();
  const std::uint64_t policy = evict_first_policy();
  const std::uint8_t* const tile_base = p.w + tile * p.tile_bytes + lane * 16;

  const std::uint8_t* const codes_base =
      tile_base + p.codes_at + static_cast<std::int64_t>(kb_begin) * kBlockBytes;
  const std::uint8_t* const scales_base = tile_base + p.scales_at;
  const auto issue_weights = [&](int step, int stage) {
    const std::uint32_t to = ring_at + stage * slot_bytes + lane * 16;
    const std::uint8_t* from = codes_base + step * kBlockBytes;
#pragma unroll
    for (int at = 0; at < kBlockBytes; at += 512) {
      if (at + 512 <= kBlockBytes || lane * 16 + at < kBlockBytes) {
        cp_async_weights(to + at, from + at, policy);
      }
    }
    if constexpr (!has_row_scale(kKind)) {
      if (lane * 16 < p.scale_bytes) {
        const int group = (kb_begin + step) * kBlockInputs >> p.group_shift;
        cp_async_weights(to + kBlockBytes, scales_base + group * p.group_bytes, policy);
      }
    }
  };
  const auto issue_activations = [&](int step, int stage) {
    barrier_expect(full(stage), kActBytes);
    tensor_load(acts_at + stage * kActBytes, &x_map, (kb_begin + step) * kBlockInputs, first_token,
                full(stage));
  };

  // ---- fill the pipeline: weights do not depend on the previous kernel, activations do
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) issue_weights(i, i);
    cp_async_commit();
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), kTiles);
    }
    barrier_init_fence();
  }
  fill_table<kKind, kBf16>(table_base, p.format, kThreads);
  __syncthreads();
  wait_for_previous_kernel();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages - 2 && i < steps; ++i) issue_activations(i, i);
  }
  const std::uint8_t* const table = table_base + lane * 4;

  float acc[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0;

  // The A operand of a step from the warp's own codes in shared memory.
  const auto dequantize_stage = [&](int stage, std::uint32_t(&a)[16]) {
    const std::uint8_t* unit = ring + stage * slot_bytes;
    LaneCodes<kKind> codes;
    codes.load(unit, lane);
    if constexpr (has_row_scale(kKind)) {
#pragma unroll
      for (int c = 0; c < 16; ++c) a[c] = codes.template pair<kBf16>(c, p.zero_pair, table);
    } else {
      const auto* scales = reinterpret_cast<const __half2*>(unit + kBlockBytes);
      const bool with_minima = !kPlain && p.minima;
      const int words = with_minima ? 2 : 1;
      PairScale<kBf16> scale[2];  // rows g, g + 8
      const auto load_scales = [&](int from) {
        const float2 s = __half22float2(scales[from + lane / 4 * words]);
        float2 m = {0, 0};
        if (with_minima) m = __half22float2(scales[from + lane / 4 * 2 + 1]);
        scale[0].set(s.x, m.x, with_minima);
        scale[1].set(s.y, m.y, with_minima);
      };
      const auto fill = [&](auto minima) {
        load_scales(0);
#pragma unroll
        for (int c = 0; c < 16; ++c) {
          if (!kPlain && c == 8 && p.half_groups) load_scales(8 * words);
          a[c] = scale[c & 1].template apply<decltype(minima)::value>(
              codes.template pair<kBf16>(c, p.zero_pair, table));
        }
      };
      if constexpr (kPlain) {
        fill(std::false_type{});
      } else if (kBf16 && p.minima) {
        fill(std::true_type{});
      } else {
        fill(std::false_type{});
      }
    }
  };
  // Multiplies one step while the next is dequantized. `stage` is step mod kStages, `parity` that
  // of step / kStages, kept as counters: the divisions took a quarter of the instructions.
  int stage = 0;
  std::uint32_t parity = 0;
  const auto step_with = [&](int step, std::uint32_t(&a)[16], std::uint32_t(&a_next)[16]) {
    const int before = stage == 0 ? kStages - 1 : stage - 1;  // of step - 1 and step + kStages - 1
    const int earlier =
        before == 0 ? kStages - 1 : before - 1;  // of step - 2 and step + kStages - 2
    const int next = stage + 1 == kStages ? 0 : stage + 1;
    cp_async_wait<kStages - 3>();
    __syncwarp();  // the next step's weights are here; every lane has left the slot issued below
    if (step + kStages - 1 < steps) issue_weights(step + kStages - 1, before);
    cp_async_commit();
    if (threadIdx.x == 0 && step + kStages - 2 < steps) {
      // Into the stage of two steps ago, so that waiting for its readers rarely takes time.
      if (step >= 2) barrier_wait(empty(earlier), stage >= 2 ? parity : parity ^ 1);
      issue_activations(step + kStages - 2, earlier);
    }
    __syncwarp();
    barrier_wait(full(stage), parity);

    const std::uint64_t b = wgmma_descriptor(acts_at + stage * kActBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) Wgmma<kBf16, kTokens>::run(acc, a + 4 * i, b + 2 * i);
    wgmma_commit();
    if (step + 1 < steps) dequantize_stage(next, a_next);
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty(stage));
    if (next == 0) parity ^= 1;
    stage = next;
  };
  std::uint32_t a_even[16], a_odd[16];
  cp_async_wait<kStages - 2>();
  __syncwarp();  // the first step's weights
  dequantize_stage(0, a_even);
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    step_with(step, a_even, a_odd);
    if (step + 1 < steps) step_with(step + 1, a_odd, a_even);
  }
  cp_async_wait<0>();
  __syncthreads();

  // ---- sums to shared memory [token][row], then out, coalesced along the rows
  auto* const sums = reinterpret_cast<float*>(acts);
#pragma unroll
  for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = t * 8 + lane % 4 * 2 + i % 2;
      const int row = warp * 16 + lane / 4 + i / 2 * 8;
      sums[token * qmm_run(kTiles) + row] = acc[4 * t + i];
    }
  }
  if (p.splits > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  constexpr int kRows = kTiles * 16;
  const int row = threadIdx.x % kRows;
  const std::int64_t n = std::int64_t{row_group} * kRows + row;
  float row_scale = p.factor;
  float bias = 0;
  if (n < p.n) {
    if constexpr (has_row_scale(kKind)) {
      row_scale *= reinterpret_cast<const float*>(p.w + n / 16 * p.tile_bytes)[n % 16];
    }
    bias = bias_at(p.bias, p.bias_dtype, n);
  }
  const int tokens = min(kTokens, p.m - first_token);
  const std::uint32_t sums_at = shared_address(sums);
  // The blocks of a cluster share the tokens.
  for (int token = split + threadIdx.x / kRows * p.splits; token < tokens;
       token += kThreads / kRows * p.splits) {
    float value = 0;
    if (p.splits == 1) {
      value = sums[token * qmm_run(kTiles) + row];
    } else {
      for (int rank = 0; rank < p.splits; ++rank) {
        value += load_from_cluster(sums_at + 4 * (token * qmm_run(kTiles) + row), rank);
      }
    }
    if (n < p.n) {
      store_out<kBf16>(p.out, (first_token + token) * p.out_stride + n, value * row_scale + bias);
    }
  }
  if (p.splits > 1) cluster_barrier();
}

template <Kind kKind>
int launch_qmm(const QmmParams& params, const CUtensorMap& x_map, bool bf16, const QmmShape& shape,
               Stream stream);

template <Kind kKind, bool kBf16, int kTokens, int kTiles, bool kPlain>
int launch_qmm_kernel(const QmmParams& p, const CUtensorMap& map, const QmmShape& shape,
                      Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.splits),
                  static_cast<unsigned>((p.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((p.tiles + kTiles - 1) / kTiles));
  return launch_cluster(qmm_kernel<kKind, kBf16, kTokens, kTiles, kPlain>, grid, kTiles * kLanes,
                        qmm_shared_bytes(kKind, kTokens, kTiles, p.scale_bytes), p.splits,
                        shape.early, stream, {&p, &map});
}

#define LOWBIT_DEFINE_QMM(kind)                                                                   \
  template <>                                                                                     \
  int launch_qmm<kind>(const QmmParams& p, const CUtensorMap& map, bool bf16,                     \
                       const QmmShape& shape, Stream stream) {                                    \
    const auto launch = [&](auto tokens, auto tiles) {                                            \
      constexpr int kTokens = decltype(tokens)::value;                                            \
      constexpr int kTiles = decltype(tiles)::value;                                              \
      if constexpr (!has_row_scale(kind)) {                                                       \
        if (p.minima || p.half_groups) {                                                          \
          return bf16 ? launch_qmm_kernel<kind, true, kTokens, kTiles, false>(p, map, shape,      \
                                                                              stream)             \
                      : launch_qmm_kernel<kind, false, kTokens, kTiles, false>(p, map, shape,     \
                                                                               stream);           \
        }                                                                                         \
      }                                                                                           \
      return bf16 ? launch_qmm_kernel<kind, true, kTokens, kTiles, true>(p, map, shape, stream)   \
                  : launch_qmm_kernel<kind, false, kTokens, kTiles, true>(p, map, shape, stream); \
    };                                                                                            \
    using std::integral_constant;                                                                 \
    const integral_constant<int, 8> t8;                                                           \
    const integral_constant<int, 16> t16;                                                         \
    const bool wide = shape.rows == 256;                                                          \
    switch (shape.tokens) {                                                                       \
      case 32:                                                                                    \
        return wide ? launch(integral_constant<int, 32>{}, t16)                                   \
                    : launch(integral_constant<int, 32>{}, t8);                                   \
      case 64:                                                                                    \
        return wide ? launch(integral_constant<int, 64>{}, t16)                                   \
                    : launch(integral_constant<int, 64>{}, t8);                                   \
      case 128:                                                                                   \
        return wide ? launch(integral_constant<int, 128>{}, t16)                                  \
                    : launch(integral_constant<int, 128>{}, t8);                                  \
      default:                                                                                    \
        return launch(integral_constant<int, 256>{}, t8);                                         \
    }                                                                                             \
  }

}  // namespace lowbit::cuda
