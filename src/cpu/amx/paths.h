// What the translation units of this folder offer each other. Functions only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu::amx {

const Path* panel_int8(Format format);  // types with groups
const Path* panel_bf16(Format format);

}  // namespace lowbit::cpu::amx
