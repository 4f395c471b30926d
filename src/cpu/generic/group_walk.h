// The walk over the groups of a row tile. Anonymous namespace: compiled once per folder.
#pragma once

#include <cstdint>

#include "lowbit/format.h"

namespace lowbit::cpu {
namespace {

// Where the parts of group g of a row tile lie; Layout's member functions, inlined: calls
// between groups would spill every sum.
template <bool kMinimum>
struct GroupWalk {
  std::int64_t group_bytes, last_bytes, groups, group, last_inputs;

  [[gnu::always_inline]] explicit GroupWalk(const Layout& layout)
      : group_bytes(layout.group_bytes), groups(layout.groups), group(layout.group_size) {
    last_inputs = layout.k_padded - (groups - 1) * group;
    last_bytes = group_bytes / group * last_inputs;
  }
  // Whole groups only.
  constexpr GroupWalk(std::int64_t bytes_of_group, std::int64_t count, std::int64_t inputs_of_group)
      : group_bytes(bytes_of_group),
        last_bytes(bytes_of_group),
        groups(count),
        group(inputs_of_group),
        last_inputs(inputs_of_group) {}
  [[gnu::always_inline]] constexpr std::int64_t inputs(std::int64_t g) const {
    return g + 1 < groups ? group : last_inputs;
  }
  [[gnu::always_inline]] constexpr std::int64_t codes(std::int64_t g) const {
    return kMinimum ? g * (group_bytes + kUnitBytes) : g * group_bytes + g / 2 * kUnitBytes;
  }
  [[gnu::always_inline]] constexpr std::int64_t bytes(std::int64_t g) const {
    return g + 1 < groups ? group_bytes : last_bytes;
  }
  [[gnu::always_inline]] constexpr std::int64_t scales(std::int64_t g) const {
    if (kMinimum) return codes(g) + bytes(g);
    const std::int64_t first = g & ~std::int64_t{1};
    return codes(first) + bytes(first) + (first + 1 < groups ? bytes(first + 1) : 0) + (g & 1) * 32;
  }
};

}  // namespace
}  // namespace lowbit::cpu
