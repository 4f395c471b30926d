// Float matrices to packed low-bit matrices and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "lowbit/format.h"
#include "lowbit/threads.h"

namespace lowbit {

enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

std::size_t dtype_bytes(DType dtype);

// A float matrix in memory; strides count elements and may be zero or negative.
struct MatrixView {
  const void* data;
  DType dtype;
  std::int64_t rows, cols;
  std::int64_t row_stride, col_stride;
};

struct MutableMatrixView {
  void* data;
  DType dtype;
  std::int64_t rows, cols;
  std::int64_t row_stride, col_stride;
};

// Packs `weight` [layout.n, layout.k] into `packed` (layout.bytes(), 64-byte aligned) and returns
// the tensor's power-of-two exponent e: weight ~ 2^e * dequantized. e is 0 unless a scale would
// leave the normal range of its storage type. The bytes depend neither on the instruction set nor
// on the thread count. Throws Error(kValue) naming row and column of the first non-finite weight,
// Error(kType) for a dtype that is not float.
int quantize(const MatrixView& weight, const Layout& layout, std::span<std::byte> packed,
             const Threads& threads = serial_threads());

// Unpacks all of `packed` into `out` [layout.n, layout.k]: value * 2^exponent as float32, correctly
// rounded, and that rounded to out.dtype where it is a 16-bit type; float64 gets the exact value.
void dequantize(std::span<const std::byte> packed, const Layout& layout, int exponent,
                const MutableMatrixView& out, const Threads& threads = serial_threads());

// Unpacks the given rows: out row i is row rows[i] of the matrix (an embedding look-up). Throws
// Error(kValue) for a row outside [0, n).
void dequantize_rows(std::span<const std::byte> packed, const Layout& layout, int exponent,
                     std::span<const std::int64_t> rows, const MutableMatrixView& out,
                     const Threads& threads = serial_threads());

// Row-major flat index of the first NaN or infinity of `matrix`, or -1. A float64 beyond the range
// of float32 counts as infinite: quantize() would refuse it.
std::int64_t first_nonfinite(const MatrixView& matrix, const Threads& threads = serial_threads());

}  // namespace lowbit
