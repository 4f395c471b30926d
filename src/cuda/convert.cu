// Everything that only moves or decodes weights: canonical order to device order and back,
// dequantize, embedding look-up. Memory-bound and simple; the multiplications are in qmv.cuh and
// qmm_sm90.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/codebooks.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device_layout.h"
#include "cuda/kernels.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 20;  // the loops stride over what exceeds it

int launched() {
  return static_cast<int>(cudaGetLastError());
}

unsigned grid_for(std::int64_t items) {
  const std::int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks);
}

__device__ float half_at(const std::uint8_t* at) {
  return __half2float(*reinterpret_cast<const __half*>(at));
}

// ---- canonical -> device --------------------------------------------------------------------

// One lane of one block: its codes are gathered from the canonical tile and stored as words.
template <Kind kKind, int kSteps>
__device__ void pack_lane(const Geometry& geometry, const std::uint8_t* from, std::uint8_t* block,
                          int b, int lane) {
  std::uint32_t words[2 * kSteps] = {};
  std::uint32_t plane = 0;
#pragma unroll
  for (int c = 0; c < 4 * kSteps; ++c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t code = canonical_code(geometry, from, place_row(lane, c),
                                                b * kBlockInputs + place_k(lane, c, h));
      const int step = c / 4;
      const int pair = c % 4;
      if constexpr (kKind == Kind::kInt4) {
        words[step] |= code << (4 * (pair + 4 * h));
      } else if constexpr (kKind == Kind::kLut4) {
        words[step] |= code << (4 * (2 * pair + h));
      } else if constexpr (kKind == Kind::kInt5) {
        words[step] |= (code & 15) << (4 * (pair + 4 * h));
        plane |= (code >> 4) << (c + 4 * kSteps * h);
      } else if constexpr (kKind == Kind::kLut3) {
        const std::uint32_t index = code << (3 * h);
        if constexpr (kSteps == 4) {
          if (c < 15) {
            words[c / 5] |= index << (6 * (c % 5));
          } else {
            words[0] |= (index & 3) << 30;
            words[1] |= (index >> 2 & 3) << 30;
            words[2] |= (index >> 4) << 30;
          }
        } else {
          if (c < 5) words[0] |= index << (6 * c);
          if (c >= 5 && c < 7) words[1] |= index << (6 * (c - 5));
          if (c == 7) {
            words[1] |= (index & 15) << 12;
            words[0] |= (index >> 4) << 30;
          }
        }
      } else {
        words[2 * step + pair / 2] |= code << (8 * ((pair & 1) + 2 * h));
      }
    }
  }
  auto* out = reinterpret_cast<std::uint32_t*>(block);
  if constexpr (kKind == Kind::kInt4 || kKind == Kind::kLut4 || kKind == Kind::kInt5) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) out[lane * kSteps + step] = words[step];
    if constexpr (kKind == Kind::kInt5) {
      if constexpr (kSteps == 4) {
        out[32 * kSteps + lane] = plane;
      } else {
        reinterpret_cast<std::uint16_t*>(out + 32 * kSteps)[lane] =
            static_cast<std::uint16_t>(plane);
      }
    }
  } else if constexpr (kKind == Kind::kLut3) {
    if constexpr (kSteps == 4) {
      out[2 * lane] = words[0];
      out[2 * lane + 1] = words[1];
      out[64 + lane] = words[2];
    } else {
      out[lane] = words[0];
      reinterpret_cast<std::uint16_t*>(out + 32)[lane] = static_cast<std::uint16_t>(words[1]);
    }
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = step / 2 * 128 + lane * 4 + step % 2 * 2;
      out[at] = words[2 * step];
      out[at + 1] = words[2 * step + 1];
    }
  }
}

