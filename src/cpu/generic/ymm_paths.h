// What the translation units of the folders with 256-bit registers offer each other. Functions
// only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu {

// Up to this many tokens a call takes static shares of the rows, one stream of bytes per thread;
// more go in fixed blocks of tokens over several row tiles.
inline constexpr std::int64_t kFewTokens = 8;
// From here on weights are expanded to float32 where that is what multiplies: below, the panel's
// blocks of six tokens are too few, or too empty, to pay for it.
inline constexpr std::int64_t kFirstPanelTokens = 12;

// nullptr where there is none.
namespace avx2 {
const Path* int8(Format format, bool many);    // codes of up to five bits, fp4
const Path* int8x2(Format format, bool many);  // the same
const Path* words(Format format, bool many);   // bytes: sym_int8, NormalFloats in 1/127
const Path* wide(Format format);               // NormalFloats, all their bits, few tokens
const Path* floats(Format format);             // few tokens
const Path* panel(Format format);              // many: float types and NormalFloats
}  // namespace avx2

namespace avxvnni {
const Path* int8(Format format, bool many);    // formats with groups
const Path* int8x2(Format format, bool many);  // but the NormalFloats
const Path* wide(Format format);               // NormalFloats, all their bits, few tokens
}  // namespace avxvnni

}  // namespace lowbit::cpu
