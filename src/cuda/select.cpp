#include "cuda/select.h"

#include <algorithm>

#include "cuda/qmv_shape.h"

namespace lowbit::cuda {
namespace {

// Largest M for which a fused kernel beats dequantizing to scratch and calling cuBLAS.
constexpr std::int64_t kQmmTokens = 1024;

bool is_codebook(Kind kind) {
  return kind == Kind::kLut3 || kind == Kind::kLut4;
}

}  // namespace

QmvShape select_qmv(const Problem& problem) {
  const Geometry& geometry = problem.geometry;
  const Kind kind = geometry.kind;
  const int m = static_cast<int>(problem.m);
  const int token_tiles = qmv_token_tiles(m);
  const int chunk = chunk_blocks(kind, token_tiles);
  const int chunks = qmv_chunks(kind, token_tiles, geometry.k_padded);
  const bool hopper = problem.sm >= 90;
  // sm_80 has no clusters and, on its smaller parts, 99 KiB of shared memory.
  const int most_splits = hopper ? 8 : 1;
  const std::size_t most_bytes = hopper ? kMostSharedBytes : 99 * 1024;

  // A model of the busiest SM, in cycles, minimized over all ways to cut the matrix. Its constants
  // are fitted to sweeps on an H100 (bench/gpu_sweep.py): an SM's share of HBM is 13 bytes a cycle;
  // a warp takes so long for one 16 x 64 block when nothing else limits it; 16 warps fit an SM.
  const double cycles_per_block = token_tiles == 1 ? 430 + 20 * m : token_tiles == 2 ? 520 : 980;
  const double block_bytes = 2.0 * kBlockInputs * kind_bits(kind) +
                             static_cast<double>(qmv_scale_bytes(geometry, token_tiles)) / chunk;
  QmvShape best{1, 1, 1, 1, hopper};
  double best_cost = 1e300;
  for (int tiles_per_warp = 1; tiles_per_warp <= qmv_tiles(token_tiles); ++tiles_per_warp) {
    for (int warps_n = 1; warps_n <= 2; ++warps_n) {
      for (int splits = 1; splits <= most_splits && splits <= chunks; splits *= 2) {
        const int share = (chunks + splits - 1) / splits;
        for (int warps_k : {1, 2, 4, 6, 8, 12, 16}) {
          const int warps = warps_n * warps_k;
          if (warps * 32 > qmv_threads(token_tiles) || warps_k > share) continue;
          // Measured to lose, whatever the model says: fewer than 8 warps while K has work for
          // more, and cutting K further than it takes to give every SM something.
          if (warps < 8 && warps_k < share) continue;
          if (splits > 2 && geometry.tiles * splits > problem.sm_count) continue;
          const std::size_t bytes =
              qmv_shared_bytes(geometry, m, tiles_per_warp, warps_n, warps_k, splits);
          if (bytes > most_bytes) continue;
          const std::int64_t rows = std::int64_t{tiles_per_warp} * warps_n;
          const std::int64_t thread_blocks = (geometry.tiles + rows - 1) / rows * splits;
          const std::int64_t per_sm = (thread_blocks + problem.sm_count - 1) / problem.sm_count;
          const std::int64_t fit = std::min<std::int64_t>(
              {per_sm, std::max(1, 16 / warps),
               std::max<std::int64_t>(1, static_cast<std::int64_t>(most_bytes / bytes))});
          const auto waves = static_cast<double>((per_sm + fit - 1) / fit);
          const double blocks = static_cast<double>(share) * chunk;
          const double stream =
              static_cast<double>(per_sm) * blocks *
              (static_cast<double>(rows) * block_bytes + 0.15 * m * 128.0 * warps_n) / 13.0;
          const double chain =
              waves * tiles_per_warp * cycles_per_block * ((share + warps_k - 1) / warps_k) * chunk;
          const double end = waves * (1200.0 + static_cast<double>(rows) * m * warps_k +
                                      (splits > 1 ? 5000.0 : 0.0));
          const double cost = std::max(stream, chain) + 0.25 * std::min(stream, chain) + end;
          if (cost < best_cost) {
            best_cost = cost;
            best = {tiles_per_warp, warps_n, warps_k, splits, hopper};
          }
        }
      }
    }
  }
  return best;
}

// Rules read off sweeps of 4096 x 4096, 14336 x 4096, 4096 x 14336 and 28672 x 8192 on an H100.
QmmShape select_qmm(const Problem& problem) {
  const std::int64_t blocks = problem.geometry.k_padded / kBlockInputs;
  const bool few_rows = problem.geometry.tiles <= 2 * problem.sm_count;
  const auto groups = [&](int rows, int tokens) {
    return (problem.geometry.tiles * 16 + rows - 1) / rows * ((problem.m + tokens - 1) / tokens);
  };
  // As many cuts of K as leave at most one thread block per SM.
  const auto fill = [&](int rows, int tokens, int most) {
    int splits = 1;
    while (splits < most && groups(rows, tokens) * splits * 2 <= problem.sm_count &&
           blocks >= splits * 8) {
      splits *= 2;
    }
    return splits;
  };
  if (problem.m <= 64) {
    const int tokens = problem.m <= 32 ? 32 : 64;
    // Few outputs: two small thread blocks per SM.
    if (few_rows && blocks >= 32 && (tokens == 32 || blocks >= 128)) return {128, tokens, 8, true};
    return {256, tokens, fill(256, tokens, 4), true};
  }
  if (problem.m <= 128) return {256, 128, fill(256, 128, 4), true};
  if (problem.m <= 256 && few_rows) return {128, 128, fill(128, 128, 2), true};
  return {128, 256, fill(128, 256, 2), true};
}

Choice select(const Problem& problem) {
  const Kind kind = problem.geometry.kind;
  const bool half_x = problem.x_dtype == DType::kBFloat16 || problem.x_dtype == DType::kFloat16;
  Choice choice{};
  if (!half_x || problem.exponent > 60 || problem.exponent < -60) {
    choice.path = Path::kExact;
    choice.reason = half_x ? "exponent beyond what 16-bit weights can carry" : "fp32 activations";
    return choice;
  }
  if (kind == Kind::kFull) {
    const bool same =
        (problem.geometry.format == Format::kBf16) == (problem.x_dtype == DType::kBFloat16);
    if (same && problem.exponent == 0) {
      choice.path = Path::kDirect;
      choice.reason = "16-bit weights as they are";
    } else if (problem.x_dtype == DType::kBFloat16 && problem.precision != Precision::kFp32) {
      choice.path = Path::kScratch;  // bf16 holds the range of fp16
      choice.reason = "fp16 weights rounded to the bf16 of x";
    } else {
      choice.path = Path::kExact;
      choice.reason = "16-bit weights that the dtype of x cannot hold";
    }
    return choice;
  }
  const bool shape_fits =
      problem.k % kBlockInputs == 0 && problem.k > 0 && problem.x_aligned && problem.sm >= 80;
  const bool exact = problem.precision == Precision::kFp32;
  const bool small = shape_fits && problem.m <= kQmvTokens && !(exact && is_codebook(kind));
  const bool fused = shape_fits && problem.sm >= 90 && problem.sm < 100 && !exact &&
                     problem.m <= kQmmTokens && problem.exponent == 0;
  if (small && (problem.m <= 16 || !fused)) {
    choice.path = Path::kQmv;
    choice.qmv = select_qmv(problem);
    choice.reason = "few tokens: bound by the bytes of the weights";
  } else if (fused) {
    choice.path = Path::kQmm;
    choice.qmm = select_qmm(problem);
    choice.reason = "dequantized on the way to the tensor cores";
  } else if (exact || problem.exponent != 0) {
    choice.path = Path::kExact;
    choice.reason = exact ? "exact weights asked for" : "a tensor with an exponent";
  } else {
    choice.path = Path::kScratch;
    choice.reason = !shape_fits ? "no fused kernel for this K, alignment or GPU"
                                : "many tokens: cuBLAS repays the dequantized copy";
  }
  return choice;
}

const char* path_name(Path path) {
  switch (path) {
    case Path::kQmv:
      return "qmv";
    case Path::kQmm:
      return "qmm";
    case Path::kDirect:
      return "direct";
    case Path::kScratch:
      return "scratch";
    case Path::kExact:
      return "exact";
  }
  return "?";
}

}  // namespace lowbit::cuda
