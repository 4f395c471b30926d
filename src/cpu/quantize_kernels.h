// What an instruction-set folder exports for quantizing and dequantizing: one table of functions
// that work on a row tile. Plain structs only, for the reason given in linear_kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowbit/format.h"
#include "lowbit/quantize.h"
#include "reference/reference.h"

namespace lowbit::cpu {

// How a weight over its scale becomes a code, and back.
enum class Coder : int {
  kSymmetric,  // integer, the largest magnitude maps to the lowest code
  kInteger,    // integer, absmax maps to value_max (sym_int8)
  kMinimum,    // integer above the group's minimum
  kTable,      // nearest entry of an ascending codebook
  kMirrored,   // nearest entry of the codebook's first half, sign in the code's bit 3
  kFp8E4M3,
  kFp8E5M2,
  kHalf,
  kBrain,
};

// A format's facts in the form that vector code wants. The driver makes one per format.
struct Codec {
  Coder coder;
  int bits;
  float value_max;
  float low, high;  // clamp of the integer before the zero point is added
  int zero_point;
  std::uint16_t padding_code;
  alignas(64) float values[16];  // kTable, kMirrored: the codebook
  // kTable: the thresholds, each the smallest float32 of its code, as a binary search of `levels`
  // steps (4 or 3), the last one first: search[s][p] decides bit s of a code whose higher bits are
  // p.
  int levels;
  alignas(64) float search[4][8];
  // The same as a look-up: bin i of 32 is the floats x with i <= x * bin_mul + bin_add < i + 1. No
  // bin holds two thresholds.
  alignas(64) float bin_threshold[32];
  alignas(64) std::uint8_t place_code[64];  // of bin i below its threshold, and from it on (+ 32)
  float bin_mul, bin_add;
};

// The fp8 codes of one row's weights of 16 bits, by mantissa: generic/quantize_fp8.h.
struct Fp8Table {
  alignas(64) std::uint8_t entries[128];
  std::uint8_t low, offset;
};

// Whose codes lie side by side where those of four vectors are narrowed to bytes.
enum class Order : int {
  kInputs,   // the vectors' lanes one after the other
  kEvenOdd,  // the same, of two vectors with even and two with odd inputs
  kLanes,    // lane r of all four in bytes 4 r to 4 r + 3
};

// Up to 16 rows of weights with inner stride 1, of float32, float16 or bfloat16.
struct SourceTile {
  const void* data;
  DType dtype;
  std::int64_t row_stride;  // elements
  int rows;                 // 1 to 16
  std::int64_t cols;
  bool more;  // the rows of another tile follow, and are worth fetching
};

// Rows that lie side by side: those of one input are contiguous.
struct SourceColumns {
  const void* data;
  DType dtype;              // float32, float16 or bfloat16
  std::int64_t col_stride;  // elements
  std::int64_t rows, cols;
};

struct TargetTile {
  void* data;
  DType dtype;  // float32, float16 or bfloat16
  std::int64_t row_stride;
  int rows;
  std::int64_t cols;
};

struct QuantizeKernels {
  const char* name;
  // Packs a row tile with exponent 0, every byte of it, and widens `range` by what it saw. If that
  // says that weights were not finite, or that an exponent is needed, the bytes mean nothing.
  void (*quantize_tile)(const SourceTile& source, const Layout& layout, const Codec& codec,
                        std::byte* packed_tile, reference::ScaleRange* range);
  // The same for any number of tiles from columns. `workspace` has columns_workspace() bytes.
  void (*quantize_columns)(const SourceColumns& source, const Layout& layout, const Codec& codec,
                           std::byte* packed_tiles, std::byte* workspace,
                           reference::ScaleRange* range);
  std::int64_t (*columns_workspace)(const SourceColumns& source, const Layout& layout);
  // Weights are multiplied by `power` = 2^exponent.
  void (*dequantize_tile)(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                          float power, const TargetTile& target);
  // Row r of the tile into target's only row.
  void (*dequantize_row)(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                         float power, int r, const TargetTile& target);
  // Index of the first element that is not finite, or -1. float32, float16, bfloat16.
  std::int64_t (*first_nonfinite)(const void* data, DType dtype, std::int64_t count);
  // Column-major to row-major: `rows` x `cols` elements of 2 or 4 bytes, rows contiguous in the
  // source. `rows` must be a multiple of 64 / bytes.
  void (*transpose)(const void* data, int bytes, std::int64_t col_stride, std::int64_t rows,
                    std::int64_t cols, void* out, std::int64_t out_stride);
  // Contiguous elements to float32.
  void (*widen)(const void* data, DType dtype, std::int64_t count, float* out);
};

const QuantizeKernels& quantize_kernels_avx2();
const QuantizeKernels& quantize_kernels_avx512();

}  // namespace lowbit::cpu
