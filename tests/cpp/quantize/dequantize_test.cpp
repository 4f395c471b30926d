// The public dequantizers against the reference, on random packed bytes: every code point, every
// scale, infinite and NaN ones included.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lowbit/error.h"
#include "lowbit/linear.h"
#include "quantize/matrices.h"

namespace lowbit::testing {
namespace {

using ::testing::HasSubstr;

void fill_bytes(PackedBuffer* packed, std::uint32_t seed) {
  Random random(seed);
  for (std::byte& b : packed->span()) b = static_cast<std::byte>(random.bits() >> 24);
}

void expect_equal(Matrix& got, Matrix& expected) {
  for (std::int64_t i = 0; i < got.rows; ++i) {
    for (std::int64_t j = 0; j < got.cols; ++j) {
      if (std::isnan(expected.get(i, j))) {
        ASSERT_TRUE(std::isnan(got.get(i, j))) << "[" << i << ", " << j << "]";
      } else {
        ASSERT_EQ(got.get(i, j), expected.get(i, j)) << "[" << i << ", " << j << "]";
      }
    }
  }
}

class DequantizeEveryFormat : public ::testing::TestWithParam<int> {
 protected:
  const FormatInfo& info() const { return formats()[static_cast<std::size_t>(GetParam())]; }
};

TEST_P(DequantizeEveryFormat, AllRowsAndSingleRowsEqualTheReference) {
  struct Shape {
    std::int64_t n, k;
  };
  for (int group : group_sizes(info())) {
    for (const Shape& shape : {Shape{16, 256}, Shape{3, 33}, Shape{37, 300}, Shape{1, 7}}) {
      const Layout layout = make_layout(info().format, shape.n, shape.k, group);
      PackedBuffer packed(layout);
      fill_bytes(&packed, static_cast<std::uint32_t>(shape.k));
      for (int exponent : {0, 3, -21, 100, -100, 101, -140}) {
        for (DType dtype : kAllDTypes) {
          SCOPED_TRACE(::testing::Message()
                       << info().name << " g" << group << " " << shape.n << "x" << shape.k << " e"
                       << exponent << " " << dtype_name(dtype));
          Matrix expected(dtype, shape.n, shape.k), got(dtype, shape.n, shape.k);
          reference::dequantize(packed.span(), layout, exponent, expected.mutable_view());
          dequantize(packed.span(), layout, exponent, got.mutable_view());
          expect_equal(got, expected);
          if (HasFatalFailure()) return;

          std::vector<std::int64_t> rows = {shape.n - 1, 0, shape.n / 2};
          Matrix some(dtype, 3, shape.k), want(dtype, 3, shape.k);
          for (int i = 0; i < 3; ++i) {
            for (std::int64_t j = 0; j < shape.k; ++j) {
              want.set(i, j, expected.get(rows[static_cast<std::size_t>(i)], j));
            }
          }
          dequantize_rows(packed.span(), layout, exponent, rows, some.mutable_view());
          expect_equal(some, want);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(DequantizeEveryFormat, StridedOutputsEqualContiguousOnesAndTouchNothingElse) {
  const std::int64_t n = 18, k = 45;
  const Layout layout = make_layout(info().format, n, k);
  PackedBuffer packed(layout);
  fill_bytes(&packed, 4);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Matrix plain(dtype, n, k);
    dequantize(packed.span(), layout, 0, plain.mutable_view());
    Matrix wide(dtype, n, k, k + 3, 1), transposed(dtype, n, k, 1, n);
    for (unsigned char& byte : wide.storage) byte = 0x3c;
    dequantize(packed.span(), layout, 0, wide.mutable_view());
    dequantize(packed.span(), layout, 0, transposed.mutable_view());
    expect_equal(wide, plain);
    expect_equal(transposed, plain);
    for (std::int64_t i = 0; i + 1 < n; ++i) {
      for (std::int64_t j = k; j < k + 3; ++j) EXPECT_EQ(*wide.at(i, j), 0x3c);
    }
  }
}

// What comes out of a 16-bit matrix went in; elsewhere nothing is further off than half a step.
TEST_P(DequantizeEveryFormat, RoundTripStaysWithinHalfAStep) {
  const Layout layout = make_layout(info().format, 20, 200);
  Matrix weight(DType::kFloat32, 20, 200), back(DType::kFloat32, 20, 200);
  weight.fill_random(12);
  PackedBuffer packed(layout);
  const int exponent = quantize(weight.view(), layout, packed.span());
  EXPECT_EQ(exponent, 0);
  dequantize(packed.span(), layout, exponent, back.mutable_view());
  double error = 0, power = 0;
  for (std::int64_t i = 0; i < 20; ++i) {
    for (std::int64_t j = 0; j < 200; ++j) {
      error += std::pow(weight.get(i, j) - back.get(i, j), 2);
      power += std::pow(weight.get(i, j), 2);
    }
  }
  // Twice the error of normal weights (4 bits about 10 %, each bit halves it).
  const double limit = info().bits == 3   ? 0.45
                       : info().bits == 4 ? 0.25
                       : info().bits == 5 ? 0.12
                       : info().bits == 8 ? (info().code_kind == CodeKind::kFloat ? 0.11 : 0.02)
                       : info().format == Format::kFp16 ? 0.0005
                                                        : 0.004;
  EXPECT_LT(std::sqrt(error / power), limit) << info().name;
}

INSTANTIATE_TEST_SUITE_P(Formats, DequantizeEveryFormat, ::testing::Range(0, kFormatCount),
                         [](const ::testing::TestParamInfo<int>& info) {
                           return std::string(formats()[static_cast<std::size_t>(info.param)].name);
                         });

TEST(DequantizeRows, ARowOutsideTheMatrixIsNamed) {
  const Layout layout = make_layout(Format::kNf4, 20, 64);
  PackedBuffer packed(layout);
  Matrix out(DType::kFloat32, 2, 64);
  for (std::int64_t bad : {std::int64_t{20}, std::int64_t{-1}, std::int64_t{1} << 60}) {
    try {
      dequantize_rows(packed.span(), layout, 0, std::vector<std::int64_t>{3, bad},
                      out.mutable_view());
      FAIL() << "expected an error for row " << bad;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kValue);
      EXPECT_THAT(error.what(), HasSubstr("rows from 0 to 19, got " + std::to_string(bad)));
    }
  }
}

}  // namespace
}  // namespace lowbit::testing
