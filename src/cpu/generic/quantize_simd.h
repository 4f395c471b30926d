// The quantizers and dequantizers, once for all instruction sets. An ISA's quantize.cpp defines
// 16-lane operations as a struct V in its anonymous namespace and then includes this file.
//
// A row tile is worked on in chunks of one group (row-scaled and 16-bit formats: 256 inputs):
//   quantize    1. extremes of each row, 16 rows at a time, reduced so that lane r is row r
//               2. scales of 16 rows at once: IEEE division, rounding to fp16
//               3. codes row by row, weights again from L1, into a staging block of bytes
//               4. staging block -> units: a transpose of 16 rows x 16 words, then shifts and ors
//   dequantize  4 and 3 backwards
// Every float operation is one that the reference does, on the same operands, so the bytes are
// equal; where division is replaced, it is shown that no bit changes.
// Sources whose rows lie side by side take another way: generic/quantize_columns.h.
//
// Needs V: types F (16 floats), I (16 int32), B (64 bytes), and the functions used below.
// Everything is in the anonymous namespace, so that no symbol of this file is shared between
// objects with different -m flags.

namespace lowbit::cpu {
namespace {

using F = V::F;
using I = V::I;
using B = V::B;

constexpr std::int64_t kAhead = 1024;  // bytes of a row that are prefetched ahead of its use
constexpr int kChunk = 256;            // largest group; also the step of formats without groups

// Codes of one chunk, row by row, one byte (16-bit formats: two) each.
struct Staging {
  alignas(64) unsigned char bytes[16 * kChunk * 2];
};

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

// What step 1 finds, lane r for row r.
struct Extremes {
  F magnitude;  // largest absolute value; NaN or infinity if any weight was
  F max, min;   // kMinimum only
  F furthest;   // kSymmetric only: the weight of that magnitude, the negative one of two
};

// 16 row streams are more than the hardware prefetchers follow. To the second level: rows often lie
// a multiple of 4 KiB apart, so that 16 of them compete for the same few lines of the first.
template <DType kDType>
[[gnu::always_inline]] inline void prefetch_row(const char* at, int inputs) {
  for (int i = 0; i < inputs * kElementBytes<kDType>; i += 64) V::prefetch(at + i);
}

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

template <Coder kCoder>
constexpr bool kWide = kCoder == Coder::kHalf || kCoder == Coder::kBrain;

template <Coder kCoder>
constexpr bool kRowScale = kCoder == Coder::kFp8E4M3 || kCoder == Coder::kFp8E5M2;

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

// Codes of row r of a chunk.
template <Coder kCoder, DType kDType, bool kDivides>
inline void encode_row(const Codec& codec, const Bounds& bounds, const char* at, int inputs,
                       const Scales& scales, int r, unsigned char* codes) {
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

#include "cpu/generic/quantize_fp8.h"

namespace lowbit::cpu {
namespace {

// 16-bit codes need no scale, hence no second look. Returns the largest magnitudes.
template <Coder kCoder, DType kDType>
inline F encode_wide(const Codec& codec, const char* const (&rows)[16], std::int64_t begin,
                     int inputs, std::int64_t ahead, F magnitudes, Staging* staging) {
  F all = V::set(0.0f);
  for (int r = 0; r < 16; ++r) {
    const char* at = rows[r] + begin * kElementBytes<kDType>;
    prefetch_row<kDType>(at + ahead, inputs);
#pragma GCC unroll 4
    for (int i = 0; i < inputs; i += 16) {
      const F w = load<kDType>(at + i * kElementBytes<kDType>);
      all = V::max_bits(all, V::abs(w));
      V::store_codes16(staging->bytes + 2 * (r * kChunk + i), encode<kCoder>(codec, w));
    }
  }
  return V::max_bits(magnitudes, all);
}

// Overwrites what padding must be: inputs from `logical` on, rows from `rows` on.
inline void pad_codes(Staging* staging, int rows, int logical, int padded, int bytes,
                      std::uint16_t code) {
  for (int r = 0; r < 16; ++r) {
    unsigned char* row = staging->bytes + r * kChunk * bytes;
    for (int i = r < rows ? logical : 0; i < padded; ++i) {
      row[i * bytes] = static_cast<unsigned char>(code);
      if (bytes == 2) row[i * bytes + 1] = static_cast<unsigned char>(code >> 8);
    }
  }
}

// Units out of words: word j of 16 rows is 4 codes of 8 bits or 2 of 16, a row's in 32 bits.
template <int kBits>
struct Units {
  static constexpr int kBytes = kBits == 16 ? 2 : 1;  // of a code in a word
  static constexpr int kLowBits = kBits == 5   ? 4
                                  : kBits == 3 ? 2
                                               : kBits;           // beside the plane of single bits
  static constexpr int kShared = kBits == 16 ? 1 : 8 / kLowBits;  // words that share a unit

  static std::int64_t plane_at(int inputs) { return inputs / 4 / kShared * 64; }

  // Words j to j + kShared - 1. kPast: past the caches.
  template <bool kPast>
  [[gnu::always_inline]] static void put(const B* u, int j, unsigned char* out,
                                         unsigned char* plane) {
    [[maybe_unused]] constexpr char kMask = static_cast<char>((1 << kLowBits % 8) - 1);
    B unit = u[0];
    if constexpr (kShared == 2) {
      const B low = kBits == 4 ? u[0] : V::and_bytes(u[0], kMask);
      const B high = kBits == 4 ? u[1] : V::and_bytes(u[1], kMask);
      unit = V::or_bytes(low, V::template shift_bytes_left<4>(high));
    }
    if constexpr (kShared == 4) {
      const auto two = [&](int k) {
        return V::or_bytes(V::and_bytes(u[k], kMask),
                           V::template shift_bytes_left<2>(V::and_bytes(u[k + 1], kMask)));
      };
      unit = V::or_bytes(two(0), V::template shift_bytes_left<4>(two(2)));
    }
    unsigned char* to = out + j / kShared * 64;
    if constexpr (kPast) {
      V::stream_bytes(to, unit);
    } else {
      V::store_bytes(to, unit);
    }
    if constexpr (kBits == 5 || kBits == 3) {
      for (int k = 0; k < kShared; ++k) {
        const std::uint64_t word = V::template bit_of_bytes<kLowBits>(u[k]);
        __builtin_memcpy(plane + (j + k) * 8, &word, 8);
      }
    }
  }
};

// Units of `inputs` inputs (a multiple of 32) from the staging block to their place.
template <int kBits>
inline void pack_units(const Staging& staging, int inputs, unsigned char* out) {
  using Is = Units<kBits>;
  // Reading the lines that codes of 8 and 16 bits replace would take as long as reading the
  // weights.
  constexpr bool kPast = kBits >= 8;
  const int used = inputs * Is::kBytes;
  unsigned char* plane = out + Is::plane_at(inputs);
  for (int column = 0; column < used; column += 64) {
    B u[16];
    for (int r = 0; r < 16; ++r) {
      u[r] = V::load_bytes(staging.bytes + r * kChunk * Is::kBytes + column);
    }
    V::transpose(u);
    // Apart, so that indices are constants and u stays in registers.
    if (used - column >= 64) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; j += Is::kShared)
        Is::template put<kPast>(u + j, column / 4 + j, out, plane);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j += Is::kShared)
        Is::template put<kPast>(u + j, column / 4 + j, out, plane);
    }
  }
}

inline void pack_units(const Staging& staging, int bits, int inputs, unsigned char* out) {
  if (bits == 3) return pack_units<3>(staging, inputs, out);
  if (bits == 4) return pack_units<4>(staging, inputs, out);
  if (bits == 5) return pack_units<5>(staging, inputs, out);
  if (bits == 8) return pack_units<8>(staging, inputs, out);
  return pack_units<16>(staging, inputs, out);
}

template <DType kDType>
void copy_short_rows(const SourceTile& source, const char* const (&rows)[16], std::int64_t begin,
                     int logical, int padded, unsigned char* out, const char* (&copies)[16]) {
  // The last weight is repeated, so that extremes are those of the logical weights.
  constexpr int kBytes = kElementBytes<kDType>;
  for (int r = 0; r < 16; ++r) {
    unsigned char* row = out + r * kChunk * kBytes;
    if (r >= source.rows) {
      copies[r] = copies[source.rows - 1];
      continue;
    }
    __builtin_memcpy(row, rows[r] + begin * kBytes, static_cast<std::size_t>(logical) * kBytes);
    for (int i = logical; i < padded; ++i) {
      __builtin_memcpy(row + i * kBytes, row + (logical - 1) * kBytes, kBytes);
    }
    copies[r] = reinterpret_cast<const char*>(row);
  }
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

template <Coder kCoder, DType kDType>
void quantize_tile_as(const SourceTile& source, const Layout& layout, const Codec& codec,
                      std::byte* packed_tile, reference::ScaleRange* out_range) {
  constexpr bool kGrouped = !kRowScale<kCoder> && !kWide<kCoder>;
  constexpr int kCodeBytes = kWide<kCoder> ? 2 : 1;
  auto* out = reinterpret_cast<unsigned char*>(packed_tile);
  const char* rows[16];
  for (int r = 0; r < 16; ++r) {
    // Rows that pad the tile repeat the last one; pad_codes overwrites what comes of it.
    const int row = r < source.rows ? r : source.rows - 1;
    rows[r] =
        static_cast<const char*>(source.data) + row * source.row_stride * kElementBytes<kDType>;
  }
  alignas(64) unsigned char copy[16 * kChunk * kElementBytes<kDType>];
  Staging staging;
  Scales scales;
  const Bounds bounds(codec);
  V::store(scales.minimum, V::set(0.0f));
  V::store(scales.inverse_rest, V::set(0.0f));
  Range range;
  range.start();

  const int step = kGrouped ? layout.group_size : kChunk;
  const auto chunk_rows = [&](std::int64_t begin, int logical, int padded,
                              const char*(&at)[16]) -> std::int64_t {
    if (logical == padded) {
      for (int r = 0; r < 16; ++r) at[r] = rows[r];
      return begin;
    }
    copy_short_rows<kDType>(source, rows, begin, logical, padded, copy, at);
    return 0;
  };
  const auto logical_inputs = [&](std::int64_t begin) {
    const std::int64_t rest = source.cols - begin;
    return static_cast<int>(rest < step ? rest : step);
  };

  // From the chunk at `begin` to what is asked for meanwhile: at the end of the rows that is the
  // start of the next tile's.
  const auto ahead = [&](std::int64_t begin) {
    constexpr std::int64_t kBytes = kElementBytes<kDType>;
    if (begin * kBytes + kAhead < source.cols * kBytes || !source.more || kRowScale<kCoder>) {
      return kAhead;
    }
    return kAhead + (16 * source.row_stride - source.cols) * kBytes;
  };

  [[maybe_unused]] Fp8Table tables[kByTable<kCoder, kDType> ? 16 : 1];
  [[maybe_unused]] bool by_table = false;
  if constexpr (kRowScale<kCoder>) {
    // The scale needs the whole row first; the second pass finds it in the second-level cache.
    constexpr bool kWords = kDType != DType::kFloat32;
    F magnitude = V::set(0.0f);
    [[maybe_unused]] WordExtremes most;
    most.start();
    for (std::int64_t begin = 0; begin < source.cols; begin += step) {
      const int logical = logical_inputs(begin);
      const int padded = (logical + 31) / 32 * 32;
      const char* at[16];
      const std::int64_t from = chunk_rows(begin, logical, padded, at);
      if constexpr (kWords) {
        most.template add<kDType>(at, from, padded, ahead(begin));
      } else {
        const Extremes e = find_extremes<kCoder, kDType>(at, from, padded, ahead(begin));
        magnitude = V::max_bits(magnitude, e.magnitude);
      }
    }
    if constexpr (kWords) magnitude = most.template magnitude<kDType>();
    choose_row_scales(codec, magnitude, source.rows, &range, &scales, out);
    if constexpr (kByTable<kCoder, kDType>) {
      by_table = !scales.divides && source.cols >= kTableInputs<kDType>;
      for (int r = 0; by_table && r < 16; ++r) {
        make_table<kCoder, kDType>(codec, bounds, scales, r, &tables[r]);
      }
    }
  }

  for (std::int64_t begin = 0; begin < source.cols; begin += step) {
    const int logical = logical_inputs(begin);
    const int padded = (logical + 31) / 32 * 32;
    const std::int64_t g = kGrouped ? begin / step : 0;
    const char* at[16];
    const std::int64_t from = chunk_rows(begin, logical, padded, at);
    if constexpr (kWide<kCoder>) {
      range.magnitude = encode_wide<kCoder, kDType>(codec, at, from, padded, ahead(begin),
                                                    range.magnitude, &staging);
      range.largest = range.magnitude;
    } else {
      if constexpr (kGrouped) {
        const Extremes e = find_extremes<kCoder, kDType>(at, from, padded, ahead(begin));
        choose_scales<kCoder>(codec, e, &range, &scales);
      }
      for (int r = 0; r < 16; ++r) {
        // This pass reads from the second level only; meanwhile the next tile's rows come there.
        if (kRowScale<kCoder> && source.more) {
          prefetch_row<kDType>(rows[r] + (begin + 16 * source.row_stride) * kElementBytes<kDType>,
                               padded);
        }
        const char* row = at[r] + from * kElementBytes<kDType>;
        unsigned char* codes = staging.bytes + r * kChunk;
        if constexpr (kByTable<kCoder, kDType>) {
          if (by_table) {
            encode_row_by_table<kCoder, kDType>(codec, bounds, row, padded, scales, tables[r], r,
                                                codes);
            continue;
          }
        }
        const auto encode_as = [&](auto divides) {
          encode_row<kCoder, kDType, divides>(codec, bounds, row, padded, scales, r, codes);
        };
        if (kRowScale<kCoder> && scales.divides) {
          encode_as(std::bool_constant<kRowScale<kCoder>>{});
        } else {
          encode_as(std::false_type{});
        }
      }
    }
    if (logical != padded || source.rows != 16) {
      pad_codes(&staging, source.rows, logical, padded, kCodeBytes, codec.padding_code);
      for (int r = source.rows; r < 16; ++r) scales.scale_half[r] = scales.minimum_half[r] = 0;
    }
    const std::int64_t offset =
        kGrouped ? layout.codes_offset(g) : (kRowScale<kCoder> ? 64 : 0) + begin * 16 * kCodeBytes;
    pack_units(staging, codec.bits, padded, out + offset);
    if constexpr (kGrouped) put_scales<kCoder>(scales, layout, g, out);
  }

  V::finish_streams();

  range.report(out_range);
}

template <Coder kCoder>
void quantize_tile_from(const SourceTile& source, const Layout& layout, const Codec& codec,
                        std::byte* packed_tile, reference::ScaleRange* range) {
  switch (source.dtype) {
    case DType::kFloat16:
      return quantize_tile_as<kCoder, DType::kFloat16>(source, layout, codec, packed_tile, range);
    case DType::kBFloat16:
      return quantize_tile_as<kCoder, DType::kBFloat16>(source, layout, codec, packed_tile, range);
    default:
      return quantize_tile_as<kCoder, DType::kFloat32>(source, layout, codec, packed_tile, range);
  }
}

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

void quantize_tile(const SourceTile& source, const Layout& layout, const Codec& codec,
                   std::byte* packed_tile, reference::ScaleRange* range) {
  with_coder(codec.coder, [&](auto coder) {
    quantize_tile_from<coder>(source, layout, codec, packed_tile, range);
  });
}

// ---- back ---------------------------------------------------------------------------------------

inline void unpack_units(const unsigned char* in, int bits, int inputs, Staging* staging) {
  const int row_bytes = kChunk * (bits == 16 ? 2 : 1);
  const int used = inputs * (bits == 16 ? 2 : 1);
  const unsigned char* plane = in + (bits == 5 ? inputs / 8 : inputs / 16) * 64;
  for (int column = 0; column < used; column += 64) {
    B u[16];
    const int units = used - column < 64 ? (used - column) / 4 : 16;
    for (int j = units; j < 16; ++j) u[j] = V::zero_bytes();
    switch (bits) {
      case 16:
      case 8:
        for (int j = 0; j < units; ++j) u[j] = V::load_bytes(in + (column / 4 + j) * 64);
        break;
      case 4:
      case 5:
        for (int j = 0; j < units; j += 2) {
          const B both = V::load_bytes(in + (column / 8 + j / 2) * 64);
          u[j] = V::and_bytes(both, 15);
          u[j + 1] = V::and_bytes(V::shift_bytes_right<4>(both), 15);
        }
        break;
      case 3:
        for (int j = 0; j < units; j += 4) {
          const B four = V::load_bytes(in + (column / 16 + j / 4) * 64);
          u[j] = V::and_bytes(four, 3);
          u[j + 1] = V::and_bytes(V::shift_bytes_right<2>(four), 3);
          u[j + 2] = V::and_bytes(V::shift_bytes_right<4>(four), 3);
          u[j + 3] = V::and_bytes(V::shift_bytes_right<6>(four), 3);
        }
        break;
    }
    if (bits == 5 || bits == 3) {
      for (int j = 0; j < units; ++j) {
        std::uint64_t word;
        __builtin_memcpy(&word, plane + (column / 4 + j) * 8, 8);
        u[j] = V::or_bytes(u[j], V::bytes_of_bits(word, bits == 5 ? 16 : 4));
      }
    }
    V::transpose(u);
    for (int r = 0; r < 16; ++r) V::store_bytes(staging->bytes + r * row_bytes + column, u[r]);
  }
}

// The codes of row r alone; the words of a row are 64 bytes apart.
inline void unpack_row(const unsigned char* in, int bits, int inputs, int r, unsigned char* codes) {
  const unsigned char* at = in + 4 * r;
  const unsigned char* plane = in + (bits == 5 ? inputs / 8 : inputs / 16) * 64;
  const auto word_at = [](const unsigned char* p) {
    std::uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
  };
  // Four bits of the plane spread over four bytes.
  const auto high_bits = [&](int j) {
    const unsigned nibble = plane[j * 8 + r / 2] >> (r % 2 * 4) & 15;
    return nibble * 0x00204081u & 0x01010101u;
  };
  const auto put = [&](int j, std::uint32_t word) { __builtin_memcpy(codes + 4 * j, &word, 4); };
  switch (bits) {
    case 16:
      for (int j = 0; j < inputs / 2; ++j) put(j, word_at(at + j * 64));
      break;
    case 8:
      for (int j = 0; j < inputs / 4; ++j) put(j, word_at(at + j * 64));
      break;
    case 4:
      for (int j = 0; j < inputs / 4; j += 2) {
        const std::uint32_t word = word_at(at + j / 2 * 64);
        put(j, word & 0x0f0f0f0f);
        put(j + 1, word >> 4 & 0x0f0f0f0f);
      }
      break;
    case 5:
      for (int j = 0; j < inputs / 4; j += 2) {
        const std::uint32_t word = word_at(at + j / 2 * 64);
        put(j, (word & 0x0f0f0f0f) | high_bits(j) << 4);
        put(j + 1, (word >> 4 & 0x0f0f0f0f) | high_bits(j + 1) << 4);
      }
      break;
    case 3:
      for (int j = 0; j < inputs / 4; ++j) {
        const std::uint32_t word = word_at(at + j / 4 * 64) >> (j % 4 * 2);
        put(j, (word & 0x03030303) | high_bits(j) << 2);
      }
      break;
  }
}

template <Coder kCoder>
inline F decode(const Codec& codec, I code, F table) {
  if constexpr (kCoder == Coder::kSymmetric || kCoder == Coder::kInteger ||
                kCoder == Coder::kMinimum) {
    return V::to_float(V::sub_int(code, V::set_int(codec.zero_point)));
  }
  if constexpr (kCoder == Coder::kTable || kCoder == Coder::kMirrored) {
    return V::look_up(codec.values, table, code);
  }
  if constexpr (kCoder == Coder::kFp8E4M3) {
    // As a half the exponent is 8 too small, subnormals included.
    const I low = V::and_(code, V::set_int(0x7f));
    const I sign = V::and_(code, V::set_int(0x80));
    const F value = V::half_to_float(V::or_(V::shift_left<8>(sign), V::shift_left<7>(low)));
    return V::nan_if_equal(low, V::set_int(0x7f), V::mul(value, V::set(256.0f)));
  }
  if constexpr (kCoder == Coder::kFp8E5M2) return V::half_to_float(V::shift_left<8>(code));
  if constexpr (kCoder == Coder::kHalf) return V::half_to_float(code);
  if constexpr (kCoder == Coder::kBrain) return V::from_bits(V::shift_left<16>(code));
}

template <Coder kCoder, DType kDType>
inline void decode_row(const Codec& codec, const unsigned char* codes, int logical, float scale,
                       float minimum, char* out) {
  const F s = V::set(scale);
  const F m = V::set(minimum);
  const F table = V::load(codec.values);
  const auto sixteen = [&](int i, char* at) {
    F w = decode<kCoder>(
        codec, kWide<kCoder> ? V::load_codes16(codes + 2 * i) : V::load_codes8(codes + i), table);
    w = V::mul(w, s);
    if constexpr (kCoder == Coder::kMinimum) w = V::add(w, m);
    if constexpr (kDType == DType::kFloat32) V::store(reinterpret_cast<float*>(at), w);
    if constexpr (kDType == DType::kFloat16) V::store_codes16(at, V::half_bits(w));
    if constexpr (kDType == DType::kBFloat16) V::store_codes16(at, V::brain_bits_or_nan(w));
  };
  int i = 0;
  for (; i + 16 <= logical; i += 16) sixteen(i, out + i * kElementBytes<kDType>);
  if (i < logical) {
    alignas(64) char rest[64];
    sixteen(i, rest);
    __builtin_memcpy(out + i * kElementBytes<kDType>, rest,
                     static_cast<std::size_t>(logical - i) * kElementBytes<kDType>);
  }
}

// Row r alone into the target's first row, or all rows if r < 0.
template <Coder kCoder, DType kDType>
void dequantize_as(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                   float power, int only, const TargetTile& target) {
  constexpr bool kGrouped = !kRowScale<kCoder> && !kWide<kCoder>;
  constexpr int kCodeBytes = kWide<kCoder> ? 2 : 1;
  const auto* in = reinterpret_cast<const unsigned char*>(packed_tile);
  Staging staging;
  alignas(64) float scale[16];
  alignas(64) float minimum[16];
  V::store(scale, V::set(power));
  V::store(minimum, V::set(0.0f));
  if constexpr (kRowScale<kCoder>) {
    V::store(scale, V::mul(V::load(reinterpret_cast<const float*>(in)), V::set(power)));
  }
  const int step = kGrouped ? layout.group_size : kChunk;
  for (std::int64_t begin = 0; begin < target.cols; begin += step) {
    const std::int64_t rest = target.cols - begin;
    const int logical = static_cast<int>(rest < step ? rest : step);
    const int padded = (logical + 31) / 32 * 32;
    const std::int64_t g = kGrouped ? begin / step : 0;
    const unsigned char* codes =
        in + (kGrouped ? layout.codes_offset(g)
                       : (kRowScale<kCoder> ? 64 : 0) + begin * 16 * kCodeBytes);
    if constexpr (kGrouped) {
      const unsigned char* block = in + layout.scales_offset(g);
      V::store(scale, V::mul(V::load_half(block), V::set(power)));
      if constexpr (kCoder == Coder::kMinimum) {
        V::store(minimum, V::mul(V::load_half(block + 32), V::set(power)));
      }
    }
    char* out = static_cast<char*>(target.data) + begin * kElementBytes<kDType>;
    if (only >= 0) {
      unpack_row(codes, codec.bits, padded, only, staging.bytes);
      decode_row<kCoder, kDType>(codec, staging.bytes, logical, scale[only], minimum[only], out);
      continue;
    }
    unpack_units(codes, codec.bits, padded, &staging);
    for (int r = 0; r < target.rows; ++r) {
      decode_row<kCoder, kDType>(codec, staging.bytes + r * kChunk * kCodeBytes, logical, scale[r],
                                 minimum[r], out + r * target.row_stride * kElementBytes<kDType>);
    }
  }
}

template <Coder kCoder>
void dequantize_to(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                   float power, int only, const TargetTile& target) {
  switch (target.dtype) {
    case DType::kFloat16:
      return dequantize_as<kCoder, DType::kFloat16>(packed_tile, layout, codec, power, only,
                                                    target);
    case DType::kBFloat16:
      return dequantize_as<kCoder, DType::kBFloat16>(packed_tile, layout, codec, power, only,
                                                     target);
    default:
      return dequantize_as<kCoder, DType::kFloat32>(packed_tile, layout, codec, power, only,
                                                    target);
  }
}

void dequantize_row(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                    float power, int only, const TargetTile& target) {
  with_coder(codec.coder, [&](auto coder) {
    dequantize_to<coder>(packed_tile, layout, codec, power, only, target);
  });
}

void dequantize_tile(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                     float power, const TargetTile& target) {
  dequantize_row(packed_tile, layout, codec, power, -1, target);
}

// ---- scanning and widening ----------------------------------------------------------------------

std::int64_t first_nonfinite(const void* data, DType dtype, std::int64_t count) {
  const auto* at = static_cast<const unsigned char*>(data);
  const int bytes = dtype == DType::kFloat32 ? 4 : 2;
  const auto bad = [&](std::int64_t i) {
    if (bytes == 4) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, at + 4 * i, 4);
      return (bits & 0x7f800000u) == 0x7f800000u;
    }
    std::uint16_t bits;
    __builtin_memcpy(&bits, at + 2 * i, 2);
    const unsigned top = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
    return (bits & top) == top;
  };
  constexpr int kBlockBytes = 1024;
  const std::int64_t block = kBlockBytes / bytes;
  std::int64_t i = 0;
  for (; i + block <= count; i += block) {
    const unsigned char* p = at + i * bytes;
    V::prefetch(reinterpret_cast<const char*>(p) + 4096);
    const bool clean = bytes == 4                 ? V::finite32(p, kBlockBytes)
                       : dtype == DType::kFloat16 ? V::finite16(p, kBlockBytes, 0x7c00)
                                                  : V::finite16(p, kBlockBytes, 0x7f80);
    if (!clean) break;
  }
  for (; i < count; ++i) {
    if (bad(i)) return i;
  }
  return -1;
}

template <DType kDType>
void widen_as(const void* data, std::int64_t count, float* out) {
  const char* at = static_cast<const char*>(data);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) V::store(out + i, load<kDType>(at + i * kElementBytes<kDType>));
  if (i < count) {
    alignas(64) char in[64] = {};
    alignas(64) float rest[16];
    const auto left = static_cast<std::size_t>(count - i);
    __builtin_memcpy(in, at + i * kElementBytes<kDType>, left * kElementBytes<kDType>);
    V::store(rest, load<kDType>(in));
    __builtin_memcpy(out + i, rest, left * 4);
  }
}

