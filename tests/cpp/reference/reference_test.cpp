// The reference itself: hand-worked groups, the exponent rule, and the linear operator.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lowbit/error.h"
#include "lowbit/linear.h"
#include "quantize/matrices.h"
#include "reference/reference.h"

namespace lowbit::testing {
namespace {

using ::testing::ElementsAre;

struct Quantized {
  int exponent;
  std::vector<std::uint32_t> codes;
  std::vector<double> weights;
};

// One row as one group of 32 (the rest is padding).
Quantized quantize_row(Format format, const std::vector<double>& values) {
  const auto k = static_cast<std::int64_t>(values.size());
  const Layout layout = make_layout(format, 1, k, format_info(format).grouped() ? 32 : 0);
  Matrix weight(DType::kFloat32, 1, k);
  weight.fill([&](std::int64_t, std::int64_t j) { return values[static_cast<std::size_t>(j)]; });
  PackedBuffer packed(layout);
  Quantized q;
  q.exponent = reference::quantize(weight.view(), layout, packed.span());
  for (std::int64_t j = 0; j < k; ++j) {
    q.codes.push_back(reference::code_at(packed.span().data(), layout, 0, j));
    q.weights.push_back(reference::weight_at(packed.span().data(), layout, q.exponent, 0, j));
  }
  // Padding is what the table says, wherever it is.
  for (int r = 0; r < 16; ++r) {
    for (std::int64_t j = r == 0 ? k : 0; j < layout.k_padded; ++j) {
      EXPECT_EQ(reference::code_at(packed.span().data(), layout, r, j),
                format_info(format).padding_code);
    }
    if (r > 0 && format_info(format).scale_kind != ScaleKind::kNone) {
      EXPECT_EQ(reference::weight_at(packed.span().data(), layout, 0, r, 0), 0);
    }
  }
  return q;
}

TEST(Reference, SymmetricIntegersMapTheLargestMagnitudeToTheLowestCode) {
  EXPECT_THAT(quantize_row(Format::kSymInt4, {-8, 7, 1, 0.5, 1.5, -0.4}).codes,
              ElementsAre(0, 15, 9, 8, 10, 8));  // ties to even: 0.5 -> 0, 1.5 -> 2
  // A positive extreme turns the scale negative.
  const Quantized q = quantize_row(Format::kSymInt4, {8, -7, -1, 7.6});
  EXPECT_THAT(q.codes, ElementsAre(0, 15, 9, 0));
  EXPECT_THAT(q.weights, ElementsAre(8, -7, -1, 8));
  // Equal magnitudes: the negative one decides, and the positive one clamps.
  EXPECT_THAT(quantize_row(Format::kSymInt4, {4, -4}).weights, ElementsAre(3.5, -4));
  EXPECT_THAT(quantize_row(Format::kSymInt5, {16, -15, 1}).weights, ElementsAre(16, -15, 1));
  EXPECT_THAT(quantize_row(Format::kSymInt8, {127, -127, 3.5, -2.5}).codes,
              ElementsAre(255, 1, 132, 126));
}

TEST(Reference, AsymmetricIntegersSpanMinimumToMaximum) {
  const Quantized q = quantize_row(Format::kAsymInt4, {-3, 12, 0, 4.5, 5.5});
  EXPECT_THAT(q.codes, ElementsAre(0, 15, 3, 8, 8));
  EXPECT_THAT(q.weights, ElementsAre(-3, 12, 0, 5, 5));
  EXPECT_THAT(quantize_row(Format::kAsymInt5, {1, 32, 9.25}).weights, ElementsAre(1, 32, 9));
  // A constant group is its minimum.
  EXPECT_THAT(quantize_row(Format::kAsymInt4, {0.75, 0.75}).weights, ElementsAre(0.75, 0.75));
}

TEST(Reference, CodebooksTakeTheNearestEntryAndTiesTheEvenCode) {
  for (Format format : {Format::kNf3, Format::kNf4, Format::kFp4}) {
    const FormatInfo& info = format_info(format);
    for (std::uint32_t code = 0; code < info.codebook.size(); ++code) {
      const bool minus_zero = format == Format::kFp4 && code == 8;
      EXPECT_EQ(reference::nearest_code(info, info.codebook[code]), minus_zero ? 0 : code);
    }
    const std::uint32_t entries =
        static_cast<std::uint32_t>(info.codebook.size()) / (format == Format::kFp4 ? 2 : 1);
    for (std::uint32_t code = 0; code + 1 < entries; ++code) {
      const float middle = (info.codebook[code] + info.codebook[code + 1]) / 2;
      EXPECT_EQ(reference::nearest_code(info, middle), code + code % 2) << info.name << code;
      EXPECT_EQ(reference::nearest_code(info, std::nextafter(middle, -9.0f)), code);
      EXPECT_EQ(reference::nearest_code(info, std::nextafter(middle, 9.0f)), code + 1);
    }
  }
  EXPECT_THAT(quantize_row(Format::kFp4, {6, -6, 2.5, -2.5, 5, -0.2}).weights,
              ElementsAre(6, -6, 2, -2, 4, 0));
  EXPECT_THAT(quantize_row(Format::kNf4, {-1, 1, 0, -0.01}).codes, ElementsAre(0, 15, 7, 7));
}

TEST(Reference, Fp8RoundsToNearestEvenAndSaturates) {
  EXPECT_THAT(quantize_row(Format::kFp8E4M3, {448, -448, 17, 19, 0x1p-9, 0x1p-10, -0x1p-11}).codes,
              ElementsAre(0x7e, 0xfe, 0x58, 0x5a, 1, 0, 0));
  EXPECT_THAT(quantize_row(Format::kFp8E5M2, {57344, 4.5, 5.5, -0x1p-17}).codes,
              ElementsAre(0x7b, 0x44, 0x46, 0));
}

TEST(Reference, SixteenBitTypesKeepWhatFits) {
  EXPECT_THAT(quantize_row(Format::kFp16, {1, -0.0, 0x1p-24, 65504}).codes,
              ElementsAre(0x3c00, 0x8000, 1, 0x7bff));
  EXPECT_THAT(quantize_row(Format::kBf16, {1, -2, 0x1p-133}).codes, ElementsAre(0x3f80, 0xc000, 1));
}

TEST(Reference, EveryCodeOfAnInteger) {
  for (Format format : {Format::kSymInt4, Format::kAsymInt4, Format::kSymInt5, Format::kAsymInt5,
                        Format::kSymInt8}) {
    const FormatInfo& info = format_info(format);
    for (int code = info.code_min; code <= info.code_max; ++code) {
      EXPECT_EQ(reference::code_value(info, static_cast<std::uint32_t>(code)),
                code - info.zero_point);
      EXPECT_EQ(reference::nearest_code(info, static_cast<float>(code - info.zero_point)),
                static_cast<std::uint32_t>(code));
    }
  }
}

TEST(ExponentRule, ZeroInsideTheNormalRangeAndItsEdges) {
  const double edge = 0x1p-14;  // smallest normal fp16
  EXPECT_EQ(quantize_row(Format::kSymInt4, {-8 * edge, 0}).exponent, 0);
  EXPECT_NE(quantize_row(Format::kSymInt4, {-7.99 * edge, 0}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kSymInt4, {8 * 65519.0, 0}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kSymInt4, {8 * 65520.0, 0}).exponent, 1);  // scale 2^15.99 -> 15
  EXPECT_EQ(quantize_row(Format::kSymInt4, {0, 0}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kNf4, {edge}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kNf4, {edge / 2}).exponent, -15 - 14);
}

TEST(ExponentRule, MinimaCount) {
  EXPECT_EQ(quantize_row(Format::kAsymInt4, {1e-6, 1.0}).exponent, -4 - 14);  // 1/15 is largest
  EXPECT_EQ(quantize_row(Format::kAsymInt4, {0.0, 1.0}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kAsymInt4, {1e6, 1e6 + 1}).exponent, 19 - 14);
}

TEST(ExponentRule, RowScalesAndSixteenBits) {
  EXPECT_EQ(quantize_row(Format::kFp8E4M3, {1e-30, 3e38}).exponent, 0);
  EXPECT_NE(quantize_row(Format::kFp8E4M3, {1e-37}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kFp16, {1e-30, 65519}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kFp16, {65520}).exponent, 1);
  EXPECT_EQ(quantize_row(Format::kBf16, {3.3e38}).exponent, 0);
  EXPECT_EQ(quantize_row(Format::kBf16, {3.4028234663852886e38}).exponent, 1);
}

TEST(ExponentRule, ExtremeMatricesSurviveTheRoundTrip) {
  for (const FormatInfo& info : formats()) {
    for (double scale : {0x1p-149, 1e-40, 1e-20, 1e20, 1e38}) {
      if (info.scale_kind == ScaleKind::kNone && scale < 1) continue;  // 16-bit floats end there
      const double top = std::min(3.0 * scale, 3.4e38);
      const Quantized q = quantize_row(info.format, {-top, top, 0});
      // The largest magnitudes come back within the coarsest code step of any format.
      const double exact = static_cast<float>(top);
      EXPECT_NEAR(q.weights[0], -exact, 0.14 * exact) << info.name << " " << scale;
      EXPECT_NEAR(q.weights[1], exact, 0.14 * exact) << info.name << " " << scale;
    }
  }
}

TEST(ReferenceLinear, IsTheSumOverExactWeightsRoundedOnce) {
  for (const FormatInfo& info : formats()) {
    const std::int64_t m = 3, n = 18, k = 70;
    const Layout layout = make_layout(info.format, n, k);
    Matrix weight(DType::kFloat32, n, k), x(DType::kFloat32, m, k), bias(DType::kFloat16, 1, n);
    weight.fill_random(1);
    x.fill_random(2, 1.0);
    bias.fill_random(3, 1.0);
    PackedBuffer packed(layout);
    const int exponent = reference::quantize(weight.view(), layout, packed.span());
    Matrix w(DType::kFloat64, n, k), out(DType::kFloat32, m, n);
    reference::dequantize(packed.span(), layout, exponent, w.mutable_view());
    LinearArgs args{x.at(0, 0),
                    DType::kFloat32,
                    k,
                    packed.span().data(),
                    layout,
                    exponent,
                    bias.at(0, 0),
                    DType::kFloat16,
                    out.at(0, 0),
                    DType::kFloat32,
                    n,
                    m,
                    Precision::kAuto};
    reference::linear(args);
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (std::int64_t l = 0; l < k; ++l) sum += x.get(i, l) * w.get(j, l);
        ASSERT_EQ(out.get(i, j), static_cast<float>(sum + bias.get(0, j))) << info.name;
      }
    }
    args.x_dtype = DType::kFloat64;
    try {
      reference::linear(args);
      FAIL() << "float64 activations were accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kType);
    }
  }
}

}  // namespace
}  // namespace lowbit::testing
