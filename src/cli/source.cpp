#include "cli/source.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "format/floats.h"

namespace lowbit::cli {
namespace {

// ---- one value: all types but float64 fit a float
// ------------------------------------------------

std::uint32_t bits16(const std::byte* p) {
  return std::to_integer<std::uint32_t>(p[0]) | std::to_integer<std::uint32_t>(p[1]) << 8;
}

const std::vector<float>& half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (std::uint32_t bits = 0; bits < all.size(); ++bits)
      all[bits] = static_cast<float>(decode_float(kHalfKind, bits));
    return all;
  }();
  return values;
}

// To nearest, ties to even, like encode_float, without its logarithms.
std::uint32_t brain_of(float v) {
  std::uint32_t bits = std::bit_cast<std::uint32_t>(v);
  if (std::isnan(v)) return 0x7FC0;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// The addition rounds: its other operand has the exponent that puts the last place of a half at the
// last place of a float. (From the FP16 library of Maratyszcza.)
std::uint32_t half_of(float v) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(v), twice = bits + bits;
  if (std::isnan(v)) return bits >> 31 << 15 | 0x7E00;
  const std::uint32_t bias = std::max(twice & 0xFF000000u, 0x71000000u);
  const float scaled = (std::fabs(v) * 0x1p+112f) * 0x1p-110f;
  const std::uint32_t sum =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  return bits >> 31 << 15 | ((sum >> 13 & 0x7C00) + (sum & 0x0FFF));
}

float load(DType type, const std::byte* p) {
  if (type == DType::kFloat16) return half_values()[bits16(p)];
  if (type == DType::kBFloat16) return std::bit_cast<float>(bits16(p) << 16);
  float v;
  std::memcpy(&v, p, 4);
  return v;
}

void store(DType type, float v, std::byte* p) {
  if (type == DType::kFloat64) {
    const double wide = v;
    std::memcpy(p, &wide, 8);
  } else if (type == DType::kFloat32) {
    std::memcpy(p, &v, 4);
  } else {
    std::uint32_t bits = type == DType::kFloat16 ? half_of(v) : brain_of(v);
    p[0] = static_cast<std::byte>(bits);
    p[1] = static_cast<std::byte>(bits >> 8);
  }
}

void store_double(DType type, double v, std::byte* p) {
  if (type == DType::kFloat32) return store(type, static_cast<float>(v), p);
  // Through float32 it would be rounded twice.
  std::uint32_t bits = encode_float(type == DType::kFloat16 ? kHalfKind : kBrainKind, v);
  p[0] = static_cast<std::byte>(bits);
  p[1] = static_cast<std::byte>(bits >> 8);
}

// The values of the 256 codes.
struct Fp8Table {
  float values[256];
  explicit Fp8Table(const FloatKind& kind) {
    for (std::uint32_t code = 0; code < 256; ++code)
      values[code] = static_cast<float>(decode_float(kind, code));
  }
};

const float* fp8_values(FileDType dtype) {
  static const Fp8Table e4m3(kFp8E4M3Kind), e5m2(kFp8E5M2Kind);
  return dtype == FileDType::kF8E4M3 ? e4m3.values : e5m2.values;
}

std::int64_t elements_of(const FileTensor& tensor) {
  return static_cast<std::int64_t>(tensor.bytes /
                                   static_cast<std::uint64_t>(file_dtype_info(tensor.dtype).bytes));
}

// The grid of scales over the last two sizes of a tensor, one grid per matrix.
class Scales {
 public:
  explicit Scales(const Part& part) : block_cols_(part.block_cols) {
    if (!part.scale) return;
    const std::vector<std::int64_t>& shape = part.stored.tensor->shape;
    cols_ = shape.empty() ? 1 : shape.back();
    rows_ = shape.size() < 2 ? 1 : shape[shape.size() - 2];
    block_rows_ = part.block_rows;
    grid_rows_ = (rows_ + block_rows_ - 1) / block_rows_;
    grid_cols_ = (cols_ + block_cols_ - 1) / block_cols_;
    const FileTensor& scale = *part.scale.tensor;
    const std::byte* data = part.scale.file->data(scale).data();
    values_.resize(static_cast<std::size_t>(elements_of(scale)));
    for (std::size_t i = 0; i < values_.size(); ++i) {
      if (scale.dtype == FileDType::kU8) {
        values_[i] = std::ldexp(1.0f, std::to_integer<int>(data[i]) - 127);
      } else {
        DType type = *float_type(scale.dtype);
        values_[i] = load(type, data + i * dtype_bytes(type));
      }
    }
  }

  float at(std::int64_t row, std::int64_t col) const {
    std::int64_t matrix = row / rows_, r = row % rows_;
    return values_[static_cast<std::size_t>((matrix * grid_rows_ + r / block_rows_) * grid_cols_ +
                                            col / block_cols_)];
  }
  bool empty() const { return values_.empty(); }
  std::int64_t cols() const { return cols_; }
  std::int64_t block_cols() const { return block_cols_; }

 private:
  std::int64_t rows_ = 1, cols_ = 1, block_rows_ = 1, block_cols_ = 1;
  std::int64_t grid_rows_ = 1, grid_cols_ = 1;
  std::vector<float> values_;
};

