// Parameters of the decode kernel; qmv.cuh has the kernel, qmv_<kind>.cu its instances.
#include "cuda/qmv.cuh"

namespace lowbit::cuda {

namespace {

// `run`: tokens of a thread block.
int launch(const FusedArgs& args, std::int64_t run, const QmvShape& shape, Stream stream) {
  const Geometry& geometry = args.geometry;
  const bool bf16 = args.dtype == DType::kBFloat16;
  const int warps = shape.warps_n * shape.warps_k;
  // With experts the tokens of a thread block are what qmv_grouped() was asked for.
  const int token_tiles = qmv_token_tiles(run);
  const bool valid =
      geometry.kind != Kind::kFull && geometry.k == geometry.k_padded &&
      geometry.k % kBlockInputs == 0 && args.m >= 1 && run <= kQmvTokens &&
      (bf16 || args.dtype == DType::kFloat16) && shape.tiles_per_warp >= 1 &&
      shape.tiles_per_warp <= qmv_tiles(token_tiles) && warps >= 1 &&
      warps * kLanes <= qmv_threads(token_tiles) &&
      (shape.splits == 1 || shape.splits == 2 || shape.splits == 4 || shape.splits == 8) &&
      reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0 && args.x_stride % 8 == 0;
  if (!valid) return static_cast<int>(cudaErrorInvalidValue);

  QmvParams p{};
  p.w = static_cast<const std::uint8_t*>(args.packed);
  p.x = static_cast<const std::uint8_t*>(args.x);
  p.out = static_cast<std::uint8_t*>(args.out);
  p.bias = args.bias;
  p.tile_bytes = geometry.tile_bytes;
  p.x_stride_bytes = args.x_stride * 2;
  p.out_stride = args.out_stride;
  p.m = static_cast<int>(run);
  p.items = 1;
  if (args.ends != nullptr) {
    const std::int64_t items = most_runs(args.m, args.experts, run);
    if (items > 65535 || args.bias != nullptr || args.experts < 1) {
      return static_cast<int>(cudaErrorInvalidValue);
    }
    p.ends = args.ends;
    p.experts = args.experts;
    p.rows = static_cast<int>(args.m);
    p.items = static_cast<int>(items);
  }
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
    p.scale_bytes = qmv_scale_bytes(geometry, token_tiles);
  }
  p.tiles_per_warp = shape.tiles_per_warp;
  p.warps_n = shape.warps_n;
  p.warps_k = shape.warps_k;
  p.splits = shape.splits;
  p.slots = qmv_slots(geometry, token_tiles, p.tiles_per_warp, p.warps_k, p.splits);
  p.act_slots = qmv_act_slots(geometry, token_tiles, p.tiles_per_warp, p.warps_k, p.splits);
  p.shared_bytes =
      qmv_shared_bytes(geometry, p.m, p.tiles_per_warp, p.warps_n, p.warps_k, p.splits);
  if (p.shared_bytes > kMostSharedBytes) return static_cast<int>(cudaErrorInvalidValue);
  p.zero_pair = zero_pair_of(geometry.format, bf16);
  p.factor = 1;
  for (int i = 0; i < args.exponent; ++i) p.factor *= 2;
  for (int i = 0; i > args.exponent; --i) p.factor /= 2;
  p.bias_dtype = args.bias_dtype;
  p.codebook = codebook_pairs(geometry.format, bf16);

  switch (geometry.kind) {
    case Kind::kInt4:
      return launch_qmv<Kind::kInt4>(p, bf16, shape, stream);
    case Kind::kLut4:
      return launch_qmv<Kind::kLut4>(p, bf16, shape, stream);
    case Kind::kInt5:
      return launch_qmv<Kind::kInt5>(p, bf16, shape, stream);
    case Kind::kInt8:
      return launch_qmv<Kind::kInt8>(p, bf16, shape, stream);
    case Kind::kLut3:
      return launch_qmv<Kind::kLut3>(p, bf16, shape, stream);
    case Kind::kE4M3:
      return launch_qmv<Kind::kE4M3>(p, bf16, shape, stream);
    case Kind::kE5M2:
      return launch_qmv<Kind::kE5M2>(p, bf16, shape, stream);
    case Kind::kFull:
    case Kind::kE4M3Raw:
    case Kind::kE5M2Raw:
      break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int qmv(const FusedArgs& args, const QmvShape& shape, Stream stream) {
  return launch(args, args.m, shape, stream);
}

int qmv_grouped(const FusedArgs& args, int run, const QmvShape& shape, Stream stream) {
  if (args.ends == nullptr || (run != 8 && run != 16 && run != 32)) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  return launch(args, run, shape, stream);
}

}  // namespace lowbit::cuda
