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

// The line kFarAt behind `far` to the second level, that kNearAt behind `near` to the first, kept
// where it stands: the compiler would gather fetches, and a burst of them fills the buffers of the
// first level.
template <std::int64_t kFarAt, std::int64_t kNearAt>
[[gnu::always_inline]] inline void prefetch_line_here(const std::byte* far, const std::byte* near) {
  __asm__ volatile("prefetcht1 %c2(%0)\n\tprefetcht0 %c3(%1)" ::"r"(far), "r"(near), "i"(kFarAt),
                   "i"(kNearAt)
                   : "memory");
}

// Quad I's share of the lines of a block of 32 inputs: to the second level those of the block
// kFarAt behind `far`, to the first of that kNearAt behind `near`.
template <int I, std::int64_t kBlockBytes, std::int64_t kFarAt = kFar, std::int64_t kNearAt = kNear>
[[gnu::always_inline]] inline void prefetch_quad_here(const std::byte* far, const std::byte* near) {
  constexpr int kLines = static_cast<int>(kBlockBytes / 64);
  static_assert(kLines <= 8);
  constexpr int kFirst = I * kLines / 8;
  if constexpr ((I + 1) * kLines / 8 > kFirst) {
    prefetch_line_here<kFarAt + kFirst * 64, kNearAt + kFirst * 64>(far, near);
  }
}
template <int I, std::int64_t kBlockBytes>
[[gnu::always_inline]] inline void prefetch_quad_here(const std::byte* block) {
  prefetch_quad_here<I, kBlockBytes>(block, block);
}

}  // namespace
}  // namespace lowbit::cpu
