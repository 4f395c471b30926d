// Several matrices of one shape, each with tokens of its own: the experts of a mixture. Tokens are
// sorted by expert; ends[e] is where those of expert e end. How many each has is known on the
// device alone, so a launch has room for the worst case, and every thread block finds its work
// here.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

// A run of tokens of one expert, from row `first` of x on. expert -1: there is no such item.
struct GroupItem {
  int expert, first, tokens;
};

// The item-th run of 2^shift tokens or fewer. All lanes of a warp take part. Ends outside [0, rows]
// are taken for the nearest one inside, and an expert whose end is not past the one before has no
// tokens: nothing outside x and out is ever touched.
__device__ inline GroupItem group_item(const std::int32_t* ends, int experts, int rows, int shift,
                                       int item) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int before = 0;
  for (int base = 0; base < experts; base += 32) {
    const int expert = base + lane;
    const int end = expert < experts ? ends[expert] : 0;
    const int begin = expert < experts && expert > 0 ? ends[expert - 1] : 0;
    const int first = min(max(begin, 0), rows);
    const int tokens = expert < experts ? max(min(end, rows) - first, 0) : 0;
    const int runs = (tokens + (1 << shift) - 1) >> shift;
    int past = runs;  // runs of this expert and of those before, in these 32
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, past, step);
      if (lane >= step) past += other;
    }
    const unsigned reached = __ballot_sync(0xffffffffu, before + past > item);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      const int skipped = item - before - __shfl_sync(0xffffffffu, past - runs, owner) << shift;
      return {base + owner, __shfl_sync(0xffffffffu, first, owner) + skipped,
              min(1 << shift, __shfl_sync(0xffffffffu, tokens, owner) - skipped)};
    }
    before += __shfl_sync(0xffffffffu, past, 31);
  }
  return {-1, 0, 0};
}

}  // namespace lowbit::cuda
