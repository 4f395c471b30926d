// Packed matrices from codes and scales that exist already, and back: no weight is rounded. This is
// how checkpoints that others quantized become ours, and ours theirs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "lowbit/format.h"
#include "lowbit/threads.h"

namespace lowbit {

// One matrix of a layout taken apart, everything row-major. What a format does not store is empty;
// the 16-bit formats, whose codes are the weights, have no such parts: quantize() keeps every bit
// of theirs.
struct CodesView {
  std::span<const std::uint8_t> codes;    // [n, k]: as stored, so the value 0 of sym_int4 is 8
  std::span<const std::uint16_t> scales;  // [n, groups]: fp16 bits; grouped formats
  std::span<const std::uint16_t> minima;  // [n, groups]: fp16 bits; formats with minima
  std::span<const float> row_scales;      // [n]; formats with a scale per row
};

struct MutableCodesView {
  std::span<std::uint8_t> codes;
  std::span<std::uint16_t> scales;
  std::span<std::uint16_t> minima;
  std::span<float> row_scales;
};

// Packs the parts into `packed` (layout.bytes(), 64-byte aligned). Scales may be negative or zero.
// Throws Error(kValue) for sizes that do not fit the layout, for a code that the format does not
// have (sym_int8: 0, which would be -128; fp8: infinities and NaN) and for a scale or minimum that
// is not finite, naming row and column; `packed` is undefined then.
void pack_codes(const CodesView& codes, const Layout& layout, std::span<std::byte> packed,
                const Threads& threads = serial_threads());

// The inverse: all codes, scales and minima of `packed`, without padding.
void unpack_codes(std::span<const std::byte> packed, const Layout& layout,
                  const MutableCodesView& codes, const Threads& threads = serial_threads());

}  // namespace lowbit
