// What the translation units of the folders with 256-bit registers offer each other. Functions
// only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu {

// Up to this many tokens a call takes static shares of the rows, one stream of bytes per thread;
// more go in fixed blocks of tokens over several row tiles.
inline constexpr std::int64_t kFewTokens = 8;

// nullptr where there is none.
namespace avx2 {
const Path* int8(Format format, bool many);    // codes of up to five bits, fp4
const Path* int8x2(Format format, bool many);  // the same
const Path* words(Format format, bool many);   // bytes: sym_int8, NormalFloats in 1/127
const Path* wide(Format format, bool many);    // NormalFloats, all their bits
const Path* floats(Format format, bool many);
}  // namespace avx2

namespace avxvnni {
const Path* int8(Format format, bool many);    // formats with groups
const Path* int8x2(Format format, bool many);  // but the NormalFloats
const Path* wide(Format format, bool many);    // NormalFloats, all their bits
}  // namespace avxvnni

}  // namespace lowbit::cpu
