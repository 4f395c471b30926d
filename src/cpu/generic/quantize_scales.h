// Steps 1 and 2 of quantize_simd.h: the extremes of 16 rows, and their scales.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/generic/quantize_coder.h"
#include "cpu/generic/quantize_load.h"
#include "cpu/quantize_kernels.h"

namespace lowbit::cpu {
namespace {

// What step 1 finds, lane r for row r.
struct Extremes {
  F magnitude;  // largest absolute value; NaN or infinity if any weight was
  F max, min;   // kMinimum only
  F furthest;   // kSymmetric only: the weight of that magnitude, the negative one of two
};

template <Coder kCoder, DType kDType>
inline Extremes find_extremes(const char* const (&rows)[16], std::int64_t begin, int inputs,
                              std::int64_t ahead) {
  constexpr bool kSigned = kCoder == Coder::kSymmetric;
  constexpr bool kBoth = kCoder == Coder::kMinimum;
  // Magnitudes order as integers. With the sign as the last bit instead of the first, the largest
  // integer is the largest magnitude, and of two the negative one.
  const auto key = [](F w) {
    return V::from_bits(kSigned ? V::rotate_left1(V::bits(w)) : V::bits(V::abs(w)));
  };
  F keys[16], maxima[16], minima[16];
  for (int r = 0; r < 16; ++r) {
    const char* at = rows[r] + begin * kElementBytes<kDType>;
    prefetch_row<kDType>(at + ahead, inputs);
    F w, v;
    load_two<kDType>(at, w, v);
    F largest = V::max_bits(key(w), key(v)), max = V::max(w, v), min = V::min(w, v);
#pragma GCC unroll 2
    for (int i = 32; i < inputs; i += 32) {
      load_two<kDType>(at + i * kElementBytes<kDType>, w, v);
      largest = V::max_bits(largest, V::max_bits(key(w), key(v)));
      if constexpr (kBoth) {
        max = V::max(max, V::max(w, v));
        min = V::min(min, V::min(w, v));
      }
    }
    keys[r] = largest;
    maxima[r] = max;
    minima[r] = min;
  }
  Extremes e;
  e.magnitude = V::reduce(keys, [](F a, F b) { return V::max_bits(a, b); });
  if constexpr (kSigned) {
    e.furthest = V::from_bits(V::rotate_right1(V::bits(e.magnitude)));
    e.magnitude = V::abs(e.furthest);
  }
  if constexpr (kBoth) {
    e.max = V::reduce(maxima, [](F a, F b) { return V::max(a, b); });
    e.min = V::reduce(minima, [](F a, F b) { return V::min(a, b); });
  }
  return e;
}

// Scales of 16 rows.
//
// Scales of groups are halves, and dividing by one of 11 bits is a multiplication by two floats
// that hold 1 / s to 2^-46: h = RN(1 / s), l = RN(RN(1 - h s) h), q = RN(w h + RN(w l)). The
// argument of the last rounding is off by less than 2^-22 of a unit in q's last place. That rounds
// as w / s does, because w / s is at least 2^-12 units from every midpoint m of two floats: m has
// 25 bits and s at most 11, so s m has more than the 24 of w, which is then a different multiple of
// the last unit of s m, and |w - s m| / s is at least that unit divided by 2^11. Quotients of
// subnormal weights are excepted; they are far below the first threshold of any code.
//
// Scales of rows (fp8) are any float32 s. The same q is off by less than 0.5 + 2^-22 units then, so
// r = w - s q is exact, and q' = RN(q + r h) is w / s rounded: what is rounded is off by |r / s|
// times the relative error of h, which is at most S 2^-48 for a mantissa S (24 bits) of s, and w /
// s is d >= 1 / (2 S) units from every midpoint (never on one: S has too few bits). Next to a
// midpoint |r / s| is 0.5 + d units, and (0.5 + d) S 2^-48 < d as S < 2^24. All that as long as
// nothing underflows or overflows: scales from 2^-60 to 2^60 (weights so small that r is inexact
// are far below the first threshold).
struct Scales {
  alignas(64) float inverse[16];       // h; zero where the scale is, so that quotients are
  alignas(64) float inverse_rest[16];  // l
  alignas(64) float divisor[16];       // fp8: s, where `divides` infinite instead of zero
  bool divides;                        // fp8: by IEEE division
  alignas(64) float minimum[16];
  alignas(64) std::uint16_t scale_half[16];
  alignas(64) std::uint16_t minimum_half[16];
};

// Running scale range, lane r for row r.
struct Range {
  F largest, smallest, largest_minimum, smallest_minimum, magnitude;

