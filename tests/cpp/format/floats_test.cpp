// Every code of every small float, and encoding against a rule of its own: the nearest value found
// by looking at the neighbours, ties to the even code.
#include "format/floats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#if defined(__F16C__) || defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

struct Named {
  const char* name;
  FloatKind kind;
  std::uint32_t codes;
  double largest, smallest;
};
const Named kKinds[] = {{"fp16", kHalfKind, 1u << 16, 65504, 0x1p-24},
                        {"bf16", kBrainKind, 1u << 16, 0x1.fep127, 0x1p-133},
                        {"e4m3", kFp8E4M3Kind, 1u << 8, 448, 0x1p-9},
                        {"e5m2", kFp8E5M2Kind, 1u << 8, 57344, 0x1p-16}};

// Sum of the values of the bits, the definition of the format in other words.
double sum_of_bits(const FloatKind& kind, std::uint32_t bits) {
  const int exponent_field =
      static_cast<int>(bits >> kind.mantissa_bits) & ((1 << kind.exponent_bits) - 1);
  double fraction = exponent_field == 0 ? 0 : 1;
  for (int i = 0; i < kind.mantissa_bits; ++i) {
    if (bits >> i & 1) fraction += std::pow(2.0, i - kind.mantissa_bits);
  }
  const int exponent = (exponent_field == 0 ? 1 : exponent_field) - kind.bias();
  const bool negative = bits >> (kind.mantissa_bits + kind.exponent_bits) & 1;
  return (negative ? -1 : 1) * fraction * std::pow(2.0, exponent);
}

TEST(Floats, EveryCodeDecodesToTheSumOfItsBits) {
  for (const Named& named : kKinds) {
    for (std::uint32_t code = 0; code < named.codes; ++code) {
      const std::uint32_t magnitude = code & (named.codes / 2 - 1);
      const double value = decode_float(named.kind, code);
      if (magnitude <= named.kind.largest()) {
        ASSERT_EQ(value, sum_of_bits(named.kind, code)) << named.name << " " << code;
        ASSERT_EQ(std::signbit(value), code >= named.codes / 2);
      } else if (named.kind.ieee_top && magnitude == named.kind.largest() + 1) {
        ASSERT_TRUE(std::isinf(value));
      } else {
        ASSERT_TRUE(std::isnan(value));
      }
    }
    EXPECT_EQ(decode_float(named.kind, named.kind.largest()), named.largest) << named.name;
    EXPECT_EQ(decode_float(named.kind, 1), named.smallest) << named.name;
  }
}

TEST(Floats, EveryCodeEncodesToItself) {
  for (const Named& named : kKinds) {
    for (std::uint32_t code = 0; code < named.codes; ++code) {
      const double value = decode_float(named.kind, code);
      if (std::isnan(value)) continue;
      ASSERT_EQ(encode_float(named.kind, value), code) << named.name << " " << code;
    }
  }
}

// Between two neighbours: the midpoint goes to the even one, anything else to the nearer one.
TEST(Floats, EncodingIsNearestEvenBetweenAllNeighbours) {
  for (const Named& named : kKinds) {
    for (std::uint32_t code = 0; code < named.kind.largest(); ++code) {
      const double low = decode_float(named.kind, code), high = decode_float(named.kind, code + 1);
      const double middle = low + (high - low) / 2;
      const std::uint32_t even = code % 2 == 0 ? code : code + 1;
      ASSERT_EQ(encode_float(named.kind, middle), even) << named.name << " " << code;
      ASSERT_EQ(encode_float(named.kind, std::nextafter(middle, 0)), code);
      ASSERT_EQ(encode_float(named.kind, std::nextafter(middle, HUGE_VAL)), code + 1);
      const std::uint32_t sign = named.codes / 2;
      ASSERT_EQ(encode_float(named.kind, -middle), even | sign);
    }
  }
}

TEST(Floats, BeyondTheLargest) {
  for (const Named& named : kKinds) {
    const double step = named.largest - decode_float(named.kind, named.kind.largest() - 1);
    const double tie = named.largest + step / 2;
    const std::uint32_t largest = named.kind.largest();
    const std::uint32_t beyond = named.kind.ieee_top ? largest + 1 : largest;
    EXPECT_EQ(encode_float(named.kind, std::nextafter(tie, 0)), largest) << named.name;
    EXPECT_EQ(encode_float(named.kind, tie), beyond) << named.name;  // the largest code is odd
    EXPECT_EQ(encode_float(named.kind, HUGE_VAL), beyond);
    EXPECT_EQ(encode_float(named.kind, 1e300, true), largest);
    EXPECT_EQ(encode_float(named.kind, -HUGE_VAL, true), largest | named.codes / 2);
    EXPECT_EQ(encode_float(named.kind, std::nan("")) & (named.codes / 2 - 1), named.codes / 2 - 1);
    EXPECT_EQ(encode_float(named.kind, named.smallest / 2), 0u);
    EXPECT_EQ(encode_float(named.kind, -named.smallest / 4), named.codes / 2);
  }
}

TEST(Floats, TheQuickHalfConversionIsTheDefinition) {
  for (std::uint32_t code = 0; code < 1u << 16; ++code) {
    const float quick = half_to_float(static_cast<std::uint16_t>(code));
    const double exact = decode_float(kHalfKind, code);
    if (std::isnan(exact)) {
      ASSERT_TRUE(std::isnan(quick));
    } else {
      ASSERT_EQ(static_cast<double>(quick), exact) << code;
      ASSERT_EQ(std::signbit(quick), std::signbit(exact));
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// The processor's own conversion, over every 65537th float32.
__attribute__((target("f16c"))) std::uint16_t hardware_half(float value) {
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

TEST(Floats, HalvesAreTheProcessors) {
  if (!__builtin_cpu_supports("f16c")) GTEST_SKIP() << "this processor has no F16C";
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32; bits += 65537) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(float_to_half(value), hardware_half(value)) << value;
  }
}
#endif

}  // namespace
}  // namespace lowbit
