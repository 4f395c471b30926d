// What every operator asks of a block and a call.
#pragma once

#include "lowbit/fused.h"

namespace lowbit::fused {

// Throws Error(kValue) where the parts of a block do not fit each other or the call.
void check(const BlockSpec& block, const BlockCall& call);

}  // namespace lowbit::fused
