// What the translation units of the AVX-512 folders offer each other. Functions only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu::avx512 {

// Tokens from which a panel beats unpacking the codes again for every eight (four) tokens.
inline constexpr std::int64_t kPanelFromOne = 33;
inline constexpr std::int64_t kPanelFromTwo = 17;

// nullptr where there is none.
const Path* decode_int8(Format format);  // one plane of activations
const Path* decode_int8x2(
    Format format);                     // two planes; the NormalFloats by three planes of weights
const Path* decode_f32(Format format);  // 8- and 16-bit floats
const Path* panel_int8(Format format);
const Path* panel_int8x2(Format format);  // formats whose operands are exact
const Path* panel_f32(Format format);
// These need avx512bf16.
const Path* decode_bf16(Format format);    // fp8 and bf16
const Path* decode_bf16x2(Format format);  // fp8
const Path* panel_bf16(Format format);

}  // namespace lowbit::cpu::avx512
