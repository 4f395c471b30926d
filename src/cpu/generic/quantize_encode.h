// Step 3 of quantize_simd.h: weights over their scales to codes.
#pragma once

#include <cstdint>

#include "cpu/generic/quantize_coder.h"
#include "cpu/generic/quantize_load.h"
#include "cpu/generic/quantize_scales.h"

namespace lowbit::cpu {
namespace {

// The nearest 8-bit float to a quotient of magnitude at most `largest`, ties to even, as a code:
// sign above the magnitude, kept even if that is zero.
template <int kMantissaBits, int kLeastExponent>
inline I encode_float(F t, F magnitude) {
  constexpr int kDrop = 23 - kMantissaBits;
  // Adding 2^kDrop units of the result's last place leaves the number of those units in the low
  // bits, rounded; below the least exponent units shrink no further.
  const I exponent = V::max_int(V::and_(V::bits(magnitude), V::set_int(0x7f800000)),
                                V::set_int((127 + kLeastExponent) << 23));
  // A code is units + (exponent - least exponent) * 2^kMantissaBits. The exponent times that is
  // what a shift by kDrop leaves of the sum, and the constants, even so that ties stay ties, enter
  // as units to begin with: all of it modulo 128.
  constexpr int kUnits = -((127 + kLeastExponent + kDrop) << kMantissaBits) & 127;
  const F magic = V::from_bits(V::add(exponent, V::set_int((kDrop << 23) + kUnits)));
  const I sum = V::bits(V::add(magnitude, magic));
  return V::with_sign(V::add(sum, V::shift_right<kDrop>(sum)), t);
}

// Codes of 16 quotients (kHalf, kBrain: of 16 weights), not all of them finished: see narrow().
template <Coder kCoder>
inline I encode(const Codec& codec, F t) {
  if constexpr (kCoder == Coder::kSymmetric || kCoder == Coder::kInteger ||
                kCoder == Coder::kMinimum) {
    return V::round_to_int(t);
  }
  if constexpr (kCoder == Coder::kTable) return V::nearest(codec, t);
  if constexpr (kCoder == Coder::kMirrored) return V::add(V::floor_to_int(t), V::ceil_to_int(t));
  if constexpr (kCoder == Coder::kFp8E4M3) return encode_float<3, -6>(t, V::abs(t));
  if constexpr (kCoder == Coder::kFp8E5M2) return encode_float<2, -14>(t, V::abs(t));
  if constexpr (kCoder == Coder::kHalf) return V::half_bits(t);
  if constexpr (kCoder == Coder::kBrain) return V::brain_bits(t);
}

// Bounds of integer codes, in every byte.
struct Bounds {
  B low, high, zero_point;
  explicit Bounds(const Codec& codec)
      : low(V::set_bytes(static_cast<int>(codec.low))),
        high(V::set_bytes(static_cast<int>(codec.high))),
        zero_point(V::set_bytes(codec.zero_point)) {}
};

// Four times 16 codes as bytes. Integers are clamped here, where it costs a quarter: packing
// saturates, and quotients are far inside int32 (below 2^29: a group's weights are within the
// rounding of a half of its minimum and 31 scales, and no scale but zero is below 2^-24).
template <Coder kCoder, Order kOrder>
inline B narrow(const Codec& codec, const Bounds& bounds, I a, I b, I c, I d) {
  if constexpr (kCoder == Coder::kSymmetric || kCoder == Coder::kInteger ||
                kCoder == Coder::kMinimum) {
    const B q = V::template narrow_signed<kOrder>(a, b, c, d);
    return V::add_bytes(V::min_signed(V::max_signed(q, bounds.low), bounds.high),
                        bounds.zero_point);
  }
  // E2M1: the thresholds are multiples of 1/4, and quotients come times four. floor + ceil is twice
  // an integer where the quotient is one and odd between: all that decides, ties included.
  if constexpr (kCoder == Coder::kMirrored) {
    return V::e2m1_codes(V::template narrow_signed<kOrder>(a, b, c, d));
  }
  const B codes = V::template narrow<kOrder>(a, b, c, d);
  if constexpr (kCoder == Coder::kTable) return V::table_codes(codec, codes);
  if constexpr (kCoder == Coder::kFp8E4M3 || kCoder == Coder::kFp8E5M2) {
    return V::zero_where(codes, 0x80);
  }
  return codes;
}

// What weights are divided by, of one row in all lanes or of 16 rows in theirs.
struct Divisor {
  F inverse, rest, divisor, minimum;
};

// Codes of 16 weights, not all of them finished: see narrow(). kDivides: Scales::divides.
template <Coder kCoder, bool kDivides>
inline I encode_weights(const Codec& codec, const Divisor& by, F w) {
  if constexpr (kWide<kCoder>) return encode<kCoder>(codec, w);
  if constexpr (kCoder == Coder::kMinimum) w = V::sub(w, by.minimum);
  if constexpr (kDivides) {
    // Of a subnormal scale the quotient may be beyond the largest value.
    const F t = V::div(w, by.divisor);
    const F magnitude = V::min(V::abs(t), V::set(codec.value_max));
    return kCoder == Coder::kFp8E4M3 ? encode_float<3, -6>(t, magnitude)
                                     : encode_float<2, -14>(t, magnitude);
  }
  F q = V::multiply_add(w, by.inverse, V::mul(w, by.rest));
  if constexpr (kRowScale<kCoder>) {
    q = V::multiply_add(V::negated_multiply_add(q, by.divisor, w), by.inverse, q);
  }
  return encode<kCoder>(codec, q);
}

// Codes of row r of a chunk. Inlined into the loop over rows: called, fp8 takes 15 % longer.
template <Coder kCoder, DType kDType, bool kDivides>
[[gnu::always_inline]] inline void encode_row(const Codec& codec, const Bounds& bounds,
                                              const char* at, int inputs, const Scales& scales,
                                              int r, unsigned char* codes) {
  const Divisor by{V::set(scales.inverse[r]), V::set(scales.inverse_rest[r]),
                   V::set(scales.divisor[r]), V::set(scales.minimum[r])};
  const auto sixteen = [&](F w) { return encode_weights<kCoder, kDivides>(codec, by, w); };
  for (int i = 0; i < inputs; i += 64) {
    F v[4];
    load_two<kDType>(at + i * kElementBytes<kDType>, v[0], v[1]);
    if (i + 64 <= inputs) {
      load_two<kDType>(at + (i + 32) * kElementBytes<kDType>, v[2], v[3]);
    } else {  // nobody looks at the last 32 codes
      v[2] = v[3] = v[0];
    }
    V::store_bytes(codes + i,
                   narrow<kCoder, kLoadOrder<kDType>>(codec, bounds, sixteen(v[0]), sixteen(v[1]),
                                                      sixteen(v[2]), sixteen(v[3])));
  }
}

}  // namespace
}  // namespace lowbit::cpu