// The scales of one group (16 of them, or with minima 32), or what else follows the codes.
__device__ void pack_scales(const Geometry& geometry, const std::uint8_t* canonical,
                            std::uint8_t* device, int group) {
  const std::uint8_t* from = canonical + canonical_scales(geometry, group);
  const int minima = geometry.group_scale_bytes / 32;
  for (int minimum = 0; minimum < minima; ++minimum) {
    for (int row = 0; row < 16; ++row) {
      *reinterpret_cast<std::uint16_t*>(device + device_scale(geometry, group, row, minimum)) =
          *reinterpret_cast<const std::uint16_t*>(from + minimum * 32 + row * 2);
    }
  }
  if (minima == 1 && group == geometry.groups - 1 && group % 2 == 0) {
    // The canonical padding of a lone last group is zero; here it ends the tile.
    auto* rest = reinterpret_cast<std::uint32_t*>(device + geometry.tile_bytes - 32);
    for (int i = 0; i < 8; ++i) rest[i] = 0;
  }
}

__device__ std::int64_t pack_items(const Geometry& geometry) {
  const std::int64_t blocks = (geometry.k_padded + kBlockInputs - 1) / kBlockInputs;
  return blocks * 32 + geometry.groups;
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Geometry geometry, std::int64_t tiles, const std::uint8_t* canonical,
                std::uint8_t* device) {
  const std::int64_t per_tile = pack_items(geometry);
  const std::int64_t codes = per_tile - geometry.groups;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       item < per_tile * tiles; item += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t tile = item / per_tile;
    const std::int64_t inner = item - tile * per_tile;
    const std::uint8_t* from = canonical + tile * geometry.tile_bytes;
    std::uint8_t* to = device + tile * geometry.tile_bytes;
    if (inner < codes) {
      const int b = static_cast<int>(inner / 32);
      const int lane = static_cast<int>(inner % 32);
      if (block_steps(geometry, b) == 4) {
        pack_lane<kKind, 4>(geometry, from, to + block_offset(geometry, b), b, lane);
      } else {
        pack_lane<kKind, 2>(geometry, from, to + block_offset(geometry, b), b, lane);
      }
    } else if (geometry.group_size) {
      pack_scales(geometry, from, to, static_cast<int>(inner - codes));
    } else {  // kRow: the 16 fp32 scales stay where they are
      for (int i = 0; i < 16; ++i) {
        reinterpret_cast<float*>(to)[i] = reinterpret_cast<const float*>(from)[i];
      }
    }
  }
}

// 16-bit codes: canonical units of 16 rows x 2 k to row-major, and back.
__global__ void __launch_bounds__(kThreads)
    full_kernel(std::int64_t tiles, std::int32_t pairs, const std::uint32_t* from,
                std::uint32_t* to, bool pack) {
  const std::int64_t per_tile = std::int64_t{16} * pairs;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       item < per_tile * tiles; item += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t tile = item / per_tile;
    const std::int64_t inner = item - tile * per_tile;
    const std::int64_t row = inner / pairs;
    const std::int64_t pair = inner - row * pairs;
    const std::int64_t device_at = item;
    const std::int64_t canonical_at = tile * per_tile + pair * 16 + row;
    if (pack) {
      to[device_at] = from[canonical_at];
    } else {
      to[canonical_at] = from[device_at];
    }
  }
}

// ---- device -> canonical --------------------------------------------------------------------

