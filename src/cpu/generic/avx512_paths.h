// What the translation units of the AVX-512 folders offer each other. Functions only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu::avx512 {

// nullptr where there is none.
const Path* decode_int8(Format format);  // one plane of activations
const Path* decode_int8x2(
    Format format);                     // two planes; the NormalFloats by three planes of weights
const Path* decode_f32(Format format);  // 8- and 16-bit floats
const Path* panel_int8(Format format);
const Path* panel_int8x2(Format format);  // formats whose operands are exact
const Path* panel_f32(Format format);
const Path* panel_bf16(Format format);  // needs avx512bf16

}  // namespace lowbit::cpu::avx512
