// A Coder as a constant, and what follows from it.
#pragma once

#include <type_traits>

#include "cpu/quantize_kernels.h"

namespace lowbit::cpu {
namespace {

// What a type stores: 16 bits and no scale, a scale for each row, or one for each group.
template <Coder kCoder>
constexpr bool kWide = kCoder == Coder::kHalf || kCoder == Coder::kBrain;

template <Coder kCoder>
constexpr bool kRowScale = kCoder == Coder::kFp8E4M3 || kCoder == Coder::kFp8E5M2;

template <Coder kCoder>
constexpr bool kGroupScale = !kRowScale<kCoder> && !kWide<kCoder>;

// Calls run(a constant Coder).
template <class F>
void with_coder(Coder coder, F&& run) {
  switch (coder) {
    case Coder::kSymmetric:
      return run(std::integral_constant<Coder, Coder::kSymmetric>{});
    case Coder::kInteger:
      return run(std::integral_constant<Coder, Coder::kInteger>{});
    case Coder::kMinimum:
      return run(std::integral_constant<Coder, Coder::kMinimum>{});
    case Coder::kTable:
      return run(std::integral_constant<Coder, Coder::kTable>{});
    case Coder::kMirrored:
      return run(std::integral_constant<Coder, Coder::kMirrored>{});
    case Coder::kFp8E4M3:
      return run(std::integral_constant<Coder, Coder::kFp8E4M3>{});
    case Coder::kFp8E5M2:
      return run(std::integral_constant<Coder, Coder::kFp8E5M2>{});
    case Coder::kHalf:
      return run(std::integral_constant<Coder, Coder::kHalf>{});
    case Coder::kBrain:
      return run(std::integral_constant<Coder, Coder::kBrain>{});
  }
}

}  // namespace
}  // namespace lowbit::cpu
