// Which path serves a problem where there is AVX512_BF16: those of avx512vnni, but for bf16.
#include "cpu/generic/avx512_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_avx512bf16(const Layout& layout, Precision precision, std::int64_t m) {
  const Format format = layout.format;
  const Precision resolved = resolve_precision(format, precision, m);
  const bool grouped = format_info(format).grouped();
  if (!grouped && resolved == Precision::kFp32) {
    // Up to here the weights' bytes are the cost, and fp8 unpacks faster to bf16 than to float32.
    constexpr std::int64_t kSplitUpTo = 8;
    return m <= kSplitUpTo ? avx512::decode_bf16x2(format) : nullptr;
  }
  // Integers for few tokens: two int8 planes are at least as precise and read the same bytes.
  if (grouped && (resolved != Precision::kBf16 || m < avx512::kPanelFromTwo)) return nullptr;
  // Reading packed weights again for every eight tokens costs less than a panel up to here, and
  // fp16, which must be rounded to bf16 first, has a panel only.
  constexpr std::int64_t kPanelFrom = 33;
  constexpr std::int64_t kFloat16PanelFrom = 6;
  const Path* decode = avx512::decode_bf16(format);
  if (!grouped && m < (decode == nullptr ? kFloat16PanelFrom : kPanelFrom)) return decode;
  return avx512::panel_bf16(format);
}

}  // namespace lowbit::cpu
