// Parameters of the wgmma kernel; qmm.cuh has the kernel, qmm_sm90_<kind>.cu its instances.
#include <cuda.h>
#include <cudaTypedefs.h>

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

int sm_count() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

}  // namespace

int qmm(const FusedArgs& args, const QmmShape& shape, Stream stream) {
  const Geometry& geometry = args.geometry;
  const bool bf16 = args.dtype == DType::kBFloat16;
  const int blocks = geometry.k_padded / kBlockInputs;
  const int stage_blocks = qmm_stage_blocks(shape.tokens);
  const int stages = (blocks + stage_blocks - 1) / stage_blocks;
  const bool token_tile = shape.tokens == 8 || shape.tokens == 16 || shape.tokens == 32 ||
                          shape.tokens == 64 || shape.tokens == 128 || shape.tokens == 256;
  const bool valid =
      geometry.kind != Kind::kFull && geometry.k == geometry.k_padded &&
      geometry.k % kBlockInputs == 0 && geometry.k > 0 && args.m >= 1 &&
      args.m < (std::int64_t{1} << 22) &&
      // A tensor with an exponent has scales that fp16 products do not hold.
      (bf16 || (args.dtype == DType::kFloat16 && args.exponent == 0)) && token_tile &&
      shape.rows >= 16 && shape.rows % 16 == 0 && shape.rows <= 128 &&
      (shape.splits == 1 || shape.splits == 2 || shape.splits == 4 || shape.splits == 8) &&
      stages >= shape.splits && geometry.tiles < (std::int64_t{1} << 26) &&
      reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0 && args.x_stride % 8 == 0;
  if (!valid) return static_cast<int>(cudaErrorInvalidValue);

  QmmParams p{};
  p.w = static_cast<const std::uint8_t*>(args.packed);
  p.out = static_cast<std::uint8_t*>(args.out);
  p.bias = args.bias;
  p.tile_bytes = geometry.tile_bytes;
  p.out_stride = args.out_stride;
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(geometry.n);
  p.stages = stages;
  const int row_tiles = shape.rows / 16;
  p.tiles = row_tiles;
  const std::int64_t row_groups = (geometry.tiles + row_tiles - 1) / row_tiles;
  p.token_groups = static_cast<int>((args.m + shape.tokens - 1) / shape.tokens);
  const std::int64_t works = row_groups * p.token_groups;
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
  p.format = geometry.format;
  p.weights_once = p.token_groups == 1;
  p.vector_out = reinterpret_cast<std::uintptr_t>(args.out) % 16 == 0 && args.out_stride % 8 == 0;

  const int block_bytes = 2 * kBlockInputs * kind_bits(geometry.kind);
  QmmMaps maps{};
  bool encoded =
      encode_map(maps.x, {bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                          2, args.x, std::int64_t{geometry.k} * 2, args.m, args.x_stride * 2,
                          kBlockInputs * 2, shape.tokens, CU_TENSOR_MAP_SWIZZLE_128B});
  encoded = encoded &&
            encode_map(maps.codes,
                       {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, p.w + geometry.device_codes,
                        std::int64_t{blocks} * block_bytes, geometry.tiles, geometry.tile_bytes,
                        stage_blocks * block_bytes, row_tiles, CU_TENSOR_MAP_SWIZZLE_NONE});
  if (p.scale_bytes > 0) {
    encoded = encoded && encode_map(maps.scales,
                                    {CU_TENSOR_MAP_DATA_TYPE_INT32, 4, p.w + geometry.device_scales,
                                     std::int64_t{geometry.groups} * p.group_bytes, geometry.tiles,
                                     geometry.tile_bytes, p.scale_bytes, row_tiles,
                                     CU_TENSOR_MAP_SWIZZLE_NONE});
  }
  if (!encoded) return static_cast<int>(cudaErrorNotSupported);

  // Tiles that all thread blocks have for themselves, and clusters for what remains.
  p.splits = shape.splits;
  const int at_once = sm_count() / p.splits * p.splits;
  std::int64_t thread_blocks = works * p.splits;
  if (thread_blocks > at_once) {
    p.rounds = static_cast<int>(works / at_once);
    if (works % at_once * p.splits > at_once) p.splits = 1;
    thread_blocks = p.rounds > 0 ? at_once : thread_blocks;
  }
  while ((1 << p.split_shift) < p.splits) ++p.split_shift;
  switch (geometry.kind) {
    case Kind::kInt4:
      return launch_qmm<Kind::kInt4>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kLut4:
      return launch_qmm<Kind::kLut4>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kInt5:
      return launch_qmm<Kind::kInt5>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kInt8:
      return launch_qmm<Kind::kInt8>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kLut3:
      return launch_qmm<Kind::kLut3>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kE4M3:
      return launch_qmm<Kind::kE4M3>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kE5M2:
      return launch_qmm<Kind::kE5M2>(p, maps, bf16, shape, static_cast<unsigned>(thread_blocks),
                                     stream);
    case Kind::kFull:
      break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace lowbit::cuda
