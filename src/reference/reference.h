// The definitions behind lowbit::reference, one row tile or one element at a time. Plain scalar
// code; the vectorised paths fall back to it where speed does not matter.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "lowbit/format.h"
#include "lowbit/quantize.h"

namespace lowbit::reference {

// Packed numbers are little-endian on every machine.
template <typename T>
T little_endian(T value) {
  if constexpr (std::endian::native == std::endian::big) {
    auto bytes = std::bit_cast<std::array<std::byte, sizeof(T)>>(value);
    std::reverse(bytes.begin(), bytes.end());
    return std::bit_cast<T>(bytes);
  }
  return value;
}

// One element of a matrix of any dtype, exactly; written with one rounding.
double element(const MatrixView& matrix, std::int64_t row, std::int64_t col);
void set_element(const MutableMatrixView& matrix, std::int64_t row, std::int64_t col, double value);

// What the exponent rule needs to know of all groups (rows, for row-scaled formats) of a matrix.
// The statistic of a group is what its scale is a fraction of: its largest magnitude, or
// max - min for formats with minima. Minima count only there.
struct ScaleRange {
  float largest = 0;
  float smallest = std::numeric_limits<float>::infinity();  // of those that are not zero
  float largest_minimum = 0;                                // magnitudes
  float smallest_minimum = std::numeric_limits<float>::infinity();
  bool finite = true;  // no NaN or infinity among the weights

  void add(float statistic);
  void add_minimum(float minimum);
  void merge(const ScaleRange& other);
};

// The exponent rule (docs/formats.md): 0 unless a scale or minimum that is not zero would leave the
// normal range of its storage type, or a 16-bit weight would become infinite.
int exponent_for(const FormatInfo& info, const ScaleRange& range);

// The scale range of one row tile of `weight` (a finite one).
ScaleRange tile_range(const MatrixView& weight, const Layout& layout, std::int64_t tile);

// Packs one row tile, every byte of it, with weights divided by 2^exponent.
void quantize_tile(const MatrixView& weight, const Layout& layout, int exponent, std::int64_t tile,
                   std::byte* packed_tile);

// The stored code at row r (0..15) of a row tile and input k; and its exact weight.
std::uint32_t code_at(const std::byte* packed_tile, const Layout& layout, int r, std::int64_t k);
double weight_at(const std::byte* packed_tile, const Layout& layout, int exponent, int r,
                 std::int64_t k);

// The value of a code before its scale, exactly.
double code_value(const FormatInfo& info, std::uint32_t code);

// The code of t = weight / scale (float32): nearest value, ties to even, clamped.
std::uint32_t nearest_code(const FormatInfo& info, float t);

// One dequantized element: float32, correctly rounded, then rounded to the matrix's dtype; float64
// gets the exact value.
void store_weight(const MutableMatrixView& out, std::int64_t row, std::int64_t col, double value);

}  // namespace lowbit::reference
