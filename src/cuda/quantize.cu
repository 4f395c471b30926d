// Plain rounding on the GPU, to the bytes of the CPU's quantizer (src/reference/quantize.cpp has
// the definitions): first the scales of all groups and what the exponent rule needs to know of
// them, then the codes. Both passes write the canonical order; convert.cu turns it into the
// device's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/codebooks.cuh"
#include "cuda/kernels.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;

// A weight as quantizers see it: float32, divided by 2^exponent, rounded once. float64 holds both
// the factor and the product exactly.
struct Scaled {
  double factor;
  bool plain;
  __device__ float operator()(float weight) const {
    return plain ? weight : static_cast<float>(weight * factor);
  }
};

template <typename T>
__device__ float widen(T value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// Minus zero is never stored.
__device__ std::uint16_t half_bits(float value) {
  const std::uint16_t bits = __half_as_ushort(__float2half_rn(value));
  return (bits & 0x7fff) == 0 ? 0 : bits;
}

// Where a row of the packed matrices comes from.
struct Row {
  std::int64_t tile;   // of all matrices
  int in_tile;         // 0..15
  std::int64_t index;  // row of the weight, or -1 for one that pads a tile
};
__device__ Row row_of(const QuantizeArgs& args, std::int64_t packed_row) {
  const std::int64_t tile = packed_row / 16;
  const std::int64_t matrix = tile / args.geometry.tiles;
  const std::int64_t inner = packed_row - matrix * args.geometry.tiles * 16;
  return {tile, static_cast<int>(packed_row % 16),
          inner < args.geometry.n ? matrix * args.geometry.n + inner : -1};
}

// Non-negative floats compare like their bits.
__device__ void raise(float* at, float value) {
  atomicMax(reinterpret_cast<unsigned*>(at), __float_as_uint(value));
}
__device__ void lower(float* at, float value) {
  atomicMin(reinterpret_cast<unsigned*>(at), __float_as_uint(value));
}

// One warp per row and group (per row where the format has no groups).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scales_kernel(const __grid_constant__ QuantizeArgs args, Scaled scaled) {
  const Geometry& geometry = args.geometry;
  const int groups = geometry.group_size ? geometry.groups : 1;
  const std::int64_t rows = args.matrices * geometry.tiles * 16;
  const int lane = threadIdx.x % kLanes;
  const auto* weights = static_cast<const T*>(args.weight);
  float largest = 0, smallest = INFINITY, largest_minimum = 0, smallest_minimum = INFINITY;
  std::int64_t nonfinite = INT64_MAX;
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / kLanes);
  for (std::int64_t item = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
       item < rows * groups; item += warps) {
    const Row row = row_of(args, item / groups);
    const int group = static_cast<int>(item % groups);
    const int first = group * geometry.group_size;
    const int padded = geometry.group_size ? geometry.group_size : geometry.k_padded;
    const int end = row.index < 0                 ? first
                    : geometry.k - first < padded ? static_cast<int>(geometry.k)
                                                  : first + padded;
    float high = -INFINITY, low = INFINITY;
    for (int k = first + lane; k < end; k += kLanes) {
      const float weight =
          widen(weights[row.index * args.row_stride + std::int64_t{k} * args.col_stride]);
      if (!isfinite(weight)) nonfinite = min(nonfinite, row.index * geometry.k + k);
      const float w = scaled(weight);
      high = fmaxf(high, w);
      low = fminf(low, w);
    }
    for (int step = kLanes / 2; step > 0; step /= 2) {
      high = fmaxf(high, __shfl_xor_sync(kAll, high, step));
      low = fminf(low, __shfl_xor_sync(kAll, low, step));
    }
    if (lane != 0) continue;
    const bool empty = first >= end;
    const float magnitude = empty ? 0.0f : fabsf(fmaxf(high, -low));
    const bool minima = geometry.group_scale_bytes == 64;
    if (!empty) {
      const float statistic = minima ? high - low : magnitude;
      largest = fmaxf(largest, statistic);
      if (statistic != 0) smallest = fminf(smallest, statistic);
      if (minima) {
        largest_minimum = fmaxf(largest_minimum, fabsf(low));
        if (low != 0) smallest_minimum = fminf(smallest_minimum, fabsf(low));
      }
    }
    std::uint8_t* const tile =
        static_cast<std::uint8_t*>(args.canonical) + row.tile * geometry.tile_bytes;
    if (geometry.group_size) {
      float scale = 0, minimum = 0;
      if (!empty) {
        if (minima) {
          scale = (high - low) / args.value_max;
          minimum = low;
        } else if (args.far_negative) {
          // Two's complement reaches one step further below zero.
          scale = (high > -low ? high : low) / -args.value_max;
        } else {
          scale = magnitude / args.value_max;
        }
      }
      auto* at = reinterpret_cast<std::uint16_t*>(tile + canonical_scales(geometry, group));
      at[row.in_tile] = half_bits(scale);
      if (minima) {
        at[16 + row.in_tile] = half_bits(minimum);
      } else if (group == geometry.groups - 1 && group % 2 == 0) {
        at[16 + row.in_tile] = 0;  // pads a lone last group
      }
    } else if (geometry.kind != Kind::kFull) {
      reinterpret_cast<float*>(tile)[row.in_tile] = empty ? 0.0f : magnitude / args.value_max;
    }
  }
  // Lane 0 of every warp has its groups' statistics, all lanes what was not finite.
  __shared__ QuantizeRange block;
  if (threadIdx.x == 0) block = {0, INFINITY, 0, INFINITY, INT64_MAX};
  __syncthreads();
  if (lane == 0) {
    raise(&block.largest, largest);
    lower(&block.smallest, smallest);
    raise(&block.largest_minimum, largest_minimum);
    lower(&block.smallest_minimum, smallest_minimum);
  }
  if (nonfinite != INT64_MAX) {
    atomicMin(reinterpret_cast<long long*>(&block.nonfinite), static_cast<long long>(nonfinite));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    raise(&args.range->largest, block.largest);
    lower(&args.range->smallest, block.smallest);
    raise(&args.range->largest_minimum, block.largest_minimum);
    lower(&args.range->smallest_minimum, block.smallest_minimum);
    atomicMin(reinterpret_cast<long long*>(&args.range->nonfinite),
              static_cast<long long>(block.nonfinite));
  }
}

