// Parameters of the wgmma kernel; qmm.cuh has the kernel, qmm_sm90_<kind>.cu its instances.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "cuda/qmm.cuh"

namespace lowbit::cuda {
namespace {

// The driver's encoder, through the runtime: no link to libcuda, which a machine without a GPU
// lacks.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(
        error == cudaSuccess && result == cudaDriverEntryPointSuccess ? entry : nullptr);
  }();
  return encoder;
}

// A two-dimensional map: `row_bytes` of each of `rows` rows, `pitch` bytes apart, in boxes.
struct Plane {
  CUtensorMapDataType type;
  int element_bytes;
  const void* base;
  std::int64_t row_bytes, rows, pitch;
  int box_bytes, box_rows;
  CUtensorMapSwizzle swizzle;
};

bool encode_map(CUtensorMap& map, const Plane& plane) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(plane.row_bytes / plane.element_bytes),
                              static_cast<cuuint64_t>(plane.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(plane.pitch)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(plane.box_bytes / plane.element_bytes),
                            static_cast<cuuint32_t>(plane.box_rows)};
  const cuuint32_t ones[] = {1, 1};
  return encode(&map, plane.type, 2, const_cast<void*>(plane.base), sizes, strides, box, ones,
                CU_TENSOR_MAP_INTERLEAVE_NONE, plane.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// One row of x to e4m3 per thread block: 16 inputs, half a k-step, per thread and turn. Position
// 16h + 4t + b of 32 inputs holds input 16h + {2t, 2t+1, 2t+8, 2t+9}[b]: lane t's of the A operand.
template <typename T>
__global__ void __launch_bounds__(256)
    quantize_tokens_kernel(const T* x, std::int64_t x_stride, int k, std::uint8_t* codes,
                           float* scales) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const T* const row = x + blockIdx.x * x_stride;
  float most = 0;
  for (int at = threadIdx.x * 16; at < k; at += blockDim.x * 16) {
    const uint4 raw[2] = {reinterpret_cast<const uint4*>(row + at)[0],
                          reinterpret_cast<const uint4*>(row + at)[1]};
    const T* const values = reinterpret_cast<const T*>(raw);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float size = fabsf(static_cast<float>(values[i]));
      most = size <= most ? most : size;  // a NaN stays
    }
  }
  __shared__ float shared[8];
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, most, step);
    most = other <= most ? most : other;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < 8; ++i) most = shared[i] <= most ? most : shared[i];
  const float scale = most == 0 ? 1.0f : most / 448.0f;
  const float inverse = 1.0f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  for (int at = threadIdx.x * 16; at < k; at += blockDim.x * 16) {
    const uint4 raw[2] = {reinterpret_cast<const uint4*>(row + at)[0],
                          reinterpret_cast<const uint4*>(row + at)[1]};
    const T* const values = reinterpret_cast<const T*>(raw);
    const auto pair = [&](int i) {
      return static_cast<std::uint32_t>(
          __nv_cvt_float2_to_fp8x2(make_float2(static_cast<float>(values[i]) * inverse,
                                               static_cast<float>(values[i + 1]) * inverse),
                                   __NV_SATFINITE, __NV_E4M3));
    };
    uint4 out;
    out.x = pair(0) | pair(8) << 16;
    out.y = pair(2) | pair(10) << 16;
    out.z = pair(4) | pair(12) << 16;
    out.w = pair(6) | pair(14) << 16;
    *reinterpret_cast<uint4*>(codes + static_cast<std::int64_t>(blockIdx.x) * k + at) = out;
  }
}

