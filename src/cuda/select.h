// Which kernel multiplies, and in what shape: a pure function of the problem, testable anywhere.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "lowbit/linear.h"

namespace lowbit::cuda {

enum class Path : std::uint8_t {
  kQmv,      // decode kernel: M <= 32, any supported GPU
  kQmm,      // fused wgmma kernel: sm_90
  kDirect,   // 16-bit weights in the dtype of x: cuBLAS reads them where they are
  kScratch,  // dequantize to the dtype of x, then cuBLAS
  kExact,    // dequantize to fp32, then cuBLAS in fp32
  kEight,  // fp8 weights and activations by fp8 tensor cores, when 8-bit activations are asked for
};

struct Problem {
  std::int64_t m, n, k;
  Geometry geometry;
  int exponent;
  DType x_dtype;
  Precision precision;
  bool x_aligned;  // rows of x start at multiples of 16 bytes
  int sm;          // 80, 90, ...
  int sm_count;
};

struct Choice {
  Path path;
  QmvShape qmv;
  QmmShape qmm;
  const char* reason;
};

Choice select(const Problem& problem);

// The launch shapes alone, for problems their kernels support.
QmvShape select_qmv(const Problem& problem);
QmmShape select_qmm(const Problem& problem);
QmmShape select_eight(const Problem& problem);

// For experts (FusedArgs::ends): problem.m counts the rows of all. kQmv with `run` tokens to a
// thread block, kQmm, or kScratch where no kernel takes the problem: expert by expert then.
struct GroupedChoice {
  Path path;
  int run;
  QmvShape qmv;
  QmmShape qmm;
};
GroupedChoice select_grouped(const Problem& problem, int experts);

const char* path_name(Path path);

}  // namespace lowbit::cuda
