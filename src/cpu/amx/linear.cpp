// Which path serves a problem where there are tiles (AMX). What has no path here runs those of
// avx512bf16.
#include "cpu/amx/paths.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {
namespace {

// Tokens from which bf16 tiles are the faster way: types with groups are expanded for them, which
// pays where the kernels that read packed weights need a pass for every eight tokens, or the
// NormalFloats' three times the products.
std::int64_t bf16_from(const FormatInfo& info) {
  if (!info.grouped()) return 3;
  return info.format == Format::kNf3 || info.format == Format::kNf4 ? 7 : 13;
}

// Tokens from which products of few tokens by tiles beat the kernels of avx512vnni. Two tokens of
// nf3 in int8 wait for its codes either way, and there they need not go through memory.
std::int64_t few_from(const FormatInfo& info, Precision precision) {
  return info.format == Format::kNf3 && precision == Precision::kInt8 ? 3 : 2;
}

// As many as fill the rows of a tile.
constexpr std::int64_t kFewOne = 16, kFewTwo = 8;

// A few dozen tokens multiply weights that are bf16 where they lie, which memory bounds.
const Path* many_bf16(Format format, std::int64_t m) {
  if (m > amx::kMostPassTokens || (format == Format::kBf16 && m <= 48)) {
    return amx::panel_bf16(format);
  }
  return amx::pass_bf16(format);
}

}  // namespace

const Path* select_linear_amx(const Layout& layout, Precision precision, std::int64_t m) {
  const FormatInfo& info = format_info(layout.format);
  const Precision resolved = resolve_precision(layout.format, precision, m);
  if (info.grouped()) {
    const bool one = resolved == Precision::kInt8;
    if (one && m > kFewOne) return amx::panel_int8(layout.format);
    if (resolved == Precision::kBf16 && m >= bf16_from(info)) return many_bf16(layout.format, m);
    if (m < few_from(info, resolved) || m > (one ? kFewOne : kFewTwo)) return nullptr;
    return one ? amx::few_int8(layout.format) : amx::few_int8x2(layout.format);
  }
  if (resolved != Precision::kFp32 && m >= bf16_from(info)) {
    return m <= kFewOne ? amx::few_bf16(layout.format) : many_bf16(layout.format, m);
  }
  const bool fp8 = layout.format == Format::kFp8E4M3 || layout.format == Format::kFp8E5M2;
  if (fp8 && m >= 2 && m <= kFewTwo) return amx::few_bf16x2(layout.format);
  // Where there are tiles, vdpbf16ps multiplies no more than float32 instructions do.
  return m <= kFewTwo ? avx512::decode_f32(layout.format) : nullptr;
}

}  // namespace lowbit::cpu
