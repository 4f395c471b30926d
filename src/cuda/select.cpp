#include "cuda/select.h"

#include <algorithm>
#include <iterator>

#include "cuda/qmv_shape.h"

namespace lowbit::cuda {
namespace {

// Largest M for which a fused kernel beats dequantizing to scratch and calling cuBLAS.
constexpr std::int64_t kQmmTokens = 4096;

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
  constexpr int kWarpsK[] = {1, 2, 4, 6, 8, 12, 16};
  for (int tiles_per_warp = 1; tiles_per_warp <= qmv_tiles(token_tiles); ++tiles_per_warp) {
    for (int warps_n = 1; warps_n <= 2; ++warps_n) {
      for (int splits = 1; splits <= most_splits && splits <= chunks; splits *= 2) {
        const int share = (chunks + splits - 1) / splits;
        const int busy = *(std::upper_bound(std::begin(kWarpsK), std::end(kWarpsK), share) - 1);
        for (int warps_k : kWarpsK) {
          const int warps = warps_n * warps_k;
          if (warps * 32 > qmv_threads(token_tiles) || warps_k > share) continue;
          // Measured to lose, whatever the model says: fewer than 8 warps while K has work for
          // more, and cutting K further than it takes to give every SM something.
          if (warps < 8 && warps_k < busy) continue;
          // Measured for all types but 4-bit integers: many warps along K, in one thread block.
          if (hopper && token_tiles == 1 && kind != Kind::kInt4 && warps_k < std::min(12, busy)) {
            continue;
          }
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

namespace {

// Cycles of an SM for 64 or 128 outputs x `tokens` and 64 inputs, measured on an H100: bound by
// what the warps issue to dequantize, with 256 tokens by the tensor cores.
double qmm_block_cycles(const Geometry& geometry, int rows, int tokens) {
  if (tokens == 256) return 1110;
  const bool minima = geometry.group_scale_bytes == 64;
  double cycles = 0;
  switch (geometry.kind) {
    case Kind::kInt4:
      cycles = tokens == 128 ? 640 : tokens == 64 ? 440 : 335;
      break;
    case Kind::kLut4:
      cycles = tokens == 128 ? 780 : tokens == 64 ? 540 : 380;
      break;
    case Kind::kE4M3:
    case Kind::kE5M2:
      cycles = tokens == 128 ? 620 : tokens == 64 ? 520 : 420;
      break;
    default:
      cycles = tokens == 128 ? 740 : tokens == 64 ? 570 : 420;
      break;
  }
  if (minima) cycles += tokens == 64 ? 150 : 90;  // of weights from 64 on
  if (rows <= 64) cycles *= tokens == 64 ? 0.55 : tokens == 32 ? 0.52 : 0.38;
  return cycles;
}

// What qmm() takes on an H100, in cycles: the busiest SM's share of the tiles, what a launch costs,
// and the sum over a cluster. Fitted to sweeps (bench/gpu_sweep.py).
double qmm_cycles(const Problem& problem, const QmmShape& shape, double block_cycles) {
  const std::int64_t rows = shape.rows / 16;
  const std::int64_t works =
      (problem.geometry.tiles + rows - 1) / rows * ((problem.m + shape.tokens - 1) / shape.tokens);
  // As qmm() deals the tiles out; `waves` counts whole tiles of the busiest SM.
  const std::int64_t at_once = problem.sm_count / shape.splits * shape.splits;
  double waves = 1.0 / shape.splits;
  bool sums = shape.splits > 1;
  if (works * shape.splits > at_once) {
    const bool shared = works % at_once * shape.splits <= at_once;
    const bool rest = works % at_once > 0;
    sums = sums && shared && rest;
    waves = static_cast<double>(works / at_once) + (rest ? (sums ? 1.0 / shape.splits : 1.0) : 0.0);
  }
  // A cluster lies in one GPC, so that clusters of four leave SMs alone: more would run in turns.
  if (shape.splits == 4 && works * 4 > problem.sm_count * 5 / 6) waves *= 2;
  const double blocks = problem.geometry.k_padded / static_cast<double>(kBlockInputs);
  const double busy = waves * blocks * block_cycles;
  // An SM's share of the memory's bandwidth is 13 bytes a cycle.
  const double stream = static_cast<double>(problem.geometry.tiles * problem.geometry.tile_bytes) /
                        (13.0 * problem.sm_count);
  // One SM alone gets 19 bytes a cycle.
  const double share = waves * static_cast<double>(rows * problem.geometry.tile_bytes) / 19.0;
  return 5800 + std::max({busy, stream, share}) +
         (sums ? 5500 + 0.1 * shape.tokens * shape.rows : 0);
}

// The same for the fp8 tensor cores: bound by the bytes of the weights up to 128 tokens.
double eight_block_cycles(int tokens) {
  return tokens == 256 ? 670 : 640;
}
constexpr double kQuantizeCycles = 9000;  // a kernel more, for the activations

}  // namespace

QmmShape select_qmm(const Problem& problem) {
  const std::int64_t blocks = problem.geometry.k_padded / kBlockInputs;
  QmmShape best{128, 8, 1, true};
  double best_cycles = 1e300;
  for (const int tokens : {8, 16, 32, 64, 128, 256}) {
    const bool covers = tokens >= problem.m;
    // Several tiles of so few tokens pay where sums are scaled, not weights: two of 32.
    const bool halves = tokens == 32 && problem.m <= 64 && problem.geometry.group_scale_bytes == 32;
    if (!covers && tokens < 64 && !halves) continue;
    for (const int rows : {64, 128}) {
      if (rows == 64 && tokens > 64) continue;
      for (const int splits : {1, 2, 4}) {
        if (blocks < splits * 4 || (splits > 2 && tokens == 256)) break;
        const QmmShape shape{rows, tokens, splits, true};
        const double cycles =
            qmm_cycles(problem, shape, qmm_block_cycles(problem.geometry, rows, tokens));
        if (cycles < best_cycles) {
          best_cycles = cycles;
          best = shape;
        }
      }
    }
    if (covers) break;
  }
  return best;
}

QmmShape select_eight(const Problem& problem) {
  QmmShape best{128, 64, 1, true};
  double best_cycles = 1e300;
  for (const int tokens : {64, 128, 256}) {
    for (const int splits : {1, 2}) {
      const QmmShape shape{128, tokens, splits, true};
      const double cycles = qmm_cycles(problem, shape, eight_block_cycles(tokens));
      if (cycles < best_cycles && problem.geometry.k_padded >= splits * 4 * kBlockInputs) {
        best_cycles = cycles;
        best = shape;
      }
    }
    if (tokens >= problem.m) break;
  }
  return best;
}

namespace {

bool eight_pays(const Problem& problem) {
  if (problem.m > kQmmTokens) return true;
  const QmmShape eight = select_eight(problem);
  const QmmShape plain = select_qmm(problem);
  return qmm_cycles(problem, eight, eight_block_cycles(eight.tokens)) + kQuantizeCycles <
         qmm_cycles(problem, plain, qmm_block_cycles(problem.geometry, plain.rows, plain.tokens));
}

}  // namespace

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
  // Which of the two wins up to 16 tokens, measured: every warp of qmv reads for itself, which
  // starts sooner; qmm, 16 of them at once, lasts.
  const std::int64_t bytes = problem.geometry.tiles * problem.geometry.tile_bytes;
  const bool wide = kind_bits(kind) == 8;
  const bool starts = problem.m <= 8 && (!wide || bytes < (std::int64_t{48} << 20));
  // Up to 64 tokens the bytes of the weights decide, whatever multiplies.
  const bool eight = (kind == Kind::kE4M3 || kind == Kind::kE5M2) && shape_fits &&
                     problem.sm >= 90 && problem.sm < 100 && problem.exponent == 0 &&
                     problem.precision == Precision::kInt8 && problem.m > 64 &&
                     problem.m < (std::int64_t{1} << 22) && eight_pays(problem);
  if (eight) {
    choice.path = Path::kEight;
    choice.qmm = select_eight(problem);
    choice.reason = "8-bit activations: fp8 tensor cores";
  } else if (small && (starts || !fused)) {
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

GroupedChoice select_grouped(const Problem& problem, int experts) {
  GroupedChoice choice{};
  choice.path = Path::kScratch;
  // What select() asks of K, alignment and dtype for a few rows holds for any number of them.
  Problem few = problem;
  few.m = 8;
  const Path path = select(few).path;
  if (path != Path::kQmv && path != Path::kQmm) return choice;
  Problem many = problem;
  many.m = 64;
  const bool tensor_cores = select(many).path == Path::kQmm;
  // How many rows each expert has is not known here: as if all that can have some had equally many.
  const std::int64_t active =
      std::clamp<std::int64_t>(experts, 1, std::max<std::int64_t>(1, problem.m));
  const double each = static_cast<double>(problem.m) / static_cast<double>(active);
  const Geometry& geometry = problem.geometry;
  // Measured on an H100 (bench/gpu_experts.py --sweep), as everything below.
  constexpr std::int64_t kStartsBytes = std::int64_t{48} << 20;
  if (!tensor_cores) {
    choice.path = Path::kQmv;
    choice.run = each <= 8 ? 8 : each <= 16 ? 16 : 32;
    // As one matrix of all outputs.
    Problem stack = problem;
    stack.m = choice.run;
    stack.geometry.tiles *= active;
    choice.qmv = select_qmv(stack);
  } else if (each <= 8 && active * geometry.tiles * geometry.tile_bytes < kStartsBytes) {
    choice.path = Path::kQmv;
    choice.run = 8;
    choice.qmv = {4, 1, problem.m <= 16 ? 8 : 4, 1, true};
    // A thread block with a table of pairs has a multiprocessor for itself: as large as it can be.
    if (geometry.kind == Kind::kLut4 && problem.m <= 16 &&
        qmv_shared_bytes(geometry, choice.run, 4, 2, 8, 1) <= kMostSharedBytes) {
      choice.qmv = {4, 2, 8, 1, true};
    }
  } else {
    // Runs that most experts' rows fit into once: some have more than the average.
    int tokens = 8;
    while (tokens < 256 && tokens < 1.5 * each) tokens *= 2;
    choice.path = Path::kQmm;
    choice.qmm = {128, tokens, 1, true};
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
    case Path::kEight:
      return "eight";
  }
  return "?";
}

}  // namespace lowbit::cuda
