// What the public functions check at the door, shared by the reference and the fast paths.
#pragma once

#include <cstddef>
#include <span>

#include "lowbit/linear.h"
#include "lowbit/quantize.h"

namespace lowbit {

// Each throws Error(kValue) or Error(kType) naming the function, what it expected and what it got.
void check_quantize(const MatrixView& weight, const Layout& layout,
                    std::span<const std::byte> packed);
void check_dequantize(std::span<const std::byte> packed, const Layout& layout,
                      const MutableMatrixView& out);
void check_rows(std::span<const std::byte> packed, const Layout& layout,
                std::span<const std::int64_t> rows, const MutableMatrixView& out);
void check_packed(const char* who, std::span<const std::byte> packed, const Layout& layout);
void check_linear(const LinearArgs& args);

// Names row, column and value of the weight at a row-major flat index, -1 if it is not there.
[[noreturn]] void throw_nonfinite(const MatrixView& weight, std::int64_t index);

}  // namespace lowbit
