// The MLP half of a block, and what experts share with it.
#pragma once

#include "fused/work.h"

namespace lowbit::fused {

// Read at every call, as norms are: parameters may change in place.
ActivationNumbers numbers_of(const Work& work, const GateSpec& gate);

// The inputs of `down` from one row of columns.
void gate_row(const Work& work, const MlpSpec& spec, const ActivationNumbers& numbers,
              const float* row, float* inner);

// to (+)= MLP(from) for `count` tokens. `make`, where there is one, completes a row of `from`, and
// of `to`, before it is read.
void mlp_chunk(const Work& work, const MlpSpec& spec, const float* from, std::int64_t count,
               float* to, float* memory, const MakeRow& make);
std::int64_t mlp_floats(const MlpSpec& spec, std::int64_t tokens, std::int64_t hidden);

}  // namespace lowbit::fused
