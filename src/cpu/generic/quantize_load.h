// Weights into the vectors of V, and the fetching ahead of them. Needs V (quantize_simd.h).
#pragma once

#include <cstdint>

#include "cpu/quantize_kernels.h"

namespace lowbit::cpu {
namespace {

using F = V::F;
using I = V::I;
using B = V::B;

constexpr std::int64_t kAhead = 1024;  // bytes of a row that are prefetched ahead of its use

template <DType kDType>
constexpr int kElementBytes = kDType == DType::kFloat32 ? 4 : 2;

template <DType kDType>
inline F load(const char* at) {
  if constexpr (kDType == DType::kFloat32) return V::load(reinterpret_cast<const float*>(at));
  if constexpr (kDType == DType::kFloat16) return V::load_half(at);
  if constexpr (kDType == DType::kBFloat16) return V::load_brain(at);
}

// Inputs 0 to 31 in two vectors: in order, or, where that is cheaper, the even ones and the odd
// ones.
template <DType kDType>
constexpr Order kLoadOrder = kDType == DType::kBFloat16 ? V::kBrainOrder : Order::kInputs;
template <DType kDType>
inline void load_two(const char* at, F& a, F& b) {
  if constexpr (kDType == DType::kBFloat16) {
    V::load_two_brain(at, a, b);
  } else {
    a = load<kDType>(at);
    b = load<kDType>(at + 16 * kElementBytes<kDType>);
  }
}

// 16 row streams are more than the hardware prefetchers follow. To the second level: rows often lie
// a multiple of 4 KiB apart, so that 16 of them compete for the same few lines of the first.
template <DType kDType>
[[gnu::always_inline]] inline void prefetch_row(const char* at, int inputs) {
  for (int i = 0; i < inputs * kElementBytes<kDType>; i += 64) V::prefetch(at + i);
}

}  // namespace
}  // namespace lowbit::cpu