void read_fp8(const Part& part, const Scales& scales, std::int64_t begin, std::int64_t end,
              DType wanted, std::byte* out) {
  const FileTensor& tensor = *part.stored.tensor;
  const std::byte* data = part.stored.file->data(tensor).data();
  const float* values = fp8_values(tensor.dtype);
  const std::size_t size = dtype_bytes(wanted);
  if (scales.empty()) {
    for (std::int64_t i = begin; i < end; ++i, out += size)
      store(wanted, values[std::to_integer<int>(data[i])], out);
    return;
  }
  for (std::int64_t i = begin; i < end;) {
    std::int64_t row = i / scales.cols(), col = i % scales.cols();
    std::int64_t stop =
        std::min({end, row * scales.cols() + scales.cols(),
                  row * scales.cols() + (col / scales.block_cols() + 1) * scales.block_cols()});
    const float scale = scales.at(row, col);
    for (; i < stop; ++i, out += size)
      store(wanted, values[std::to_integer<int>(data[i])] * scale, out);
  }
}

void read_float(const Part& part, std::int64_t begin, std::int64_t end, DType wanted,
                std::byte* out) {
  const FileTensor& tensor = *part.stored.tensor;
  const DType type = *float_type(tensor.dtype);
  const std::byte* data = part.stored.file->data(tensor).data();
  const std::size_t in_size = dtype_bytes(type), out_size = dtype_bytes(wanted);
  if (type == wanted) {
    std::memcpy(out, data + static_cast<std::size_t>(begin) * in_size,
                static_cast<std::size_t>(end - begin) * in_size);
    return;
  }
  if (type == DType::kFloat64) {
    for (std::int64_t i = begin; i < end; ++i, out += out_size) {
      double v;
      std::memcpy(&v, data + static_cast<std::size_t>(i) * in_size, 8);
      store_double(wanted, v, out);
    }
    return;
  }
  for (std::int64_t i = begin; i < end; ++i, out += out_size)
    store(wanted, load(type, data + static_cast<std::size_t>(i) * in_size), out);
}

// Calls body(part, begin, end, offset) for what of each part lies within [begin, end) of the whole.
template <class Body>
void for_each_part(const Source& source, std::int64_t begin, std::int64_t end, const Body& body) {
  std::int64_t start = 0;
  for (const Part& part : source.parts) {
    std::int64_t count = elements_of(*part.stored.tensor);
    std::int64_t from = std::max(begin, start), to = std::min(end, start + count);
    if (from < to) body(part, from - start, to - start, from - begin);
    start += count;
    if (start >= end) break;
  }
}

}  // namespace

std::optional<DType> float_type(FileDType dtype) {
  switch (dtype) {
    case FileDType::kF16:
      return DType::kFloat16;
    case FileDType::kBF16:
      return DType::kBFloat16;
    case FileDType::kF32:
      return DType::kFloat32;
    case FileDType::kF64:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

bool is_fp8(FileDType dtype) {
  return dtype == FileDType::kF8E4M3 || dtype == FileDType::kF8E5M2;
}

std::int64_t Source::elements() const {
  std::int64_t count = 0;
  for (const Part& part : parts) count += elements_of(*part.stored.tensor);
  return count;
}

std::uint64_t Source::bytes() const {
  std::uint64_t count = 0;
  for (const Part& part : parts) count += part.stored.tensor->bytes;
  return count;
}

std::span<const std::byte> Source::mapped(std::int64_t begin, std::int64_t end) const {
  const StoredTensor& stored = parts.front().stored;
  const std::size_t size = static_cast<std::size_t>(file_dtype_info(stored.tensor->dtype).bytes);
  return stored.file->data(*stored.tensor)
      .subspan(static_cast<std::size_t>(begin) * size,
               static_cast<std::size_t>(end - begin) * size);
}

void Source::read(std::int64_t begin, std::int64_t end, DType wanted, std::byte* out,
                  const Threads& threads) const {
  constexpr std::int64_t kPiece = 1 << 16;
  for_each_part(*this, begin, end,
                [&](const Part& part, std::int64_t from, std::int64_t to, std::int64_t offset) {
                  const Scales scales(part);
                  threads.run((to - from + kPiece - 1) / kPiece, [&](std::int64_t piece) {
                    std::int64_t first = from + piece * kPiece, last = std::min(to, first + kPiece);
                    std::byte* at =
                        out + static_cast<std::size_t>(offset + first - from) * dtype_bytes(wanted);
                    if (is_fp8(part.stored.tensor->dtype)) {
                      read_fp8(part, scales, first, last, wanted, at);
                    } else {
                      read_float(part, first, last, wanted, at);
                    }
                  });
                });
}

void Source::release(std::int64_t begin, std::int64_t end) const {
  for_each_part(
      *this, begin, end, [&](const Part& part, std::int64_t from, std::int64_t to, std::int64_t) {
        const FileTensor& tensor = *part.stored.tensor;
        const std::size_t size = static_cast<std::size_t>(file_dtype_info(tensor.dtype).bytes);
        part.stored.file->release(part.stored.file->data(tensor).subspan(
            static_cast<std::size_t>(from) * size, static_cast<std::size_t>(to - from) * size));
      });
}

}  // namespace lowbit::cli
