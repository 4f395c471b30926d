// Which CUDA path serves which problem, as a table.
#include "cuda/select.h"

#include <gtest/gtest.h>

#include "cuda/qmv_shape.h"

namespace lowbit::cuda {
namespace {

Problem problem(Format format, std::int64_t m, std::int64_t n, std::int64_t k) {
  Problem p{};
  p.m = m;
  p.n = n;
  p.k = k;
  p.geometry = make_geometry(make_layout(format, n, k));
  p.x_dtype = DType::kBFloat16;
  p.x_aligned = true;
  p.sm = 90;
  p.sm_count = 132;
  return p;
}

TEST(Select, TokensAndBytesDecideTheKernel) {
  for (const FormatInfo& info : formats()) {
    if (info.scale_kind == ScaleKind::kNone) continue;
    const bool wide = kind_bits(kind_of(info.format)) == 8;
    EXPECT_EQ(select(problem(info.format, 1, 4096, 4096)).path, Path::kQmv) << info.name;
    EXPECT_EQ(select(problem(info.format, 8, 28672, 8192)).path, wide ? Path::kQmm : Path::kQmv)
        << info.name;
    EXPECT_EQ(select(problem(info.format, 16, 4096, 4096)).path, Path::kQmm) << info.name;
    EXPECT_EQ(select(problem(info.format, 16, 14336, 4096)).path, Path::kQmm) << info.name;
    EXPECT_EQ(select(problem(info.format, 64, 14336, 4096)).path, Path::kQmm) << info.name;
    EXPECT_EQ(select(problem(info.format, 100000, 4096, 4096)).path, Path::kScratch) << info.name;
  }
}

// Every shape that select_qmm() returns is one that the kernel takes.
TEST(Select, QmmShapesAreValid) {
  for (const Format format :
       {Format::kSymInt4, Format::kAsymInt5, Format::kNf3, Format::kFp8E4M3}) {
    for (std::int64_t m : {1, 7, 16, 17, 64, 100, 129, 512, 2000}) {
      for (std::int64_t n : {1, 16, 1000, 4096, 151936}) {
        for (std::int64_t k : {64, 128, 320, 4096, 28672}) {
          const QmmShape shape = select_qmm(problem(format, m, n, k));
          EXPECT_TRUE(shape.rows == 128 || (shape.rows == 64 && shape.tokens <= 64));
          EXPECT_TRUE(shape.tokens >= 8 && shape.tokens <= 256);
          EXPECT_TRUE(shape.tokens == 8 || shape.tokens / 2 < m) << m;
          EXPECT_LE(shape.splits, (k / 64 + 1) / 2) << k;
        }
      }
    }
  }
}

// However K is cut, the warps share it out: whatever excludes shapes leaves one of many warps.
TEST(Select, DecodeUsesTheWarpsThatKHasWorkFor) {
  for (const FormatInfo& info : formats()) {
    if (info.scale_kind == ScaleKind::kNone) continue;
    for (std::int64_t k = 64; k <= 5120; k += 64) {
      for (std::int64_t m : {1, 8}) {
        const Problem p = problem(info.format, m, 4096, k);
        const QmvShape shape = select_qmv(p);
        const int rounds = qmv_rounds(p.geometry, qmv_token_tiles(m), shape.warps_k, shape.splits);
        EXPECT_TRUE(rounds <= 2 || shape.warps_n * shape.warps_k >= 8)
            << info.name << " k " << k << " m " << m << ": " << shape.warps_n << " x "
            << shape.warps_k << " warps, " << rounds << " chunks each";
      }
    }
  }
}

TEST(Select, SixteenBitWeightsGoToCublas) {
  EXPECT_EQ(select(problem(Format::kBf16, 1, 4096, 4096)).path, Path::kDirect);
  Problem p = problem(Format::kFp16, 1, 4096, 4096);
  EXPECT_EQ(select(p).path, Path::kScratch);
  p.precision = Precision::kFp32;
  EXPECT_EQ(select(p).path, Path::kExact);
  p = problem(Format::kBf16, 1, 4096, 4096);
  p.x_dtype = DType::kFloat16;  // would overflow
  EXPECT_EQ(select(p).path, Path::kExact);
}

TEST(Select, Fp8TensorCoresWhenEightBitActivationsAreAskedFor) {
  for (const Format format : {Format::kFp8E4M3, Format::kFp8E5M2, Format::kSymInt8}) {
    Problem p = problem(format, 512, 4096, 4096);
    EXPECT_EQ(select(p).path, Path::kQmm);
    p.precision = Precision::kInt8;
    EXPECT_EQ(select(p).path, format == Format::kSymInt8 ? Path::kQmm : Path::kEight);
    EXPECT_GE(select(p).qmm.tokens, 64);
    p.m = 64;
    EXPECT_EQ(select(p).path, Path::kQmm);
    p.m = 512;
    p.sm = 80;
    EXPECT_EQ(select(p).path, Path::kScratch);
  }
}

TEST(Select, WhatNoKernelTakesIsDequantized) {
  Problem p = problem(Format::kSymInt4, 1, 100, 100);  // K not a multiple of 64
  EXPECT_EQ(select(p).path, Path::kScratch);
  p = problem(Format::kSymInt4, 64, 4096, 4096);
  p.sm = 80;  // no wgmma
  EXPECT_EQ(select(p).path, Path::kScratch);
  p.sm = 120;  // other instructions again
  EXPECT_EQ(select(p).path, Path::kScratch);
  p = problem(Format::kSymInt4, 4, 4096, 4096);
  p.sm = 80;
  EXPECT_EQ(select(p).path, Path::kQmv);
  EXPECT_EQ(select(p).qmv.splits, 1);  // clusters need sm_90
  EXPECT_FALSE(select(p).qmv.early);
  p.x_aligned = false;
  EXPECT_EQ(select(p).path, Path::kScratch);
}

TEST(Select, ExactPrecisionNeverRoundsWeights) {
  Problem p = problem(Format::kNf4, 1, 4096, 4096);
  p.precision = Precision::kFp32;
  EXPECT_EQ(select(p).path, Path::kExact);
  p = problem(Format::kSymInt4, 1, 4096, 4096);
  p.precision = Precision::kFp32;
  EXPECT_EQ(select(p).path, Path::kQmv);  // codes and sums are exact there
  p.m = 64;
  EXPECT_EQ(select(p).path, Path::kExact);
  p.x_dtype = DType::kFloat32;
  p.m = 1;
  EXPECT_EQ(select(p).path, Path::kExact);
}

// Every shape that select_qmv() returns is one that the kernel takes.
TEST(Select, ExpertsRunInOneLaunch) {
  for (const FormatInfo& info : formats()) {
    for (const std::int64_t n : {1, 1536, 28672}) {
      for (const int experts : {1, 8, 128}) {
        for (const std::int64_t rows : {1, 8, 100, 1000, 100000}) {
          Problem p = problem(info.format, rows, n, 2048);
          GroupedChoice choice = select_grouped(p, experts);
          if (info.scale_kind == ScaleKind::kNone) {
            EXPECT_EQ(choice.path, Path::kScratch) << info.name;
            continue;
          }
          ASSERT_TRUE(choice.path == Path::kQmv || choice.path == Path::kQmm) << info.name;
          if (choice.path == Path::kQmv) {
            EXPECT_EQ(choice.run, 8);
            EXPECT_LE(qmv_shared_bytes(p.geometry, choice.run, choice.qmv.tiles_per_warp,
                                       choice.qmv.warps_n, choice.qmv.warps_k, choice.qmv.splits),
                      kMostSharedBytes);
          } else {
            EXPECT_EQ(choice.qmm.rows, 128);
            EXPECT_EQ(choice.qmm.splits, 1);
            EXPECT_EQ(choice.qmm.tokens & (choice.qmm.tokens - 1), 0);
          }
          p.sm = 80;
          choice = select_grouped(p, experts);
          EXPECT_EQ(choice.path, Path::kQmv);
          EXPECT_LE(qmv_shared_bytes(p.geometry, choice.run, choice.qmv.tiles_per_warp,
                                     choice.qmv.warps_n, choice.qmv.warps_k, choice.qmv.splits),
                    std::size_t{99} * 1024);
        }
      }
    }
  }
  Problem p = problem(Format::kSymInt4, 8, 1536, 2048);
  EXPECT_EQ(select_grouped(p, 128).path, Path::kQmv);
  p.m = 64 * 128;
  EXPECT_EQ(select_grouped(p, 128).qmm.tokens, 128);
  p.x_dtype = DType::kFloat32;
  EXPECT_EQ(select_grouped(p, 128).path, Path::kScratch);
}

TEST(Select, LaunchShapesAreValid) {
  for (std::int64_t m : {1, 8, 9, 16, 17, 32}) {
    for (std::int64_t n : {16, 100, 1024, 4096, 14336, 28672, 151936}) {
      for (std::int64_t k : {64, 128, 576, 4096, 14336, 28672}) {
        const QmvShape shape = select_qmv(problem(Format::kSymInt4, m, n, k));
        EXPECT_GE(shape.tiles_per_warp, 1);
        EXPECT_LE(shape.tiles_per_warp, m > 16 ? 4 : 8);
        EXPECT_GE(shape.warps_k, 1);
        EXPECT_LE(shape.warps_n * shape.warps_k, m > 16 ? 12 : 16);
        EXPECT_LE(shape.splits * 64, k);
      }
    }
  }
}

}  // namespace
}  // namespace lowbit::cuda