__global__ void range_kernel(QuantizeRange* range) {
  *range = {0, INFINITY, 0, INFINITY, INT64_MAX};
}

// The code nearest to t = (weight - minimum) / scale, ties to even.
template <Kind kKind>
__device__ std::uint32_t nearest_code(const QuantizeArgs& args, const float* midpoints, float t) {
  if constexpr (kKind == Kind::kE4M3 || kKind == Kind::kE5M2) {
    const std::uint32_t code =
        __nv_cvt_float_to_fp8(t, __NV_SATFINITE, kKind == Kind::kE4M3 ? __NV_E4M3 : __NV_E5M2);
    return code == 0x80 ? 0 : code;
  } else if constexpr (kKind == Kind::kFull) {
    return args.geometry.format == Format::kBf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(t))
                                                 : __half_as_ushort(__float2half_rn(t));
  } else if constexpr (kKind == Kind::kLut3 || kKind == Kind::kLut4) {
    // fp4 mirrors its first half.
    const bool mirrored = args.geometry.format == Format::kFp4;
    const int entries = kKind == Kind::kLut3 ? 8 : mirrored ? 8 : 16;
    const float x = mirrored ? fabsf(t) : t;
    std::uint32_t code = 0;
    for (int next = 1; next < entries; ++next) {
      const float midpoint = midpoints[next];
      if (x > midpoint || (x == midpoint && next % 2 == 0)) code = static_cast<std::uint32_t>(next);
    }
    return mirrored && t < 0 && code != 0 ? code + 8 : code;
  } else {
    const float q = fminf(fmaxf(rintf(t), args.code_low), args.code_high);
    return static_cast<std::uint32_t>(static_cast<int>(q) + zero_point(args.geometry.format));
  }
}

