// Parameters of the wgmma kernel; qmm.cuh has the kernel, qmm_sm90_<kind>.cu its instances.
#include <cuda.h>
#include <cudaTypedefs.h>

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

}  // namespace

int qmm(const FusedArgs& args, const QmmShape& shape, Stream stream) {
  const Geometry& geometry = args.geometry;
  const bool bf16 = args.dtype == DType::kBFloat16;
  const bool valid =
      geometry.kind != Kind::kFull && geometry.k == geometry.k_padded &&
      geometry.k % kBlockInputs == 0 && geometry.k > 0 && args.m >= 1 &&
      args.m < (std::int64_t{1} << 22) &&
      // A tensor with an exponent has scales that fp16 products do not hold.
      (bf16 || (args.dtype == DType::kFloat16 && args.exponent == 0)) &&
      (shape.tokens == 32 || shape.tokens == 64 || shape.tokens == 128 || shape.tokens == 256) &&
      (shape.rows == 128 || (shape.rows == 256 && shape.tokens <= 128)) &&
      (shape.splits == 1 || shape.splits == 2 || shape.splits == 4 || shape.splits == 8) &&
      geometry.tiles < 65535 * 8 && geometry.k >= shape.splits * kBlockInputs &&
      reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0 && args.x_stride % 8 == 0;
  if (!valid) return static_cast<int>(cudaErrorInvalidValue);

  QmmParams p{};
  p.w = static_cast<const std::uint8_t*>(args.packed);
  p.x = static_cast<const std::uint8_t*>(args.x);
  p.out = static_cast<std::uint8_t*>(args.out);
  p.bias = args.bias;
  p.tile_bytes = geometry.tile_bytes;
  p.x_stride_bytes = args.x_stride * 2;
  p.out_stride = args.out_stride;
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(geometry.n);
  p.tiles = static_cast<int>(geometry.tiles);
  p.blocks = geometry.k_padded / kBlockInputs;
  p.codes_at = geometry.device_codes;
  p.scales_at = geometry.device_scales;
  if (geometry.group_size) {
    while ((1 << p.group_shift) < geometry.group_size) ++p.group_shift;
    p.group_bytes = geometry.group_scale_bytes;
    p.half_groups = geometry.group_size == 32;
    p.minima = geometry.group_scale_bytes == 64;
    p.scale_bytes = p.group_bytes * (p.half_groups ? 2 : 1);
  }
  p.splits = shape.splits;
  p.zero_pair = zero_pair_of(geometry.format, bf16);
  p.factor = 1;
  for (int i = 0; i < args.exponent; ++i) p.factor *= 2;
  for (int i = 0; i > args.exponent; --i) p.factor /= 2;
  p.bias_dtype = args.bias_dtype;
  p.format = geometry.format;

  CUtensorMap map;
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return static_cast<int>(cudaErrorNotSupported);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(geometry.k), static_cast<cuuint64_t>(args.m)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(p.x_stride_bytes)};
  const cuuint32_t box[] = {kBlockInputs, static_cast<cuuint32_t>(shape.tokens)};
  const cuuint32_t ones[] = {1, 1};
  if (encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(args.x), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    return static_cast<int>(cudaErrorInvalidValue);
  }

  switch (geometry.kind) {
    case Kind::kInt4:
      return launch_qmm<Kind::kInt4>(p, map, bf16, shape, stream);
    case Kind::kLut4:
      return launch_qmm<Kind::kLut4>(p, map, bf16, shape, stream);
    case Kind::kInt5:
      return launch_qmm<Kind::kInt5>(p, map, bf16, shape, stream);
    case Kind::kInt8:
      return launch_qmm<Kind::kInt8>(p, map, bf16, shape, stream);
    case Kind::kLut3:
      return launch_qmm<Kind::kLut3>(p, map, bf16, shape, stream);
    case Kind::kE4M3:
      return launch_qmm<Kind::kE4M3>(p, map, bf16, shape, stream);
    case Kind::kE5M2:
      return launch_qmm<Kind::kE5M2>(p, map, bf16, shape, stream);
    case Kind::kFull:
      break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace lowbit::cuda
