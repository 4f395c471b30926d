// Queries, keys and values of a block's tokens: norm, products, norms of heads, rotation.
#pragma once

#include "fused/cache.h"
#include "fused/work.h"

namespace lowbit::fused {

// Floats of a head of queries: the gates follow.
std::int64_t query_width(const AttentionSpec& spec);

// Norms, projects and rotates tokens [begin, end) and writes queries (scaled by `q_scale`), keys
// and values where they go. `memory` holds project_floats(spec, end - begin, hidden).
void project_chunk(const Work& work, const AttentionSpec& spec, const float* x, std::int64_t begin,
                   std::int64_t end, float q_scale, const HeadTarget& q, const HeadTarget& k,
                   const HeadTarget& v, float* memory);
std::int64_t project_floats(const AttentionSpec& spec, std::int64_t tokens, std::int64_t hidden);

}  // namespace lowbit::fused
