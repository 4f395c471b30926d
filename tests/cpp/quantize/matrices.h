// Matrices to quantize: deterministic, of every dtype and stride.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "format/floats.h"
#include "lowbit/quantize.h"

namespace lowbit::testing {

class Random {
 public:
  explicit Random(std::uint32_t seed) : state_(seed * 2654435761u + 1) {}
  std::uint32_t bits() { return state_ = state_ * 1664525u + 1013904223u; }
  // Uniform in [0, 1).
  double uniform() { return static_cast<double>(bits() >> 8) / (1 << 24); }
  // Roughly normal: a sum of four uniform numbers, and now and then a large one.
  double weight() {
    const double sum = uniform() + uniform() + uniform() + uniform() - 2;
    return bits() >> 24 < 3 ? 8 * sum : sum;
  }

 private:
  std::uint32_t state_;
};

// 64-byte aligned bytes, filled with a pattern so that a byte left unwritten shows.
class PackedBuffer {
 public:
  explicit PackedBuffer(const Layout& layout, unsigned char fill = 0xa5)
      : size_(static_cast<std::size_t>(layout.bytes())),
        data_(static_cast<std::byte*>(::operator new(size_ + 1, std::align_val_t(64)))) {
    std::memset(data_.get(), fill, size_);
  }
  std::span<std::byte> span() { return {data_.get(), size_}; }
  std::span<const std::byte> span() const { return {data_.get(), size_}; }
  bool operator==(const PackedBuffer& other) const {
    return size_ == other.size_ && std::memcmp(data_.get(), other.data_.get(), size_) == 0;
  }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::size_t size_;
  std::unique_ptr<std::byte, Delete> data_;
};

inline std::string dtype_name(DType dtype) {
  return dtype == DType::kFloat32    ? "float32"
         : dtype == DType::kFloat16  ? "float16"
         : dtype == DType::kBFloat16 ? "bfloat16"
                                     : "float64";
}

constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                DType::kFloat64};

// A matrix with any strides: element (i, j) lies at offset + i * row_stride + j * col_stride.
struct Matrix {
  std::vector<unsigned char> storage;
  DType dtype;
  std::int64_t rows, cols, row_stride, col_stride, offset;

  Matrix(DType dtype, std::int64_t rows, std::int64_t cols) : Matrix(dtype, rows, cols, cols, 1) {}
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
         std::int64_t col_stride)
      : dtype(dtype), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {
    const std::int64_t row_span = (rows > 0 ? rows - 1 : 0) * row_stride;
    const std::int64_t col_span = (cols > 0 ? cols - 1 : 0) * col_stride;
    offset = (row_span < 0 ? -row_span : 0) + (col_span < 0 ? -col_span : 0);
    const std::int64_t elements = std::abs(row_span) + std::abs(col_span) + 1;
    storage.assign(static_cast<std::size_t>(elements) * dtype_bytes(dtype), 0);
  }

  unsigned char* at(std::int64_t i, std::int64_t j) {
    return storage.data() +
           static_cast<std::size_t>(offset + i * row_stride + j * col_stride) * dtype_bytes(dtype);
  }
  void set(std::int64_t i, std::int64_t j, double value) {
    const auto put = [&](auto v) { std::memcpy(at(i, j), &v, sizeof v); };
    switch (dtype) {
      case DType::kFloat32:
        return put(static_cast<float>(value));
      case DType::kFloat16:
        return put(static_cast<std::uint16_t>(encode_float(kHalfKind, value)));
      case DType::kBFloat16:
        return put(static_cast<std::uint16_t>(encode_float(kBrainKind, value)));
      case DType::kFloat64:
        return put(value);
    }
  }
  double get(std::int64_t i, std::int64_t j) {
    const auto value = [&](auto v) {
      std::memcpy(&v, at(i, j), sizeof v);
      return v;
    };
    switch (dtype) {
      case DType::kFloat32:
        return value(0.0f);
      case DType::kFloat16:
        return decode_float(kHalfKind, value(std::uint16_t{0}));
      case DType::kBFloat16:
        return decode_float(kBrainKind, value(std::uint16_t{0}));
      case DType::kFloat64:
        break;
    }
    return value(0.0);
  }
  void fill(const std::function<double(std::int64_t, std::int64_t)>& f) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; ++j) set(i, j, f(i, j));
    }
  }
  void fill_random(std::uint32_t seed, double scale = 0.05) {
    Random random(seed);
    fill([&](std::int64_t, std::int64_t) { return scale * random.weight(); });
  }

  MatrixView view() { return {at(0, 0), dtype, rows, cols, row_stride, col_stride}; }
  MutableMatrixView mutable_view() { return {at(0, 0), dtype, rows, cols, row_stride, col_stride}; }
};

// The group sizes to try: all for grouped formats, 0 for the others.
inline std::vector<int> group_sizes(const FormatInfo& info) {
  if (!info.grouped()) return {0};
  return {std::begin(kGroupSizes), std::end(kGroupSizes)};
}

}  // namespace lowbit::testing
