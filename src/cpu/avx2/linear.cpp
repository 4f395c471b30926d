// Which AVX2 path serves a problem.
#include "cpu/generic/ymm_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_avx2(const Layout& layout, Precision precision, std::int64_t m) {
  const Format format = layout.format;
  const bool many = m > kFewTokens, panel = m >= kFirstPanelTokens;
  if (!format_info(format).grouped()) {
    return panel ? avx2::panel(format) : avx2::floats(format);
  }
  const bool rounded = resolve_precision(format, precision, m) == Precision::kInt8;
  if (format == Format::kNf3 || format == Format::kNf4) {
    // Many tokens of nf3 in float32 are faster than in words, and exact.
    if (panel && (!rounded || format == Format::kNf3)) return avx2::panel(format);
    return rounded ? avx2::words(format, many) : avx2::wide(format);
  }
  // Words hold 16 bits of an activation: no dearer than a byte of it.
  if (format == Format::kSymInt8) return avx2::words(format, many);
  return rounded ? avx2::int8(format, many) : avx2::int8x2(format, many);
}

}  // namespace lowbit::cpu
