#include "cuda/select.h"

#include <algorithm>

namespace lowbit::cuda {
namespace {

// Largest M for which a fused kernel beats dequantizing to scratch and calling cuBLAS.
constexpr std::int64_t kQmmTokens = 1024;

bool is_codebook(Kind kind) { return kind == Kind::kLut3 || kind == Kind::kLut4; }

}  // namespace

QmvShape select_qmv(const Problem& problem) {
  const std::int64_t tiles = problem.geometry.tiles;
  const std::int64_t blocks = problem.geometry.k_padded / kBlockInputs;
  const int token_tiles = problem.m <= 8 ? 1 : problem.m <= 16 ? 2 : 4;
  const int most_tiles = token_tiles == 4 ? 4 : 8;
  const int most_warps = token_tiles == 1 ? 16 : 12;
  const int most_splits = problem.sm >= 90 ? 8 : 1;

  // Time of the busiest SM in units of one 16 x 64 block, over all ways to cut the matrix: the
  // units it streams, the activations it fetches, and a price for the sums at the end.
  const double unit_bytes = 2.0 * kBlockInputs * kind_bits(problem.geometry.kind);
  const double activation_units = static_cast<double>(problem.m) * 128 / unit_bytes * 0.5;
  QmvShape best{1, 1, std::min<int>(most_warps, static_cast<int>(std::max<std::int64_t>(blocks, 1))),
                1, problem.sm >= 90};
  double best_cost = 1e300;
  for (int tiles_per_warp = 1; tiles_per_warp <= most_tiles; ++tiles_per_warp) {
    for (int warps_n = 1; warps_n <= 2; ++warps_n) {
      for (int splits = 1; splits <= most_splits; splits *= 2) {
        if (splits > blocks) break;
        const std::int64_t rows = std::int64_t{tiles_per_warp} * warps_n;
        const std::int64_t thread_blocks = (tiles + rows - 1) / rows * splits;
        const std::int64_t per_sm = (thread_blocks + problem.sm_count - 1) / problem.sm_count;
        const std::int64_t share = (blocks + splits - 1) / splits;
        const int warps_k = static_cast<int>(std::min<std::int64_t>(most_warps / warps_n, share));
        const std::int64_t rounds = (share + warps_k - 1) / warps_k * warps_k;
        const double stream = static_cast<double>(per_sm) * rounds *
                              (static_cast<double>(rows) + activation_units * warps_n);
        const double sums = static_cast<double>(per_sm) *
                            (12.0 + 0.25 * static_cast<double>(rows) * problem.m / 8.0 * warps_k / 8 +
                             (splits > 1 ? 12.0 : 0.0));
        const double cost = stream + sums;
        if (cost < best_cost) {
          best_cost = cost;
          best = {tiles_per_warp, warps_n, warps_k, splits, problem.sm >= 90};
        }
      }
    }
  }
  return best;
}

QmmShape select_qmm(const Problem& problem) {
  const int tokens = problem.m <= 32 ? 32 : problem.m <= 64 ? 64 : problem.m <= 128 ? 128 : 256;
  const std::int64_t row_groups = (problem.geometry.tiles + 7) / 8;
  const std::int64_t token_groups = (problem.m + tokens - 1) / tokens;
  int splits = 1;
  // A thread block of 128 outputs per SM; more along K while SMs would stay empty.
  while (splits < 4 && row_groups * token_groups * splits * 2 <= problem.sm_count &&
         problem.geometry.k_padded / kBlockInputs >= splits * 2 * 4) {
    splits *= 2;
  }
  return {tokens, splits, true};
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
    const bool same = (problem.geometry.format == Format::kBf16) ==
                      (problem.x_dtype == DType::kBFloat16);
    choice.path = same && problem.exponent == 0 ? Path::kDirect : Path::kExact;
    choice.reason = same ? "16-bit weights as they are" : "16-bit weights of another dtype than x";
    return choice;
  }
  const bool shape_fits = problem.k % kBlockInputs == 0 && problem.k > 0 && problem.x_aligned &&
                          problem.sm >= 80;
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
