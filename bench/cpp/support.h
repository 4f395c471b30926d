// What both benchmark programs use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "lowbit/error.h"

namespace lowbit::bench {

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<std::byte[], Free>;

// Zeroed, in whole pages.
inline Bytes allocate(std::int64_t bytes) {
  const std::size_t size = static_cast<std::size_t>((bytes + 4095) / 4096 * 4096);
  Bytes memory(static_cast<std::byte*>(std::aligned_alloc(4096, size)));
  if (memory == nullptr) throw Error(ErrorCode::kResource, "bench: no memory for the ring");
  std::memset(memory.get(), 0, size);
  return memory;
}

}  // namespace lowbit::bench
