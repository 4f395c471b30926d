// Where projected heads go: to rows of floats, or to the blocks of a quantized cache.
#pragma once

#include "fused/work.h"

namespace lowbit::fused {

// Where token t of head h goes.
struct HeadTarget {
  char* data;
  DType dtype;
  std::int64_t batch_stride, head_stride, stride;  // elements
  CacheFormat format = CacheFormat::kFloat;
  CachePart part = CachePart::kKeys;
  std::int64_t past = 0;

  void store(const FusedKernels& kernels, const float* head, int d, std::int64_t b, std::int64_t h,
             std::int64_t t) const;
};

HeadTarget key_target(const CacheView& cache, std::int64_t past);
HeadTarget value_target(const CacheView& cache, std::int64_t past);

}  // namespace lowbit::fused