// Inputs of one thread: what fills 32 bits of a unit.
LOWBIT_HD constexpr int inputs_per_word(Kind kind) {
  const int bits = kind_bits(kind);
  return bits == 3 ? 16 : bits == 5 ? 8 : 32 / bits;
}

// A thread makes one word of codes of a row; neighbouring lanes are the rows of a tile, so that the
// bits of int5 and nf3 that lie apart, two rows to a byte, meet in a shuffle.
template <Kind kKind, typename T>
__global__ void __launch_bounds__(kThreads)
    codes_kernel(const __grid_constant__ QuantizeArgs args, Scaled scaled, bool vectors) {
  constexpr int kInputs = inputs_per_word(kKind);
  constexpr int kBits = kind_bits(kKind);
  const Geometry& geometry = args.geometry;
  __shared__ float midpoints[16];
  if (threadIdx.x > 0 && threadIdx.x < 16) {
    const int code = static_cast<int>(threadIdx.x);
    midpoints[code] =
        (codebook_entry(geometry.format, code - 1) + codebook_entry(geometry.format, code)) / 2;
  }
  __syncthreads();
  const auto* weights = static_cast<const T*>(args.weight);
  const int words = geometry.k_padded / kInputs;
  // Whole warps only: words are even in number.
  const std::int64_t items = args.matrices * geometry.tiles * words * 16;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t row_word = item / 16;
    const std::int64_t tile_index = row_word / words;
    const int word = static_cast<int>(row_word - tile_index * words);
    const Row row = row_of(args, tile_index * 16 + item % 16);
    std::uint8_t* const tile =
        static_cast<std::uint8_t*>(args.canonical) + row.tile * geometry.tile_bytes;
    const int first = word * kInputs;
    const int group = geometry.group_size ? first / geometry.group_size : 0;
    float scale = 1, minimum = 0;
    if (geometry.group_size) {
      const auto* at =
          reinterpret_cast<const __half*>(tile + canonical_scales(geometry, group)) + row.in_tile;
      scale = __half2float(at[0]);
      if (geometry.group_scale_bytes == 64) minimum = __half2float(at[16]);
    } else if constexpr (kKind != Kind::kFull) {
      scale = reinterpret_cast<const float*>(tile)[row.in_tile];
    }
    std::uint32_t codes[kInputs];
    const int count = row.index < 0 || scale == 0    ? 0
                      : geometry.k - first < kInputs ? max(0, static_cast<int>(geometry.k) - first)
                                                     : kInputs;
    alignas(16) T values[kInputs];
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const T* from = weights + row.index * args.row_stride + first * args.col_stride;
    if (kInputs % kVector == 0 && vectors && count == kInputs) {
#pragma unroll
      for (int i = 0; i < kInputs / kVector; ++i) {
        reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        if (i < count) values[i] = from[i * args.col_stride];
      }
    }
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      codes[i] = args.padding_code;
      if (i < count) {
        const float w = scaled(widen(values[i]));
        codes[i] =
            nearest_code<kKind>(args, midpoints, kKind == Kind::kFull ? w : (w - minimum) / scale);
      }
    }
    const CanonicalGroup place = canonical_group(geometry, group);
    const int i = geometry.group_size ? first - group * geometry.group_size : first;
    std::uint8_t* const to = tile + place.codes;
    std::uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kInputs; ++j) {
      if constexpr (kBits == 16) {
        bits |= codes[j] << (16 * j);
      } else if constexpr (kBits == 8) {
        bits |= codes[j] << (8 * j);
      } else if constexpr (kBits == 3) {
        bits |= (codes[j] & 3) << (8 * (j % 4) + 2 * (j / 4));
      } else {
        bits |= (codes[j] & 15) << (8 * (j % 4) + 4 * (j / 4));
      }
    }
    *reinterpret_cast<std::uint32_t*>(to + std::int64_t{i} / kInputs * 64 + 4 * row.in_tile) = bits;
    if constexpr (kBits == 3 || kBits == 5) {
      // Four inputs of two rows to a byte.
      std::uint8_t* const plane = to + std::int64_t{place.inputs} / kInputs * 64;
#pragma unroll
      for (int quad = 0; quad < kInputs / 4; ++quad) {
        std::uint32_t top = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) top |= (codes[4 * quad + b] >> (kBits - 1) & 1) << b;
        const std::uint32_t other = __shfl_xor_sync(kAll, top, 1);
        if (row.in_tile % 2 == 0) {
          plane[(i / 4 + quad) * 8 + row.in_tile / 2] = static_cast<std::uint8_t>(top | other << 4);
        }
      }
    }
  }
}

