// Attention over latents: keys and values of all heads are products of one vector per token.
#pragma once

#include "fused/attention.h"

namespace lowbit::fused {

// Floats that the results of all rows take; 0 where the attention is none over latents.
std::int64_t latent_floats(const AttentionSpec& spec, std::int64_t rows);

// Attention of all tokens over latents, in the way that multiplies less; products of many rows, by
// which keys and values are made, count an eighth.
void attend_latents(const Attention& a);

}  // namespace lowbit::fused
