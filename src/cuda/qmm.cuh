// Medium batches on sm_90: out[m][n] = sum_k x[m][k] W[n][k] with wgmma, weights dequantized on
// the way from shared memory to the registers of the A operand, activations as B in shared memory.
//
// A thread block multiplies 128 outputs x kTokens tokens: two warpgroups of 64 outputs, a row tile of
// 16 per warp. Each step takes 64 inputs. All copies are cp.async, kStages deep; a warp copies the
// codes and scales of its own row tile, all threads together the activations (swizzled by hand to
// what the tensor core reads). While the tensor core multiplies one step, the warps dequantize the
// next into the other half of their A registers.
//
// Weights are multiplied by their scales before the product and rounded once to the dtype of x, as
// a dequantized weight would be: for bf16, whose 8 bits cannot hold an fp16 scale, by two factors
// s = high + low, w = fma(q, high, q low); with minima in fp32. (Scaling accumulators instead, as
// qmv does, costs kTokens / 2 FMAs per 32 weights and lane: too much from 64 tokens on.)
//
// Thread blocks of a cluster along K are summed in order through distributed shared memory.
#pragma once

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

constexpr int kQmmThreads = 256;
constexpr int kQmmTiles = 8;  // row tiles of a thread block
LOWBIT_HD constexpr int qmm_stages(int tokens) { return tokens == 256 ? 5 : 8; }
// Floats between the tokens of the block's sums: lanes of one store fall into different banks.
constexpr int kQmmRun = kQmmTiles * 16 + 4;

LOWBIT_HD constexpr int qmm_shared_bytes(Kind kind, int tokens, int scale_bytes) {
  const int ring = qmm_stages(tokens) *
                   (tokens * 128 + kQmmTiles * (2 * kBlockInputs * kind_bits(kind) + scale_bytes));
  const int sums = tokens * kQmmRun * 4;
  return 1024 + table_bytes(kind) + (ring > sums ? ring : sums);
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
        const float upper = __bfloat162float(__float2bfloat16_rn(s));
        high = float_pair<true>(upper, upper);
        low = float_pair<true>(s - upper, s - upper);
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
      std::uint32_t d;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
      return d;
    } else {
      return fma_pair<true>(pair, high, fma_pair<true>(pair, low, 0x80008000u));
    }
  }
};