// 32 inputs of the rows 2p and 2p+1: whole bytes of every unit and every plane belong to one
// thread.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Geometry geometry, std::int64_t tiles, const std::uint8_t* device,
                  std::uint8_t* canonical) {
  const std::int64_t codes = geometry.k_padded / 32 * 8;
  const std::int64_t per_tile = codes + geometry.groups;
  const int bits = kind_bits(geometry.kind);
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       item < per_tile * tiles; item += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t tile = item / per_tile;
    const std::int64_t inner = item - tile * per_tile;
    const std::uint8_t* from = device + tile * geometry.tile_bytes;
    std::uint8_t* to = canonical + tile * geometry.tile_bytes;
    if (inner >= codes) {
      const int group = static_cast<int>(inner - codes);
      if (geometry.group_size == 0) {
        for (int i = 0; i < 16; ++i) {
          reinterpret_cast<float*>(to)[i] = reinterpret_cast<const float*>(from)[i];
        }
        continue;
      }
      std::uint8_t* at = to + canonical_scales(geometry, group);
      const int minima = geometry.group_scale_bytes / 32;
      for (int minimum = 0; minimum < minima; ++minimum) {
        for (int row = 0; row < 16; ++row) {
          *reinterpret_cast<std::uint16_t*>(at + minimum * 32 + row * 2) =
              *reinterpret_cast<const std::uint16_t*>(from +
                                                      device_scale(geometry, group, row, minimum));
        }
      }
      if (minima == 1 && group == geometry.groups - 1 && group % 2 == 0) {
        auto* rest = reinterpret_cast<std::uint32_t*>(at + 32);
        for (int i = 0; i < 8; ++i) rest[i] = 0;
      }
      continue;
    }
    const std::int32_t first = static_cast<std::int32_t>(inner / 8) * 32;
    const int p = static_cast<int>(inner % 8);
    const std::int32_t group = geometry.group_size ? first / geometry.group_size : 0;
    const CanonicalGroup place = canonical_group(geometry, group);
    const std::int32_t in_group = geometry.group_size ? first - group * geometry.group_size : first;
    std::uint8_t* base = to + place.codes;
    std::uint8_t plane[8] = {};
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * p + half;
      std::uint8_t codes_of_row[32];
      for (int i = 0; i < 32; ++i) {
        codes_of_row[i] = static_cast<std::uint8_t>(device_code(geometry, from, row, first + i));
      }
      if (bits == 8) {
        for (int u = 0; u < 8; ++u) {
          for (int byte = 0; byte < 4; ++byte) {
            base[std::int64_t{in_group / 4 + u} * 64 + 4 * row + byte] = codes_of_row[4 * u + byte];
          }
        }
      } else if (bits == 3) {
        for (int u = 0; u < 2; ++u) {
          for (int byte = 0; byte < 4; ++byte) {
            const std::uint8_t* c = codes_of_row + 16 * u + byte;
            base[(in_group / 16 + u) * 64 + 4 * row + byte] = static_cast<std::uint8_t>(
                (c[0] & 3) | (c[4] & 3) << 2 | (c[8] & 3) << 4 | (c[12] & 3) << 6);
          }
        }
      } else {
        for (int u = 0; u < 4; ++u) {
          for (int byte = 0; byte < 4; ++byte) {
            const std::uint8_t* c = codes_of_row + 8 * u + byte;
            base[(in_group / 8 + u) * 64 + 4 * row + byte] =
                static_cast<std::uint8_t>((c[0] & 15) | (c[4] & 15) << 4);
          }
        }
      }
      for (int i = 0; i < 32; ++i) {
        const int top = codes_of_row[i] >> (bits - 1) & 1;
        plane[i / 4] |= static_cast<std::uint8_t>(top << (4 * half + i % 4));
      }
    }
    if (bits == 3 || bits == 5) {
      std::uint8_t* planes = base + place.inputs * (bits == 3 ? 4 : 8) + in_group / 4 * 8;
      for (int i = 0; i < 8; ++i) planes[i * 8 + p] = plane[i];
    }
  }
}

// ---- dequantize -----------------------------------------------------------------------------

template <typename Out>
__device__ Out to_out(float value);
template <>
__device__ float to_out<float>(float value) {
  return value;
}
template <>
__device__ __half to_out<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 to_out<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
// Through fp32, as the reference defines it.
template <typename Out>
__device__ Out to_out(double value) {
  return to_out<Out>(static_cast<float>(value));
}

// The value of a code before its scale; exact in fp32 for every format. `table`: shared memory.
template <Kind kKind>
__device__ __forceinline__ float code_value(std::uint32_t code, float zero, const float* table) {
  if constexpr (kKind == Kind::kLut4 || kKind == Kind::kLut3) {
    return table[code];
  } else if constexpr (kKind == Kind::kE4M3) {
    // Bits moved to fp32's fields; the biases differ by 120 (subnormals come out right as well).
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
  } else if constexpr (kKind == Kind::kE5M2) {
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 21) * 0x1p112f;
  } else {
    // 2^23 + code, less 2^23 + zero: exact, and four times the rate of an integer conversion.
    return __uint_as_float(0x4b000000u | code) - zero;
  }
}

