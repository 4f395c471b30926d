// Where the values of a float tensor lie in a checkpoint, and how they become floats.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "lowbit/file.h"
#include "lowbit/quantize.h"
#include "lowbit/threads.h"

namespace lowbit::cli {

// The quantizer's type of a file's type; nothing for those that are not plain floats.
std::optional<DType> float_type(FileDType dtype);
bool is_fp8(FileDType dtype);

struct StoredTensor {
  const FileTensor* tensor = nullptr;
  const TensorFile* file = nullptr;
  explicit operator bool() const { return tensor != nullptr; }
};

// One stored tensor; fp8 ones have scales: value(r, c) = code(r, c) * scale(r / block_rows,
// c / block_cols), the product in float32, rounded once to the type that is asked for. Scales are
// floats, or bytes that stand for 2^(byte - 127).
struct Part {
  StoredTensor stored, scale;
  std::int64_t block_rows = 0, block_cols = 0;
};

// A tensor in row-major order: the values of its parts, one after the other. Experts are stored one
// by one and merged into [experts, rows, columns]; nearly every other tensor is one part.
struct Source {
  std::vector<Part> parts;

  std::int64_t elements() const;
  std::uint64_t bytes() const;  // in the files, scales left out
  FileDType dtype() const { return parts.front().stored.tensor->dtype; }
  // Whether the mapped bytes are the values, as they are.
  bool direct(FileDType wanted) const {
    return parts.size() == 1 && !parts[0].scale && dtype() == wanted;
  }
  // Bytes of elements [begin, end) of a direct one.
  std::span<const std::byte> mapped(std::int64_t begin, std::int64_t end) const;
  // Elements [begin, end) as `wanted`, on all threads.
  void read(std::int64_t begin, std::int64_t end, DType wanted, std::byte* out,
            const Threads& threads) const;
  // Gives back the pages of elements [begin, end).
  void release(std::int64_t begin, std::int64_t end) const;
};

}  // namespace lowbit::cli