template <Kind kKind, bool kBf16, int kTokens>
__global__ void __launch_bounds__(kQmmThreads, kTokens <= 64 ? 2 : 1)
    qmm_kernel(const __grid_constant__ QmmParams p) {
  constexpr int kBlockBytes = 2 * kBlockInputs * kind_bits(kKind);
  constexpr int kStages = qmm_stages(kTokens);
  constexpr int kActBytes = kTokens * 128;
  extern __shared__ __align__(1024) std::uint8_t smem_raw[];
  // The swizzle works on absolute addresses: the activations start at a multiple of 1024.
  std::uint8_t* const acts =
      smem_raw + (1024 - (shared_address(smem_raw) & 1023)) % 1024;
  const int slot_bytes = kBlockBytes + p.scale_bytes;
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  std::uint8_t* const ring = acts + kStages * kActBytes + warp * (kStages * slot_bytes);
  // The table is last, but sums of the epilogue may overlap it: it is not needed by then.
  std::uint8_t* const table_base =
      acts + kStages * (kActBytes + kQmmTiles * slot_bytes);
  const std::uint32_t acts_at = shared_address(acts);
  const std::uint32_t ring_at = shared_address(ring);

  const int split = blockIdx.x;
  const int first_token = blockIdx.y * kTokens;
  const int row_group = blockIdx.z;
  const int tile = min(row_group * kQmmTiles + warp, p.tiles - 1);
  const int kb_begin = p.blocks * split / p.splits;
  const int steps = p.blocks * (split + 1) / p.splits - kb_begin;

  allow_next_kernel();
  const std::uint64_t policy = evict_first_policy();
  const std::uint8_t* const tile_base = p.w + tile * p.tile_bytes + lane * 16;

  const auto issue_weights = [&](int step) {
    const int kb = kb_begin + step;
    const std::uint32_t to = ring_at + step % kStages * slot_bytes + lane * 16;
    const std::uint8_t* from = tile_base + p.codes_at + static_cast<std::int64_t>(kb) * kBlockBytes;
#pragma unroll
    for (int at = 0; at < kBlockBytes; at += 512) {
      if (at + 512 <= kBlockBytes || lane * 16 + at < kBlockBytes) {
        cp_async_weights(to + at, from + at, policy);
      }
    }
    if constexpr (!has_row_scale(kKind)) {
      if (lane * 16 < p.scale_bytes) {
        const int group = kb * kBlockInputs >> p.group_shift;
        cp_async_weights(to + kBlockBytes, tile_base + p.scales_at + group * p.group_bytes, policy);
      }
    }
  };
  const int act_row = threadIdx.x / 8;
  const int act_chunk = threadIdx.x % 8;
  const std::uint8_t* const act_from =
      p.x + (first_token + act_row) * p.x_stride_bytes + act_chunk * 16;
  const std::uint32_t act_to =
      acts_at + act_row * 128 + ((act_chunk ^ (act_row & 7)) << 4);
  const auto issue_activations = [&](int step) {
    const std::uint32_t to = act_to + step % kStages * kActBytes;
    const std::uint8_t* from = act_from + (kb_begin + step) * 128;
#pragma unroll
    for (int i = 0; i < kTokens / 32; ++i) {
      const bool valid = first_token + act_row + 32 * i < p.m;
      cp_async_or_zero(to + i * 4096, valid ? from + i * 32 * p.x_stride_bytes : p.x, valid);
    }
  };

  // ---- fill the pipeline
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) issue_weights(i);
  }
  fill_table<kKind, kBf16>(table_base, p.format, kQmmThreads);
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) issue_activations(i);
    cp_async_commit();  // the first group also holds all the weights
  }
  const std::uint8_t* const table = table_base + lane * 4;

  float acc[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0;

  // The A operand of a step from the warp's own codes in shared memory.
  const auto dequantize_step = [&](int step, std::uint32_t (&a)[16]) {
    const std::uint8_t* unit = ring + step % kStages * slot_bytes;
    LaneCodes<kKind> codes;
    codes.load(unit, lane);
    if constexpr (has_row_scale(kKind)) {
#pragma unroll
      for (int c = 0; c < 16; ++c) a[c] = codes.template pair<kBf16>(c, p.zero_pair, table);
    } else {
      const auto* scales = reinterpret_cast<const __half2*>(unit + kBlockBytes);
      const int words = p.minima ? 2 : 1;
      const int second = p.half_groups ? 8 * words : 0;  // groups of 32: two scales per step
      PairScale<kBf16> scale[2];                         // rows g, g + 8
      const auto load_scales = [&](int from) {
        const float2 s = __half22float2(scales[from + lane / 4 * words]);
        float2 m = {0, 0};
        if (p.minima) m = __half22float2(scales[from + lane / 4 * 2 + 1]);
        scale[0].set(s.x, m.x, p.minima);
        scale[1].set(s.y, m.y, p.minima);
      };
      const auto fill = [&](auto minima) {
        load_scales(0);
#pragma unroll
        for (int c = 0; c < 16; ++c) {
          if (c == 8) load_scales(second);
          a[c] = scale[c & 1].template apply<decltype(minima)::value>(
              codes.template pair<kBf16>(c, p.zero_pair, table));
        }
      };
      if (kBf16 && p.minima) {
        fill(std::true_type{});
      } else {
        fill(std::false_type{});
      }
    }
  };
  // Multiplies one step while the next is dequantized. The two warpgroups take turns at the tensor
  // cores by themselves: what one leaves idle between its steps the other uses.
  const auto step_with = [&](int step, std::uint32_t (&a)[16], std::uint32_t (&a_next)[16]) {
    cp_async_wait<kStages - 3>();
    fence_for_tensor_cores();
    __syncthreads();  // this step's activations are here; the previous step's stage is free
    if (step + kStages - 1 < steps) {
      issue_weights(step + kStages - 1);
      issue_activations(step + kStages - 1);
    }
    cp_async_commit();

    const std::uint64_t b = wgmma_descriptor(acts_at + step % kStages * kActBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) Wgmma<kBf16, kTokens>::run(acc, a + 4 * i, b + 2 * i);
    wgmma_commit();
    dequantize_step(min(step + 1, steps - 1), a_next);
    wgmma_wait<0>();
  };
  std::uint32_t a_even[16], a_odd[16];
  cp_async_wait<kStages - 2>();
  __syncthreads();  // the first step's weights; the table
  dequantize_step(0, a_even);
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
      sums[token * kQmmRun + row] = acc[4 * t + i];
    }
  }
  if (p.splits > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  constexpr int kRows = kQmmTiles * 16;
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
       token += kQmmThreads / kRows * p.splits) {
    float value = 0;
    if (p.splits == 1) {
      value = sums[token * kQmmRun + row];
    } else {
      for (int rank = 0; rank < p.splits; ++rank) {
        value += load_from_cluster(sums_at + 4 * (token * kQmmRun + row), rank);
      }
    }
    if (n < p.n) {
      store_out<kBf16>(p.out, (first_token + token) * p.out_stride + n, value * row_scale + bias);
    }
  }
  if (p.splits > 1) cluster_barrier();
}

template <Kind kKind>
int launch_qmm(const QmmParams& params, bool bf16, const QmmShape& shape, Stream stream);

template <Kind kKind, bool kBf16, int kTokens>
int launch_qmm_kernel(const QmmParams& p, const QmmShape& shape, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.splits),
                  static_cast<unsigned>((p.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((p.tiles + kQmmTiles - 1) / kQmmTiles));
  return launch_cluster(qmm_kernel<kKind, kBf16, kTokens>, grid, kQmmThreads,
                        qmm_shared_bytes(kKind, kTokens, p.scale_bytes), p.splits, shape.early,
                        stream, &p);
}

#define LOWBIT_DEFINE_QMM(kind)                                                                   \
  template <>                                                                                     \
  int launch_qmm<kind>(const QmmParams& p, bool bf16, const QmmShape& shape, Stream stream) {      \
    switch (shape.tokens) {                                                                       \
      case 32:                                                                                    \
        return bf16 ? launch_qmm_kernel<kind, true, 32>(p, shape, stream)                         \
                    : launch_qmm_kernel<kind, false, 32>(p, shape, stream);                       \
      case 64:                                                                                    \
        return bf16 ? launch_qmm_kernel<kind, true, 64>(p, shape, stream)                         \
                    : launch_qmm_kernel<kind, false, 64>(p, shape, stream);                       \
      case 128:                                                                                   \
        return bf16 ? launch_qmm_kernel<kind, true, 128>(p, shape, stream)                        \
                    : launch_qmm_kernel<kind, false, 128>(p, shape, stream);                      \
      default:                                                                                    \
        return bf16 ? launch_qmm_kernel<kind, true, 256>(p, shape, stream)                        \
                    : launch_qmm_kernel<kind, false, 256>(p, shape, stream);                      \
    }                                                                                             \
  }

}  // namespace lowbit::cuda