// The code of pair c, half h from a lane's words of a full block.
template <Kind kKind>
__device__ __forceinline__ std::uint32_t lane_code(const std::uint32_t (&words)[8],
                                                   std::uint32_t plane, int c, int h) {
  const int step = c / 4;
  const int pair = c % 4;
  if constexpr (kKind == Kind::kInt4) {
    return words[step] >> (4 * (pair + 4 * h)) & 15;
  } else if constexpr (kKind == Kind::kLut4) {
    return words[step] >> (4 * (2 * pair + h)) & 15;
  } else if constexpr (kKind == Kind::kInt5) {
    return (words[step] >> (4 * (pair + 4 * h)) & 15) | (plane >> (c + 16 * h) & 1) << 4;
  } else if constexpr (kKind == Kind::kLut3) {
    if (c == 15) {
      const std::uint32_t index = words[0] >> 30 | words[1] >> 30 << 2 | words[2] >> 30 << 4;
      return index >> (3 * h) & 7;
    }
    return words[c / 5] >> (6 * (c % 5) + 3 * h) & 7;
  } else {
    return words[2 * step + pair / 2] >> (8 * ((pair & 1) + 2 * h)) & 255;
  }
}

// One warp per 16 x 64 block; the block passes through shared memory so that rows are written in
// runs of 64 elements.
constexpr int kDequantWarps = 4;
template <Kind kKind, typename Out, typename Real>
__global__ void __launch_bounds__(kDequantWarps * 32)
    dequantize_kernel(Geometry geometry, const std::uint8_t* packed, Real factor, Out* out,
                      std::int64_t out_stride, std::int64_t first_tile, std::int64_t rows,
                      bool vectors) {
  constexpr int kRun = 64 + 16 / sizeof(Out);  // 16 bytes of padding: fewer bank conflicts
  __shared__ alignas(16) Out stage[kDequantWarps][16 * kRun];
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codebook_entry(geometry.format, threadIdx.x);
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  Out* mine = stage[warp];
  const int blocks = (geometry.k_padded + kBlockInputs - 1) / kBlockInputs;
  const std::int64_t tiles = (rows + 15) / 16;
  const float zero = 8388608.0f + zero_point(geometry.format);
  const int group_shift = geometry.group_size ? 31 - __clz(geometry.group_size) : 0;
  const auto items = static_cast<std::uint32_t>(tiles * blocks);  // 1024 weights each
  for (std::uint32_t item = blockIdx.x * kDequantWarps + warp; item < items;
       item += gridDim.x * kDequantWarps) {
    const std::int64_t tile = item / static_cast<std::uint32_t>(blocks);
    const int b = static_cast<int>(item % static_cast<std::uint32_t>(blocks));
    const std::uint8_t* base = packed + (first_tile + tile) * geometry.tile_bytes;
    const std::uint8_t* block = base + block_offset(geometry, b);
    const bool whole = block_steps(geometry, b) == 4;
    std::uint32_t words[8] = {};
    std::uint32_t plane = 0;
    if (whole) {
      const auto* words_in = reinterpret_cast<const std::uint32_t*>(block);
      if constexpr (kKind == Kind::kLut3) {
        const uint2 two = reinterpret_cast<const uint2*>(block)[lane];
        words[0] = two.x;
        words[1] = two.y;
        words[2] = words_in[64 + lane];
      } else {
        const uint4 four = reinterpret_cast<const uint4*>(block)[lane];
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        if constexpr (kind_bits(kKind) == 8) {
          const uint4 more = reinterpret_cast<const uint4*>(block + 512)[lane];
          words[4] = more.x, words[5] = more.y, words[6] = more.z, words[7] = more.w;
        }
        if constexpr (kKind == Kind::kInt5) plane = words_in[128 + lane];
      }
    }
    Real scale[2][2];  // [k half of 32][row, row + 8]
    Real minimum[2][2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int row = lane / 4 + 8 * upper;
        if (geometry.group_size) {
          const int group = min((b * kBlockInputs + part * 32) >> group_shift, geometry.groups - 1);
          scale[part][upper] = half_at(base + device_scale(geometry, group, row, 0)) * factor;
          minimum[part][upper] =
              geometry.group_scale_bytes == 64
                  ? half_at(base + device_scale(geometry, group, row, 1)) * factor
                  : Real{0};
        } else {
          scale[part][upper] = reinterpret_cast<const float*>(base)[row] * factor;
          minimum[part][upper] = 0;
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      if (!whole && c >= 8) break;
      const int row = place_row(lane, c);
      Real weight[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t code =
            whole ? lane_code<kKind>(words, plane, c, h)
                  : device_code(geometry, base, row, b * kBlockInputs + place_k(lane, c, h));
        const Real value = static_cast<Real>(code_value<kKind>(code, zero, table));
        weight[h] = value * scale[c / 8][c & 1] + minimum[c / 8][c & 1];
      }
      // Neighbours in k: one store for both.
      Out* const at = mine + row * kRun + place_k(lane, c, 0);
      if constexpr (std::is_same_v<Out, float>) {
        *reinterpret_cast<float2*>(at) =
            make_float2(static_cast<float>(weight[0]), static_cast<float>(weight[1]));
      } else {
        *reinterpret_cast<std::uint32_t*>(at) = float_pair<std::is_same_v<Out, __nv_bfloat16>>(
            static_cast<float>(weight[0]), static_cast<float>(weight[1]));
      }
    }
    __syncwarp();
    const std::int64_t k0 = std::int64_t{b} * kBlockInputs;
    constexpr int kVector = 16 / sizeof(Out);
    if (vectors && whole && k0 + kBlockInputs <= geometry.k) {
      for (int i = lane; i < 16 * 64 / kVector; i += 32) {
        const int row = i / (64 / kVector);
        const int at = i % (64 / kVector) * kVector;
        if (tile * 16 + row < rows) {
          *reinterpret_cast<uint4*>(out + (tile * 16 + row) * out_stride + k0 + at) =
              *reinterpret_cast<const uint4*>(mine + row * kRun + at);
        }
      }
    } else {
      for (int i = lane; i < 16 * 64; i += 32) {
        const int row = i / 64;
        const int at = i % 64;
        if (tile * 16 + row < rows && k0 + at < geometry.k) {
          out[(tile * 16 + row) * out_stride + k0 + at] = mine[row * kRun + at];
        }
      }
    }
  }
}

__device__ double full_value(const Geometry& geometry, std::uint32_t code) {
  if (geometry.format == Format::kBf16) return __uint_as_float(code << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(code)));
}

