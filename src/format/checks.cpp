#include "format/checks.h"

#include <cmath>
#include <cstdint>
#include <string>

#include "lowbit/error.h"
#include "reference/reference.h"

namespace lowbit {
namespace {

std::string shape_text(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

[[noreturn]] void fail(const char* who, const std::string& text) {
  throw Error(ErrorCode::kValue, std::string(who) + ": " + text);
}

// A layout is plain data; one that make_layout did not make would send us outside the buffer.
void check_layout(const char* who, const Layout& layout) {
  const Layout made = make_layout(layout.format, layout.n, layout.k, layout.group_size);
  if (made.tiles != layout.tiles || made.tile_bytes != layout.tile_bytes ||
      made.k_padded != layout.k_padded || made.groups != layout.groups ||
      made.group_bytes != layout.group_bytes || made.group_size != layout.group_size) {
    fail(who,
         "expected a layout from make_layout, got one whose sizes do not follow from "
         "format, n, k and group_size");
  }
}

void check_packed(const char* who, const Layout& layout, const void* data, std::size_t bytes) {
  if (bytes != static_cast<std::size_t>(layout.bytes())) {
    fail(who, std::string(format_info(layout.format).name) + " " + shape_text(layout.n, layout.k) +
                  " packs into " + std::to_string(layout.bytes()) + " bytes, got a buffer of " +
                  std::to_string(bytes));
  }
  if (reinterpret_cast<std::uintptr_t>(data) % kUnitBytes != 0) {
    fail(who,
         "expected packed bytes at an address that is a multiple of 64; allocate them with "
         "that alignment");
  }
}

void check_matrix(const char* who, const char* name, DType dtype, std::int64_t rows,
                  std::int64_t cols, std::int64_t want_rows, std::int64_t want_cols) {
  if (static_cast<int>(dtype) > static_cast<int>(DType::kFloat64)) {
    throw Error(ErrorCode::kType, std::string(who) + ": expected " + name +
                                      " of float32, float16, bfloat16 or float64, got dtype "
                                      "number " +
                                      std::to_string(static_cast<int>(dtype)));
  }
  if (rows != want_rows || cols != want_cols) {
    fail(who, std::string("expected ") + name + " of shape " + shape_text(want_rows, want_cols) +
                  ", got " + shape_text(rows, cols));
  }
}

bool is_linear_dtype(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

}  // namespace

void check_quantize(const MatrixView& weight, const Layout& layout,
                    std::span<const std::byte> packed) {
  check_layout("quantize", layout);
  check_matrix("quantize", "a weight", weight.dtype, weight.rows, weight.cols, layout.n, layout.k);
  check_packed("quantize", layout, packed.data(), packed.size());
}

void check_dequantize(std::span<const std::byte> packed, const Layout& layout,
                      const MutableMatrixView& out) {
  check_layout("dequantize", layout);
  check_matrix("dequantize", "an output", out.dtype, out.rows, out.cols, layout.n, layout.k);
  check_packed("dequantize", layout, packed.data(), packed.size());
}

void check_rows(std::span<const std::byte> packed, const Layout& layout,
                std::span<const std::int64_t> rows, const MutableMatrixView& out) {
  check_layout("dequantize_rows", layout);
  check_matrix("dequantize_rows", "an output", out.dtype, out.rows, out.cols,
               static_cast<std::int64_t>(rows.size()), layout.k);
  check_packed("dequantize_rows", layout, packed.data(), packed.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || rows[i] >= layout.n) {
      fail("dequantize_rows", "expected rows from 0 to " + std::to_string(layout.n - 1) + ", got " +
                                  std::to_string(rows[i]) + " at position " + std::to_string(i));
    }
  }
}

void check_packed(const char* who, std::span<const std::byte> packed, const Layout& layout) {
  check_layout(who, layout);
  check_packed(who, layout, packed.data(), packed.size());
}

void check_linear(const LinearArgs& args) {
  check_layout("linear", args.layout);
  const std::string shape = " (m=" + std::to_string(args.m) +
                            ", n=" + std::to_string(args.layout.n) +
                            ", k=" + std::to_string(args.layout.k) + ")";
  if (args.m < 0) fail("linear", "expected m >= 0" + shape);
  if (static_cast<int>(args.precision) > static_cast<int>(Precision::kInt8)) {
    fail("linear", "expected precision auto, fp32, bf16 or int8, got number " +
                       std::to_string(static_cast<int>(args.precision)) + shape);
  }
  if (!is_linear_dtype(args.x_dtype) || !is_linear_dtype(args.out_dtype) ||
      (args.bias != nullptr && !is_linear_dtype(args.bias_dtype))) {
    throw Error(ErrorCode::kType,
                "linear: expected x, bias and out of float32, float16 or bfloat16" + shape);
  }
  if (args.m > 1 && (args.x_stride < 0 || args.out_stride < args.layout.n)) {
    fail("linear", "expected x_stride >= 0 and out_stride >= n, got " +
                       std::to_string(args.x_stride) + " and " + std::to_string(args.out_stride) +
                       shape);
  }
  const bool reads = args.m > 0 && args.layout.n > 0 && args.layout.k > 0;
  const bool writes = args.m > 0 && args.layout.n > 0;
  if ((reads && (args.x == nullptr || args.packed == nullptr)) || (writes && args.out == nullptr)) {
    fail("linear", "expected x, packed and out, got a null pointer" + shape);
  }
  if (reinterpret_cast<std::uintptr_t>(args.packed) % kUnitBytes != 0) {
    fail("linear", "expected packed bytes at an address that is a multiple of 64" + shape);
  }
}

void throw_nonfinite(const MatrixView& weight, std::int64_t index) {
  if (index < 0) {
    fail("quantize", "a weight changed while it was read; keep it still until quantize returns");
  }
  const std::int64_t row = index / weight.cols;
  const std::int64_t col = index % weight.cols;
  const double value = reference::element(weight, row, col);
  fail("quantize", "weight" + shape_text(row, col) + " is " +
                       (std::isnan(value) ? "nan" : std::to_string(value)) +
                       "; every weight must be a finite float32; was the checkpoint read or "
                       "trained correctly?");
}

}  // namespace lowbit
