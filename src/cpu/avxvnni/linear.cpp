// Which path of AVX2 with AVX-VNNI serves a problem: formats with groups; float formats fall to
// avx2.
//
// Byte operands as on avx512vnni, half as wide: codes, or table bytes by vpshufb, times one or two
// int8 planes of activations; the NormalFloats by three planes of 24 bits in all where their
// codebook must stay exact, and by float32 (avx2) where it must with many tokens.
#include "cpu/generic/ymm_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_avxvnni(const Layout& layout, Precision precision, std::int64_t m) {
  const Format format = layout.format;
  if (!format_info(format).grouped()) return nullptr;
  const bool many = m > kFewTokens;
  if (resolve_precision(format, precision, m) == Precision::kInt8) {
    return avxvnni::int8(format, many);
  }
  if (format == Format::kNf3 || format == Format::kNf4) {
    return m < kFirstPanelTokens ? avxvnni::wide(format) : nullptr;
  }
  return avxvnni::int8x2(format, many);
}

}  // namespace lowbit::cpu