// 16-bit codes are floats; times a power of two in fp32 they are rounded at most once more.
template <typename Out>
__global__ void __launch_bounds__(kThreads)
    dequantize_full_kernel(Geometry geometry, const std::uint16_t* packed, float factor, Out* out,
                           std::int64_t out_stride, std::int64_t first_row, std::int64_t rows) {
  const bool bf16 = geometry.format == Format::kBf16;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    // Padded rows have an even length: two codes per load.
    const auto* from =
        reinterpret_cast<const std::uint32_t*>(packed + (first_row + row) * geometry.k_padded);
    Out* const to = out + row * out_stride;
    for (std::int64_t i = threadIdx.x; 2 * i < geometry.k; i += kThreads) {
      const std::uint32_t pair = from[i];
      const float2 values =
          bf16 ? make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u))
               : __half22float2(*reinterpret_cast<const __half2*>(&pair));
      to[2 * i] = to_out<Out>(values.x * factor);
      if (2 * i + 1 < geometry.k) to[2 * i + 1] = to_out<Out>(values.y * factor);
    }
  }
}

// ---- embedding ------------------------------------------------------------------------------

__device__ double weight_at(const Geometry& geometry, const std::uint8_t* tile, int row,
                            std::int32_t k) {
  const std::uint32_t code = device_code(geometry, tile, row, k);
  if (geometry.kind == Kind::kFull) return full_value(geometry, code);
  double value;
  switch (geometry.kind) {
    case Kind::kLut3:
    case Kind::kLut4:
      value = codebook_entry(geometry.format, static_cast<int>(code));
      break;
    case Kind::kE4M3:
      value = code_value<Kind::kE4M3>(code, 0, nullptr);
      break;
    case Kind::kE5M2:
      value = code_value<Kind::kE5M2>(code, 0, nullptr);
      break;
    default:
      value = static_cast<double>(static_cast<int>(code) - zero_point(geometry.format));
  }
  if (geometry.group_size == 0) return value * reinterpret_cast<const float*>(tile)[row];
  const int group = k / geometry.group_size;
  const double scale = half_at(tile + device_scale(geometry, group, row, 0));
  const double minimum = geometry.group_scale_bytes == 64
                             ? half_at(tile + device_scale(geometry, group, row, 1))
                             : 0.0f;
  return value * scale + minimum;
}

