#include <cstring>

#include "format/floats.h"
#include "lowbit/error.h"
#include "reference/reference.h"

namespace lowbit {

std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat64:
      return 8;
  }
  throw Error(ErrorCode::kType,
              "dtype: expected float32, float16, bfloat16 or float64, got dtype number " +
                  std::to_string(static_cast<int>(dtype)));
}

namespace reference {
namespace {

template <typename T>
T load(const void* data, std::int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * std::int64_t{sizeof(T)}, sizeof(T));
  return value;
}

template <typename T>
void store(void* data, std::int64_t index, T value) {
  std::memcpy(static_cast<char*>(data) + index * std::int64_t{sizeof(T)}, &value, sizeof(T));
}

}  // namespace

double element(const MatrixView& matrix, std::int64_t row, std::int64_t col) {
  const std::int64_t index = row * matrix.row_stride + col * matrix.col_stride;
  switch (matrix.dtype) {
    case DType::kFloat32:
      return load<float>(matrix.data, index);
    case DType::kFloat16:
      return half_to_float(load<std::uint16_t>(matrix.data, index));
    case DType::kBFloat16:
      return bfloat16_to_float(load<std::uint16_t>(matrix.data, index));
    case DType::kFloat64:
      break;
  }
  return load<double>(matrix.data, index);
}

void set_element(const MutableMatrixView& matrix, std::int64_t row, std::int64_t col,
                 double value) {
  const std::int64_t index = row * matrix.row_stride + col * matrix.col_stride;
  switch (matrix.dtype) {
    case DType::kFloat32:
      return store(matrix.data, index, static_cast<float>(value));
    case DType::kFloat16:
      return store(matrix.data, index, static_cast<std::uint16_t>(encode_float(kHalfKind, value)));
    case DType::kBFloat16:
      return store(matrix.data, index, static_cast<std::uint16_t>(encode_float(kBrainKind, value)));
    case DType::kFloat64:
      return store(matrix.data, index, value);
  }
}

void store_weight(const MutableMatrixView& out, std::int64_t row, std::int64_t col, double value) {
  set_element(out, row, col, out.dtype == DType::kFloat64 ? value : static_cast<float>(value));
}

}  // namespace reference
}  // namespace lowbit
