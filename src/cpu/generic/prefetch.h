// Fetching packed weights ahead of their use. Anonymous namespace: compiled once per folder.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit::cpu {
namespace {

// Hardware prefetchers stop at page borders, so lines are fetched a page ahead, into the
// second-level cache: there are 16 buffers between the first level and everything behind it on
// Intel's cores, and a fetch from memory that holds one for all of its latency leaves no more than
// some 8 GB/s.
constexpr std::int64_t kFar = 4096;
constexpr std::int64_t kNear = 2048;  // from the second level to the first

[[gnu::always_inline]] inline void prefetch_far(const std::byte* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kFar), _MM_HINT_T1);
}
[[gnu::always_inline]] inline void prefetch_ahead(const std::byte* p) {
  prefetch_far(p);
  _mm_prefetch(reinterpret_cast<const char*>(p + kNear), _MM_HINT_T0);
}

}  // namespace
}  // namespace lowbit::cpu