template <typename Out>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(Geometry geometry, const std::uint8_t* packed, double factor,
                     const std::int64_t* ids, std::int64_t count, Out* out) {
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       item < count * geometry.k; item += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t i = item / geometry.k;
    const auto k = static_cast<std::int32_t>(item - i * geometry.k);
    const std::int64_t id = ids[i];
    if (id < 0 || id >= geometry.n) {
      out[item] = to_out<Out>(__int_as_float(0x7fc00000));
      continue;
    }
    const std::uint8_t* tile = packed + id / 16 * geometry.tile_bytes;
    out[item] = to_out<Out>(weight_at(geometry, tile, static_cast<int>(id % 16), k) * factor);
  }
}

double power_of_two(int exponent) {
  double value = 1;
  for (int i = 0; i < exponent; ++i) value *= 2;
  for (int i = 0; i > exponent; --i) value /= 2;
  return value;
}

template <Kind kKind, typename Out>
int dequantize_kind(const DequantizeArgs& args, Stream stream) {
  const std::int64_t blocks = (args.geometry.k_padded + kBlockInputs - 1) / kBlockInputs;
  const std::int64_t items = (args.rows + 15) / 16 * blocks;
  const std::int64_t grid = (items + kDequantWarps - 1) / kDequantWarps;
  // About 16 thread blocks on each of 132 SMs: starting one per few blocks of weights took longer
  // than the copying (76 us instead of 50 for 14336 x 4096).
  const unsigned launch = static_cast<unsigned>(grid > 2112 ? 2112 : grid);
  const auto* packed = static_cast<const std::uint8_t*>(args.packed);
  auto* out = static_cast<Out*>(args.out);
  const bool vectors = reinterpret_cast<std::uintptr_t>(args.out) % 16 == 0 &&
                       args.out_stride * static_cast<std::int64_t>(sizeof(Out)) % 16 == 0;
  const double factor = power_of_two(args.exponent);
  if (args.exact) {
    dequantize_kernel<kKind, Out, double><<<launch, kDequantWarps * 32, 0, stream>>>(
        args.geometry, packed, factor, out, args.out_stride, args.first_row / 16, args.rows,
        vectors);
  } else {
    dequantize_kernel<kKind, Out, float><<<launch, kDequantWarps * 32, 0, stream>>>(
        args.geometry, packed, static_cast<float>(factor), out, args.out_stride,
        args.first_row / 16, args.rows, vectors);
  }
  return launched();
}

template <typename Out>
int dequantize_as(const DequantizeArgs& args, Stream stream) {
  switch (args.geometry.kind) {
    case Kind::kInt4:
      return dequantize_kind<Kind::kInt4, Out>(args, stream);
    case Kind::kLut4:
      return dequantize_kind<Kind::kLut4, Out>(args, stream);
    case Kind::kInt5:
      return dequantize_kind<Kind::kInt5, Out>(args, stream);
    case Kind::kInt8:
      return dequantize_kind<Kind::kInt8, Out>(args, stream);
    case Kind::kLut3:
      return dequantize_kind<Kind::kLut3, Out>(args, stream);
    case Kind::kE4M3:
      return dequantize_kind<Kind::kE4M3, Out>(args, stream);
    case Kind::kE5M2:
      return dequantize_kind<Kind::kE5M2, Out>(args, stream);
    case Kind::kFull:
      break;
  }
  const unsigned grid = static_cast<unsigned>(args.rows < 65536 ? args.rows : 65536);
  dequantize_full_kernel<Out><<<grid, kThreads, 0, stream>>>(
      args.geometry, static_cast<const std::uint16_t*>(args.packed),
      static_cast<float>(power_of_two(args.exponent)), static_cast<Out*>(args.out), args.out_stride,
      args.first_row, args.rows);
  return launched();
}

