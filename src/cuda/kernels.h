// What the CUDA kernels offer to the torch binding and to tests: plain pointers, no torch. Every
// function returns a cudaError_t as an int (0 = launched), never synchronizes and never allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device_layout.h"
#include "lowbit/quantize.h"

struct CUstream_st;

namespace lowbit::cuda {

using Stream = CUstream_st*;

// Canonical tiles to device order and back; `tiles` may span several matrices of one shape.
int pack_for_device(const Geometry& geometry, std::int64_t tiles, const void* canonical,
                    void* device, Stream stream);
int unpack_from_device(const Geometry& geometry, std::int64_t tiles, const void* device,
                       void* canonical, Stream stream);

// What the exponent rule (src/reference/exponent.cpp) needs to know of all groups, and the
// row-major index of the first weight that is not finite (INT64_MAX: none).
struct QuantizeRange {
  float largest, smallest;
  float largest_minimum, smallest_minimum;
  std::int64_t nonfinite;
};

// Plain rounding of a stack of matrices [matrices, geometry.n, geometry.k].
struct QuantizeArgs {
  const void* weight;
  DType dtype;  // float32, float16, bfloat16
  Geometry geometry;
  std::int64_t matrices;
  std::int64_t row_stride, col_stride;  // elements; rows of all matrices are equally far apart
  int exponent;
  float value_max, code_low, code_high;  // of the format; codes less their zero point
  bool far_negative;                     // the scale's sign puts the largest magnitude below zero
  std::uint32_t padding_code;
  void* canonical;       // packed, in the canonical order
  QuantizeRange* range;  // on the device
};
// Scales (and minima) of all groups, and their range. Then, with the same exponent, the codes.
int quantize_scales(const QuantizeArgs& args, Stream stream);
int quantize_codes(const QuantizeArgs& args, Stream stream);

struct DequantizeArgs {
  const void* packed;  // device order
  Geometry geometry;
  int exponent;
  void* out;        // [rows, k], inner stride 1
  DType out_dtype;  // float32, float16, bfloat16
  std::int64_t out_stride;
  std::int64_t first_row, rows;  // first_row a multiple of 16
  bool exact;  // float64 inside: rounded once, as the CPU does; else float32 inside (twice as fast)
};
int dequantize(const DequantizeArgs& args, Stream stream);

struct EmbeddingArgs {
  const void* packed;
  Geometry geometry;
  int exponent;
  const std::int64_t* ids;  // [count]; an id outside [0, n) gives a row of NaN, as it cannot raise
  std::int64_t count;
  void* out;  // [count, k]
  DType out_dtype;
};
int embedding(const EmbeddingArgs& args, Stream stream);

// One fused linear: out = x W^T 2^exponent + bias.
struct FusedArgs {
  const void* packed;
  Geometry geometry;
  int exponent;
  const void* x;  // [m, k] bfloat16 or float16, rows 16-byte aligned
  DType dtype;    // of x and out
  std::int64_t x_stride;
  const void* bias;  // [n] or nullptr
  DType bias_dtype;
  void* out;  // [m, n]
  std::int64_t out_stride;
  std::int64_t m;
  int sm_count;  // of the current device
  // Experts: matrices of one geometry, one behind the other, which have the rows of x that end at
  // ends[e] (int32 on the device, ascending); no bias. Rows past the last end get no result.
  const std::int32_t* ends;  // nullptr: one matrix for all rows
  int experts;
};

// Runs of up to `run` rows of one expert that `rows` rows fall into at most.
inline std::int64_t most_runs(std::int64_t rows, std::int64_t experts, std::int64_t run) {
  return (rows < experts ? rows : experts) + rows / run;
}

// Launch shapes, chosen by select() and overridden by the benchmark's sweeps.
struct QmvShape {
  int tiles_per_warp;  // row tiles of 16 outputs: 1..8, for M > 16 1..4
  int warps_n;         // warps of a block side by side along N
  int warps_k;         // warps of a block along K; summed in order at the end
  int splits;          // blocks of a cluster along K (1, 2, 4, 8); summed in order
  bool early;          // start before the previous kernel ends and load weights meanwhile
};
inline constexpr int kQmvTokens = 32;
int qmv(const FusedArgs& args, const QmvShape& shape, Stream stream);
// The same for experts: thread blocks of `run` (8, 16, 32) tokens of one.
int qmv_grouped(const FusedArgs& args, int run, const QmvShape& shape, Stream stream);

struct QmmShape {
  int rows;    // outputs of a thread block: a multiple of 16, up to 128
  int tokens;  // its token tile: 8, 16, 32, 64, 128, 256
  int splits;  // thread blocks of a cluster along K (1, 2, 4, 8), for tiles that are left over when
               // every SM has had the same number of them; summed in order
  bool early;
};
int qmm(const FusedArgs& args, const QmmShape& shape, Stream stream);  // also for experts

// The fp8 types with activations in e4m3, by fp8 tensor cores: out = scale_x scale_w (x W^T).
struct EightArgs {
  FusedArgs fused;      // of x as it is; dtype bfloat16 or float16, K a multiple of 64
  void* codes;          // scratch: [m, k] bytes, 16-byte aligned
  float* token_scales;  // scratch: [m]
};
// Quantizes each row of x to e4m3 by its largest magnitude / 448 (to nearest, ties to even), in the
// order along K in which the kernel's A operand holds the weights, and multiplies. shape.tokens 64,
// 128 or 256, shape.rows above 64.
int qmm_eight(const EightArgs& args, const QmmShape& shape, Stream stream);

}  // namespace lowbit::cuda