  void start() {
    largest = largest_minimum = magnitude = V::set(0.0f);
    smallest = smallest_minimum = V::set(__builtin_inff());
  }
  void add(F statistic) {
    largest = V::max(largest, statistic);
    smallest = V::min(smallest, V::infinite_if_zero(statistic));
  }
  void add_minimum(F minimum) {
    const F m = V::abs(minimum);
    largest_minimum = V::max(largest_minimum, m);
    smallest_minimum = V::min(smallest_minimum, V::infinite_if_zero(m));
  }
  // All 16 lanes: padding rows and inputs repeat real weights, and the lanes of 16-bit types are
  // inputs.
  void report(reference::ScaleRange* to) const {
    alignas(64) float lanes[5][16];
    V::store(lanes[0], largest);
    V::store(lanes[1], smallest);
    V::store(lanes[2], largest_minimum);
    V::store(lanes[3], smallest_minimum);
    V::store(lanes[4], magnitude);
    for (int r = 0; r < 16; ++r) {
      if (!(lanes[4][r] < __builtin_inff())) {
        to->finite = false;  // the other lanes may be NaN: leave them out
        return;
      }
      if (lanes[0][r] > to->largest) to->largest = lanes[0][r];
      if (lanes[1][r] < to->smallest) to->smallest = lanes[1][r];
      if (lanes[2][r] > to->largest_minimum) to->largest_minimum = lanes[2][r];
      if (lanes[3][r] < to->smallest_minimum) to->smallest_minimum = lanes[3][r];
    }
  }
};

// h and l of a scale of groups, or of one of rows within bounds; zeros where the scale is.
inline void invert(F scale, F factor, Scales* scales) {
  const F one = V::set(1.0f);
  const F inverse = V::div(one, scale);
  const F rest = V::mul(V::negated_multiply_add(inverse, scale, one), inverse);
  const auto unless_zero = [&](F v) {
    return V::from_bits(V::zero_if_zero(V::bits(scale), V::bits(v)));
  };
  V::store(scales->inverse, V::mul(unless_zero(inverse), factor));
  V::store(scales->inverse_rest, V::mul(unless_zero(rest), factor));
}

template <Coder kCoder>
inline void choose_scales(const Codec& codec, const Extremes& e, Range* range, Scales* scales) {
  range->magnitude = V::max_bits(range->magnitude, e.magnitude);
  F scale;
  if constexpr (kCoder == Coder::kMinimum) {
    const F statistic = V::sub(e.max, e.min);
    range->add(statistic);
    range->add_minimum(e.min);
    V::store(scales->minimum, V::round_to_half(e.min, scales->minimum_half));
    scale = V::div(statistic, V::set(codec.value_max));
  } else if constexpr (kCoder == Coder::kSymmetric) {
    range->add(e.magnitude);
    scale = V::div(e.furthest, V::set(-codec.value_max));
  } else {
    range->add(e.magnitude);
    scale = V::div(e.magnitude, V::set(codec.value_max));
  }
  invert(V::round_to_half(scale, scales->scale_half),
         V::set(kCoder == Coder::kMirrored ? 4.0f : 1.0f), scales);
}

// The scales of rows, of which `rows` exist, to the head of their tile.
inline void choose_row_scales(const Codec& codec, F magnitude, int rows, Range* range,
                              Scales* scales, unsigned char* out) {
  range->add(magnitude);
  range->magnitude = V::max_bits(range->magnitude, magnitude);
  const F scale = V::div(magnitude, V::set(codec.value_max));
  alignas(64) float stored[16];
  V::store(stored, scale);
  scales->divides = false;
  for (float s : stored) scales->divides |= !(s == 0 || (s >= 0x1p-60f && s <= 0x1p60f));
  if (scales->divides) {
    V::store(scales->divisor, V::infinite_if_zero(scale));
  } else {
    V::store(scales->divisor, scale);
    invert(scale, V::set(1.0f), scales);
  }
  for (int r = rows; r < 16; ++r) stored[r] = 0;
  __builtin_memcpy(out, stored, 64);
}

// The scales of group g of a tile to their place.
template <Coder kCoder>
inline void put_scales(const Scales& scales, const Layout& layout, std::int64_t g,
                       unsigned char* out) {
  unsigned char* block = out + layout.scales_offset(g);
  __builtin_memcpy(block, scales.scale_half, 32);
  if constexpr (kCoder == Coder::kMinimum) {
    __builtin_memcpy(block + 32, scales.minimum_half, 32);
  } else if (g % 2 == 0 && g + 1 == layout.groups) {
    __builtin_memset(block + 32, 0, 32);
  }
}

}  // namespace
}  // namespace lowbit::cpu
