// Which AVX2 path serves a problem.
#include "cpu/generic/ymm_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_avx2(const Layout& layout, Precision precision, std::int64_t m) {
  const Format format = layout.format;
  const bool many = m > kFewTokens;
  if (!format_info(format).grouped()) return avx2::floats(format, many);
  const bool rounded = resolve_precision(format, precision, m) == Precision::kInt8;
  if (format == Format::kNf3 || format == Format::kNf4) {
    return rounded ? avx2::words(format, many) : avx2::wide(format, many);
  }
  // Words hold 16 bits of an activation: no dearer than a byte of it.
  if (format == Format::kSymInt8) return avx2::words(format, many);
  return rounded ? avx2::int8(format, many) : avx2::int8x2(format, many);
}

}  // namespace lowbit::cpu
