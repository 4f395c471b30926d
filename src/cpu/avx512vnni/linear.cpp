// Which AVX-512 VNNI path serves a problem.
#include "cpu/generic/avx512_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_avx512vnni(const Layout& layout, Precision precision, std::int64_t m) {
  const Format format = layout.format;
  precision = resolve_precision(format, precision, m);
  if (!format_info(format).grouped()) {
    constexpr std::int64_t kPanelFrom = 9;
    return m < kPanelFrom ? avx512::decode_f32(format) : avx512::panel_f32(format);
  }
  if (precision == Precision::kInt8) {
    return m < avx512::kPanelFromOne ? avx512::decode_int8(format) : avx512::panel_int8(format);
  }
  // Without bf16 instructions two int8 planes are the faster way to at least that precision.
  if (m < avx512::kPanelFromTwo) return avx512::decode_int8x2(format);
  const Path* planes = avx512::panel_int8x2(format);
  return planes != nullptr ? planes : avx512::panel_f32(format);
}

}  // namespace lowbit::cpu