template <typename Out>
int embedding_as(const EmbeddingArgs& args, Stream stream) {
  embedding_kernel<Out><<<grid_for(args.count * args.geometry.k), kThreads, 0, stream>>>(
      args.geometry, static_cast<const std::uint8_t*>(args.packed), power_of_two(args.exponent),
      args.ids, args.count, static_cast<Out*>(args.out));
  return launched();
}

}  // namespace

int pack_for_device(const Geometry& geometry, std::int64_t tiles, const void* canonical,
                    void* device, Stream stream) {
  if (tiles == 0 || geometry.k_padded == 0) return 0;
  const auto* from = static_cast<const std::uint8_t*>(canonical);
  auto* to = static_cast<std::uint8_t*>(device);
  const std::int64_t blocks = (geometry.k_padded + kBlockInputs - 1) / kBlockInputs;
  const unsigned grid = grid_for(tiles * (blocks * 32 + geometry.groups));
  switch (geometry.kind) {
    case Kind::kInt4:
      pack_kernel<Kind::kInt4><<<grid, kThreads, 0, stream>>>(geometry, tiles, from, to);
      break;
    case Kind::kLut4:
      pack_kernel<Kind::kLut4><<<grid, kThreads, 0, stream>>>(geometry, tiles, from, to);
      break;
    case Kind::kInt5:
      pack_kernel<Kind::kInt5><<<grid, kThreads, 0, stream>>>(geometry, tiles, from, to);
      break;
    case Kind::kLut3:
      pack_kernel<Kind::kLut3><<<grid, kThreads, 0, stream>>>(geometry, tiles, from, to);
      break;
    case Kind::kInt8:
    case Kind::kE4M3:
    case Kind::kE5M2:  // one order for all 8-bit codes
      pack_kernel<Kind::kInt8><<<grid, kThreads, 0, stream>>>(geometry, tiles, from, to);
      break;
    case Kind::kFull:
      full_kernel<<<grid_for(tiles * 8 * geometry.k_padded), kThreads, 0, stream>>>(
          tiles, geometry.k_padded / 2, static_cast<const std::uint32_t*>(canonical),
          static_cast<std::uint32_t*>(device), true);
      break;
  }
  return launched();
}

int unpack_from_device(const Geometry& geometry, std::int64_t tiles, const void* device,
                       void* canonical, Stream stream) {
  if (tiles == 0 || geometry.k_padded == 0) return 0;
  if (geometry.kind == Kind::kFull) {
    full_kernel<<<grid_for(tiles * 8 * geometry.k_padded), kThreads, 0, stream>>>(
        tiles, geometry.k_padded / 2, static_cast<const std::uint32_t*>(device),
        static_cast<std::uint32_t*>(canonical), false);
  } else {
    unpack_kernel<<<grid_for(tiles * (geometry.k_padded / 4 + geometry.groups)), kThreads, 0,
                    stream>>>(geometry, tiles, static_cast<const std::uint8_t*>(device),
                              static_cast<std::uint8_t*>(canonical));
  }
  return launched();
}

int dequantize(const DequantizeArgs& args, Stream stream) {
  if (args.rows == 0 || args.geometry.k == 0) return 0;
  switch (args.out_dtype) {
    case DType::kFloat32:
      return dequantize_as<float>(args, stream);
    case DType::kFloat16:
      return dequantize_as<__half>(args, stream);
    case DType::kBFloat16:
      return dequantize_as<__nv_bfloat16>(args, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

int embedding(const EmbeddingArgs& args, Stream stream) {
  if (args.count == 0 || args.geometry.k == 0) return 0;
  switch (args.out_dtype) {
    case DType::kFloat32:
      return embedding_as<float>(args, stream);
    case DType::kFloat16:
      return embedding_as<__half>(args, stream);
    case DType::kBFloat16:
      return embedding_as<__nv_bfloat16>(args, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace lowbit::cuda