Scaled scaled_by(int exponent) {
  double factor = 1;
  for (int i = 0; i < exponent; ++i) factor /= 2;
  for (int i = 0; i > exponent; --i) factor *= 2;
  return {factor, exponent == 0};
}

unsigned grid_for(std::int64_t threads) {
  constexpr std::int64_t kMost = 132 * 16;
  const std::int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMost ? kMost : blocks);
}

template <typename Visit>
int by_dtype(const QuantizeArgs& args, Visit visit) {
  switch (args.dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kFloat16:
      return visit(__half{});
    case DType::kBFloat16:
      return visit(__nv_bfloat16{});
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace

int quantize_scales(const QuantizeArgs& args, Stream stream) {
  range_kernel<<<1, 1, 0, stream>>>(args.range);
  const std::int64_t groups = args.geometry.group_size ? args.geometry.groups : 1;
  const unsigned grid = grid_for(args.matrices * args.geometry.tiles * 16 * groups * kLanes);
  return by_dtype(args, [&](auto zero) {
    scales_kernel<decltype(zero)><<<grid, kThreads, 0, stream>>>(args, scaled_by(args.exponent));
    return static_cast<int>(cudaGetLastError());
  });
}

int quantize_codes(const QuantizeArgs& args, Stream stream) {
  return by_dtype(args, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = args.col_stride == 1 &&
                         reinterpret_cast<std::uintptr_t>(args.weight) % 16 == 0 &&
                         args.row_stride * sizeof(T) % 16 == 0;
    const auto launch = [&](auto kind) {
      constexpr Kind kKind = decltype(kind)::value;
      const std::int64_t threads = args.matrices * args.geometry.tiles * 16 *
                                   (args.geometry.k_padded / inputs_per_word(kKind));
      codes_kernel<kKind, T>
          <<<grid_for(threads), kThreads, 0, stream>>>(args, scaled_by(args.exponent), vectors);
      return static_cast<int>(cudaGetLastError());
    };
    switch (args.geometry.kind) {
      case Kind::kInt4:
        return launch(std::integral_constant<Kind, Kind::kInt4>{});
      case Kind::kLut4:
        return launch(std::integral_constant<Kind, Kind::kLut4>{});
      case Kind::kInt5:
        return launch(std::integral_constant<Kind, Kind::kInt5>{});
      case Kind::kInt8:
        return launch(std::integral_constant<Kind, Kind::kInt8>{});
      case Kind::kLut3:
        return launch(std::integral_constant<Kind, Kind::kLut3>{});
      case Kind::kE4M3:
        return launch(std::integral_constant<Kind, Kind::kE4M3>{});
      case Kind::kE5M2:
        return launch(std::integral_constant<Kind, Kind::kE5M2>{});
      case Kind::kFull:
        return launch(std::integral_constant<Kind, Kind::kFull>{});
      default:
        return static_cast<int>(cudaErrorInvalidValue);
    }
  });
}

}  // namespace lowbit::cuda
