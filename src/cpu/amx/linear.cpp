// Which path serves a problem where there are tiles (AMX). What has no path here runs those of
// avx512bf16.
#include "cpu/amx/paths.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {
namespace {

// Tokens from which expanding weights to bf16 beats the kernels that read them packed: those need a
// pass for every eight (four) tokens, and the NormalFloats three times the products.
std::int64_t bf16_from(const FormatInfo& info) {
  if (!info.grouped()) return 5;
  return info.format == Format::kNf3 || info.format == Format::kNf4 ? 7 : 13;
}

}  // namespace

const Path* select_linear_amx(const Layout& layout, Precision precision, std::int64_t m) {
  const FormatInfo& info = format_info(layout.format);
  const Precision resolved = resolve_precision(layout.format, precision, m);
  // Where there are tiles, vdpbf16ps multiplies no more than float32 instructions do, and fp8 needs
  // fewer of those: activations are not split.
  const std::int64_t floats_below = resolved == Precision::kFp32 ? 9 : bf16_from(info);
  if (!info.grouped() && m < floats_below) return avx512::decode_f32(layout.format);
  switch (resolved) {
    case Precision::kInt8:
      // Up to eight tokens unpacked operands are used where they are.
      if (info.grouped()) return m >= 9 ? amx::panel_int8(layout.format) : nullptr;
      [[fallthrough]];  // the float types have no int8 kernels
    case Precision::kBf16:
      return m >= bf16_from(info) ? amx::panel_bf16(layout.format) : nullptr;
    default:
      return nullptr;
  }
}

}  // namespace lowbit::cpu
