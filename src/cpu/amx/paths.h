// What the translation units of this folder offer each other. Functions only.
#pragma once

#include "cpu/linear_kernels.h"

namespace lowbit::cpu::amx {}
