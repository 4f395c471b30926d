// What the translation units of this folder offer each other. Functions and constants only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu::amx {

const Path* panel_int8(Format format);  // types with groups
const Path* panel_bf16(Format format);
// Up to 16 tokens, types with groups: one plane of activations, or two (8 tokens).
const Path* few_int8(Format format);
const Path* few_int8x2(Format format);
// The others; two planes: fp8.
const Path* few_bf16(Format format);
const Path* few_bf16x2(Format format);
// Up to kMostPassTokens tokens.
const Path* pass_bf16(Format format);
inline constexpr int kMostPassTokens = 128;

}  // namespace lowbit::cpu::amx
