// Which path serves a problem where there is AVX512_BF16: those of avx512vnni, but for bf16.
#include "cpu/generic/avx512_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_avx512bf16(const Layout& layout, Precision precision, std::int64_t m) {
  constexpr std::int64_t kPanelFrom = 9;  // as in avx512vnni/linear.cpp
  const Format format = layout.format;
  const Precision resolved = resolve_precision(format, precision, m);
  const bool grouped = format_info(format).grouped();
  const bool bf16 = resolved == Precision::kBf16 || (!grouped && resolved == Precision::kInt8);
  if (bf16 && m >= kPanelFrom) return avx512::panel_bf16(format);
  return nullptr;
}

}  // namespace lowbit::cpu