// `eight`: its codes and scales are x.
int launch(const FusedArgs& args, const QmmShape& shape, const EightArgs* eight, Stream stream) {
  const Geometry& geometry = args.geometry;
  const Kind kind = eight == nullptr               ? geometry.kind
                    : geometry.kind == Kind::kE4M3 ? Kind::kE4M3Raw
                    : geometry.kind == Kind::kE5M2 ? Kind::kE5M2Raw
                                                   : Kind::kFull;
  const bool bf16 = args.dtype == DType::kBFloat16;
  const int blocks = geometry.k_padded / kBlockInputs;
  const int stage_blocks = qmm_stage_blocks(kind, shape.tokens);
  const int stages = (blocks + stage_blocks - 1) / stage_blocks;
  const bool token_tile = shape.tokens == 8 || shape.tokens == 16 || shape.tokens == 32 ||
                          shape.tokens == 64 || shape.tokens == 128 || shape.tokens == 256;
  if (eight != nullptr && (shape.tokens < 64 || shape.rows <= 64)) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  const bool valid =
      kind != Kind::kFull && geometry.k == geometry.k_padded && geometry.k % kBlockInputs == 0 &&
      geometry.k > 0 && args.m >= 1 && args.m < (std::int64_t{1} << 22) &&
      // A tensor with an exponent has scales that fp16 products do not hold.
      (bf16 || (args.dtype == DType::kFloat16 && args.exponent == 0)) && token_tile &&
      shape.rows >= 16 && shape.rows % 16 == 0 && shape.rows <= 128 &&
      (shape.splits == 1 || shape.splits == 2 || shape.splits == 4 || shape.splits == 8) &&
      stages >= shape.splits && args.sm_count >= shape.splits &&
      geometry.tiles * std::max(args.experts, 1) < (std::int64_t{1} << 26) &&
      reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0 && args.x_stride % 8 == 0;
  if (!valid) return static_cast<int>(cudaErrorInvalidValue);

  QmmParams p{};
  p.w = static_cast<const std::uint8_t*>(args.packed);
  p.out = static_cast<std::uint8_t*>(args.out);
  p.bias = args.bias;
  p.token_scales = eight != nullptr ? eight->token_scales : nullptr;
  p.tile_bytes = geometry.tile_bytes;
  p.out_stride = args.out_stride;
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(geometry.n);
  p.stages = stages;
  // Fewer tokens than a tile has: no rows past the last are asked for, what lies there reaches
  // results of no token.
  const int act_rows = static_cast<int>(std::min<std::int64_t>(shape.tokens, (args.m + 7) / 8 * 8));
  p.act_bytes = (eight != nullptr ? 1 : stage_blocks) * act_rows * 128;
  const int row_tiles = shape.rows / 16;
  p.tiles = row_tiles;
  const std::int64_t row_groups = (geometry.tiles + row_tiles - 1) / row_tiles;
  p.token_groups = static_cast<int>((args.m + shape.tokens - 1) / shape.tokens);
  std::int64_t works = row_groups * p.token_groups;
  std::int64_t all_tiles = geometry.tiles;
  if (args.ends != nullptr) {
    if (args.bias != nullptr || args.experts < 1 || shape.splits != 1 || eight != nullptr) {
      return static_cast<int>(cudaErrorInvalidValue);
    }
    p.ends = args.ends;
    p.experts = args.experts;
    p.row_groups = static_cast<int>(row_groups);
    works = row_groups * most_runs(args.m, args.experts, shape.tokens);
    all_tiles *= args.experts;
  }
  if (works > (std::int64_t{1} << 30)) return static_cast<int>(cudaErrorInvalidValue);
  p.works = static_cast<int>(works);
  if (geometry.group_size) {
    while ((1 << p.group_shift) < geometry.group_size) ++p.group_shift;
    p.group_bytes = geometry.group_scale_bytes;
    const int groups = stage_blocks * kBlockInputs / geometry.group_size;
    p.scale_bytes = p.group_bytes * (groups > 1 ? groups : 1);
    p.block_scale_step =
        geometry.group_size > kBlockInputs ? 0 : p.group_bytes * kBlockInputs / geometry.group_size;
    p.minima = geometry.group_scale_bytes == 64;
  }
  p.zero_pair = zero_pair_of(geometry.format, bf16);
  p.factor = 1;
  for (int i = 0; i < args.exponent; ++i) p.factor *= 2;
  for (int i = 0; i > args.exponent; --i) p.factor /= 2;
  p.bias_dtype = args.bias_dtype;
  p.codebook = codebook_pairs(geometry.format, bf16);
  p.weights_once = args.ends != nullptr ? args.m <= std::int64_t{args.experts} * shape.tokens
                                        : p.token_groups == 1;
  p.pair_out = reinterpret_cast<std::uintptr_t>(args.out) % 4 == 0 && args.out_stride % 2 == 0;
  p.vector_out = reinterpret_cast<std::uintptr_t>(args.out) % 16 == 0 && args.out_stride % 8 == 0;

  const int block_bytes = 2 * kBlockInputs * kind_bits(geometry.kind);
  QmmMaps maps{};
  const Plane x_plane = eight != nullptr ? Plane{CU_TENSOR_MAP_DATA_TYPE_UINT8,
                                                 1,
                                                 eight->codes,
                                                 geometry.k,
                                                 args.m,
                                                 geometry.k,
                                                 2 * kBlockInputs,
                                                 act_rows,
                                                 CU_TENSOR_MAP_SWIZZLE_128B}
                                         : Plane{bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                                 2,
                                                 args.x,
                                                 std::int64_t{geometry.k} * 2,
                                                 args.m,
                                                 args.x_stride * 2,
                                                 kBlockInputs * 2,
                                                 act_rows,
                                                 CU_TENSOR_MAP_SWIZZLE_128B};
  bool encoded = encode_map(maps.x, x_plane);
  encoded =
      encoded &&
      encode_map(maps.codes, {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, p.w + geometry.device_codes,
                              std::int64_t{blocks} * block_bytes, all_tiles, geometry.tile_bytes,
                              stage_blocks * block_bytes, row_tiles, CU_TENSOR_MAP_SWIZZLE_NONE});
  if (p.scale_bytes > 0) {
    encoded = encoded && encode_map(maps.scales,
                                    {CU_TENSOR_MAP_DATA_TYPE_INT32, 4, p.w + geometry.device_scales,
                                     std::int64_t{geometry.groups} * p.group_bytes, all_tiles,
                                     geometry.tile_bytes, p.scale_bytes, row_tiles,
                                     CU_TENSOR_MAP_SWIZZLE_NONE});
  }
  if (!encoded) return static_cast<int>(cudaErrorNotSupported);

  // Tiles that all thread blocks have for themselves, and clusters for what remains.
  const Scales scales = has_row_scale(kind) ? Scales::kPlain : qmm_scales(p);
  p.splits =
      std::min(shape.splits, qmm_most_splits(kind, scales, shape.tokens, shape.rows <= 64 ? 1 : 2));
  const int at_once = args.sm_count / p.splits * p.splits;
  if (args.ends == nullptr && works * p.splits > at_once) {
    p.rounds = static_cast<int>(works / at_once);
    if (works % at_once * p.splits > at_once) p.splits = 1;
  }
  while ((1 << p.split_shift) < p.splits) ++p.split_shift;
  // Those of experts go on while there is work.
  const auto thread_blocks = static_cast<unsigned>(
      p.rounds > 0 ? at_once : std::min<std::int64_t>(works * p.splits, at_once));
  switch (kind) {
    case Kind::kInt4:
      return launch_qmm<Kind::kInt4>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kLut4:
      return launch_qmm<Kind::kLut4>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kInt5:
      return launch_qmm<Kind::kInt5>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kInt8:
      return launch_qmm<Kind::kInt8>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kLut3:
      return launch_qmm<Kind::kLut3>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kE4M3:
      return launch_qmm<Kind::kE4M3>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kE5M2:
      return launch_qmm<Kind::kE5M2>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kE4M3Raw:
      return launch_qmm<Kind::kE4M3Raw>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kE5M2Raw:
      return launch_qmm<Kind::kE5M2Raw>(p, maps, bf16, shape, thread_blocks, stream);
    case Kind::kFull:
      break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int qmm(const FusedArgs& args, const QmmShape& shape, Stream stream) {
  return launch(args, shape, nullptr, stream);
}

int qmm_eight(const EightArgs& args, const QmmShape& shape, Stream stream) {
  const FusedArgs& fused = args.fused;
  if (fused.m < 1 || fused.geometry.k % kBlockInputs != 0 || fused.x_stride % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(fused.x) % 16 != 0) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  const auto blocks = static_cast<unsigned>(fused.m);
  const int k = fused.geometry.k;
  const auto quantize = [&](auto kernel) {
    return launch_cluster(kernel, dim3(blocks), 256, 0, 1, shape.early, stream,
                          {&fused.x, &fused.x_stride, &k, &args.codes, &args.token_scales});
  };
  const int error = fused.dtype == DType::kBFloat16
                        ? quantize(quantize_tokens_kernel<__nv_bfloat16>)
                        : quantize(quantize_tokens_kernel<__half>);
  if (error != 0) return error;
  return launch(fused, shape, &args, stream);
}

}  // namespace lowbit::cuda
