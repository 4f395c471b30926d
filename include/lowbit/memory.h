// Memory for packed weights, and for keys and values.
#pragma once

#include <cstddef>
#include <memory>

namespace lowbit {

// Below this many bytes an ordinary allocation does as well.
inline constexpr std::size_t kStreamedBytes = std::size_t{64} << 10;

// Which memory shares slabs: what lives and dies together.
enum class Streamed { kWeights, kCaches };

// `bytes` of zeros, 64-byte aligned, for what is streamed from memory again and again.
// They lie in huge pages where the system gives them: a stream through pages of 4 KiB waits for
// address translation (docs/performance.md). Huge pages are larger than many weights, so weights
// that are packed one after another share slabs; a slab is returned with the last weight in it. The
// same holds for keys and values, which all layers of a cache allocate one after another.
// Safe to call from any thread. Throws Error(kResource).
std::shared_ptr<std::byte> allocate_streamed(std::size_t bytes, Streamed what = Streamed::kWeights);

// Gives memory that was freed, and that the allocator keeps for later, back to the system, where
// the C library can (glibc). Weights of some MiB come from its heap: freed, they stay resident as
// long as anything above them lives.
void return_freed_memory();

}  // namespace lowbit