void widen(const void* data, DType dtype, std::int64_t count, float* out) {
  if (dtype == DType::kFloat16) return widen_as<DType::kFloat16>(data, count, out);
  if (dtype == DType::kBFloat16) return widen_as<DType::kBFloat16>(data, count, out);
  return widen_as<DType::kFloat32>(data, count, out);
}

// Stripes of as many columns as fill a line of a row; in each, every line of the source once.
template <int kBytes>
void transpose_as(const unsigned char* data, std::int64_t col_stride, std::int64_t rows,
                  std::int64_t cols, unsigned char* out, std::int64_t out_stride) {
  constexpr int kSide = 64 / kBytes;  // rows and columns of a block
  for (std::int64_t col = 0; col < cols; col += kSide) {
    const int width = cols - col < kSide ? static_cast<int>(cols - col) : kSide;
    for (std::int64_t row = 0; row < rows; row += kSide) {
      const unsigned char* block = data + (col * col_stride + row) * kBytes;
      const auto column = [&](int j) {
        if (j >= width) return V::zero_bytes();
        const unsigned char* at = block + j * col_stride * kBytes;
        V::prefetch(reinterpret_cast<const char*>(at + kSide * col_stride * kBytes));
        return V::load_bytes(at);
      };
      const auto put = [&](std::int64_t r, B line) {
        unsigned char* to = out + ((row + r) * out_stride + col) * kBytes;
        if (width == kSide) return V::store_bytes(to, line);
        alignas(64) unsigned char part[64];
        V::store_bytes(part, line);
        __builtin_memcpy(to, part, static_cast<std::size_t>(width) * kBytes);
      };
      if constexpr (kBytes == 4) {
        B u[16];
        for (int j = 0; j < 16; ++j) u[j] = column(j);
        V::transpose(u);
        for (int r = 0; r < 16; ++r) put(r, u[r]);
      } else {
        // Two columns make words; within 128-bit lanes, so that word w is row 8 (w / 4) + w % 4 of
        // one half and four rows further of the other.
        B low[16], high[16];
        for (int j = 0; j < 16; ++j) {
          const B a = column(2 * j), b = column(2 * j + 1);
          low[j] = V::interleave_low16(a, b);
          high[j] = V::interleave_high16(a, b);
        }
        V::transpose(low);
        V::transpose(high);
        for (int w = 0; w < 16; ++w) {
          put(w / 4 * 8 + w % 4, low[w]);
          put(w / 4 * 8 + w % 4 + 4, high[w]);
        }
      }
    }
  }
}

void transpose(const void* data, int bytes, std::int64_t col_stride, std::int64_t rows,
               std::int64_t cols, void* out, std::int64_t out_stride) {
  const auto run = bytes == 4 ? transpose_as<4> : transpose_as<2>;
  run(static_cast<const unsigned char*>(data), col_stride, rows, cols,
      static_cast<unsigned char*>(out), out_stride);
}

}  // namespace
}  // namespace lowbit::cpu

#include "cpu/generic/quantize_columns.h"

namespace lowbit::cpu {
namespace {

const QuantizeKernels kKernels = {
    V::kName,          quantize_tile,   quantize_columns,
    columns_workspace, dequantize_tile, dequantize_row,
    first_nonfinite,   transpose,       widen,
};

}  // namespace
}  // namespace lowbit::cpu
