#include "lowbit/memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#include <unistd.h>
#endif

namespace lowbit {
namespace {

bool all(const std::byte* data, std::size_t bytes, std::byte value) {
  return std::all_of(data, data + bytes, [&](std::byte b) { return b == value; });
}

TEST(StreamedMemory, IsZeroAlignedAndApart) {
  const std::size_t sizes[] = {1,       63,       64,       65,       4096,    70'001,
                               3 << 20, 17 << 20, 33 << 20, 31 << 20, 5 << 20, 1};
  std::vector<std::shared_ptr<std::byte>> memory;
  for (const std::size_t bytes : sizes) {
    memory.push_back(allocate_streamed(bytes));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.back().get()) % 64, 0u);
    EXPECT_TRUE(all(memory.back().get(), bytes, std::byte{0}));
    std::memset(memory.back().get(), static_cast<int>(memory.size()), bytes);
  }
  for (std::size_t i = 0; i < memory.size(); ++i) {
    EXPECT_TRUE(all(memory[i].get(), sizes[i], static_cast<std::byte>(i + 1)));
  }
}

TEST(StreamedMemory, LivesAsLongAsItsOwnPointer) {
  auto first = allocate_streamed(100'000), second = allocate_streamed(100'000);
  std::memset(second.get(), 7, 100'000);
  first.reset();
  EXPECT_TRUE(all(second.get(), 100'000, std::byte{7}));
  second.reset();
  EXPECT_TRUE(all(allocate_streamed(100'000).get(), 1, std::byte{0}));
}

// A cache that grew is returned while weights allocated in between stay, and the other way round.
TEST(StreamedMemory, CachesShareNoSlabWithWeights) {
  auto weight = allocate_streamed(100'000);
  auto keys = allocate_streamed(100'000, Streamed::kCaches);
  auto values = allocate_streamed(100'000, Streamed::kCaches);
  const auto apart = [](const auto& a, const auto& b) {
    return a.get() > b.get() ? a.get() - b.get() : b.get() - a.get();
  };
  EXPECT_LT(apart(keys, values), 8 << 20);
  weight.reset();  // its slab goes with it
  EXPECT_TRUE(all(keys.get(), 100'000, std::byte{0}));
  auto large = allocate_streamed(9 << 20, Streamed::kCaches);
  EXPECT_TRUE(all(large.get(), 9 << 20, std::byte{0}));
}

// Sanitizers have an allocator of their own, and emulators are not the process that is asked about.
#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
std::int64_t resident() {
  std::ifstream statm("/proc/self/statm");
  std::int64_t all = 0, pages = 0;
  statm >> all >> pages;
  return pages * ::sysconf(_SC_PAGESIZE);
}

// Blocks of 1 MiB from the heap, freed below one that lives.
TEST(FreedMemory, IsReturned) {
  ::mallopt(M_MMAP_THRESHOLD, 32 << 20);
  std::vector<std::unique_ptr<char[]>> blocks;
  for (int i = 0; i < 100; ++i) {
    blocks.push_back(std::make_unique<char[]>(1 << 20));
    std::memset(blocks.back().get(), 1, 1 << 20);
  }
  const auto above = std::make_unique<char[]>(1 << 20);
  std::memset(above.get(), 1, 1 << 20);
  blocks.clear();
  const std::int64_t before = resident();
  return_freed_memory();
  EXPECT_LT(resident(), before - (90 << 20));
  EXPECT_EQ(above[100], 1);
}
#endif

TEST(StreamedMemory, NothingIsNothing) {
  EXPECT_EQ(allocate_streamed(0), nullptr);
}

TEST(StreamedMemory, ThreadsGetMemoryOfTheirOwn) {
  std::vector<std::thread> threads;
  std::vector<int> right(4, 0);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &right] {
      std::vector<std::shared_ptr<std::byte>> mine;
      for (int i = 0; i < 100; ++i) {
        mine.push_back(allocate_streamed(70'000));
        std::memset(mine.back().get(), t + 1, 70'000);
      }
      right[static_cast<std::size_t>(t)] = std::all_of(
          mine.begin(), mine.end(),
          [&](const auto& data) { return all(data.get(), 70'000, static_cast<std::byte>(t + 1)); });
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, std::vector<int>(4, 1));
}

}  // namespace
}  // namespace lowbit
