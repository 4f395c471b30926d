// The public quantizer against the reference: equal bytes for every format, shape, dtype, stride,
// thread count and instruction set.
#include "lowbit/quantize.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "lowbit/dispatch.h"
#include "lowbit/error.h"
#include "lowbit/linear.h"
#include "quantize/matrices.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace lowbit::testing {
namespace {

using ::testing::HasSubstr;

// Real threads, more or fewer than tasks, started last task first.
class TestThreads final : public Threads {
 public:
  explicit TestThreads(int count) : count_(count) {}
  int count() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    std::vector<std::thread> threads;
    for (std::int64_t i = tasks - 1; i >= 0; --i) threads.emplace_back([&body, i] { body(i); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int count_;
};

struct Shape {
  std::int64_t n, k;
};
// Rows below, at and above a tile; inputs below, at and above a block, a vector and a group.
constexpr Shape kShapes[] = {{1, 1},   {3, 15},  {16, 32}, {17, 33},
                             {2, 100}, {16, 64}, {5, 257}, {33, 320}};

// The same elements, columns contiguous.
Matrix transposed_copy(Matrix& weight) {
  Matrix copy(weight.dtype, weight.rows, weight.cols, 1, weight.rows);
  for (std::int64_t i = 0; i < weight.rows; ++i) {
    for (std::int64_t j = 0; j < weight.cols; ++j) {
      std::memcpy(copy.at(i, j), weight.at(i, j), dtype_bytes(weight.dtype));
    }
  }
  return copy;
}

// From rows and from columns.
void expect_same_bytes(Matrix& weight, const Layout& layout,
                       const Threads& threads = serial_threads()) {
  PackedBuffer expected(layout, 0x11);
  const int exponent = reference::quantize(weight.view(), layout, expected.span());
  Matrix columns = transposed_copy(weight);
  for (Matrix* source : {&weight, &columns}) {
    PackedBuffer got(layout, 0x22);
    EXPECT_EQ(quantize(source->view(), layout, got.span(), threads), exponent);
    ASSERT_EQ(got.span().size(), expected.span().size());
    for (std::size_t i = 0; i < expected.span().size(); ++i) {
      ASSERT_EQ(std::to_integer<int>(got.span()[i]), std::to_integer<int>(expected.span()[i]))
          << "byte " << i << " of " << expected.span().size()
          << (source == &columns ? ", from columns" : "");
    }
  }
}

class QuantizeEveryFormat : public ::testing::TestWithParam<int> {
 protected:
  const FormatInfo& info() const { return formats()[static_cast<std::size_t>(GetParam())]; }
};

TEST_P(QuantizeEveryFormat, BytesEqualTheReferenceForEveryShapeGroupAndDtype) {
  for (int group : group_sizes(info())) {
    for (const Shape& shape : kShapes) {
      const Layout layout = make_layout(info().format, shape.n, shape.k, group);
      for (DType dtype : kAllDTypes) {
        SCOPED_TRACE(::testing::Message() << info().name << " g" << group << " " << shape.n << "x"
                                          << shape.k << " " << dtype_name(dtype));
        Matrix weight(dtype, shape.n, shape.k);
        weight.fill_random(static_cast<std::uint32_t>(shape.n * 1000 + shape.k));
        expect_same_bytes(weight, layout);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Integer multiples of a power of two: the quotients hit rounding ties again and again.
TEST_P(QuantizeEveryFormat, TiesEqualTheReference) {
  const Layout layout = make_layout(info().format, 32, 192);
  for (int steps : {7, 16, 24, 127, 254, 448, 2032}) {
    Matrix weight(DType::kFloat32, layout.n, layout.k);
    Random random(static_cast<std::uint32_t>(steps));
    weight.fill([&](std::int64_t, std::int64_t) {
      const auto span = static_cast<std::uint32_t>(2 * steps + 1);
      return (static_cast<int>(random.bits() >> 8 % span) % steps) * 0.0078125;
    });
    SCOPED_TRACE(::testing::Message() << info().name << " steps " << steps);
    expect_same_bytes(weight, layout);
  }
}

// Quotients on and next to every midpoint between neighbouring values of the format, under scales
// of one bit and of all eleven: kernels multiply by a reciprocal in two parts instead of dividing.
TEST_P(QuantizeEveryFormat, NeighboursOfEveryMidpointEqualTheReference) {
  std::vector<float> t;
  const auto add = [&t](double value) {
    const auto f = static_cast<float>(value);
    for (float x : {std::nextafter(f, -HUGE_VALF), f, std::nextafter(f, HUGE_VALF)}) t.push_back(x);
  };
  if (info().code_kind == CodeKind::kTable) {
    for (std::size_t i = 0; i + 1 < info().codebook.size(); ++i) {
      add((info().codebook[i] + info().codebook[i + 1]) / 2);
      add(info().codebook[i]);
    }
  } else if (info().bits == 8 && info().code_kind == CodeKind::kFloat) {
    const FloatKind kind = info().format == Format::kFp8E4M3 ? kFp8E4M3Kind : kFp8E5M2Kind;
    for (std::uint32_t code = 0; code < kind.largest(); ++code) {
      add((decode_float(kind, code) + decode_float(kind, code + 1)) / 2);
      add(-(decode_float(kind, code) + decode_float(kind, code + 1)) / 2);
    }
  } else {
    for (int i = -520; i <= 520; ++i) add(i / 4.0);
  }
  // Each scale exactly: the first weight of every group (row) is the one that decides it. A row's
  // is any float32: mantissas that leave a quotient next to a midpoint of two floats, random ones,
  // and magnitudes on both sides of those that kernels divide by.
  std::vector<double> scales = {1};
  if (info().scale_kind == ScaleKind::kRow) {
    for (double mantissa : {0x1.fffffep0, 0x1.fffffcp0, 0x1.fffffap0, 0x1.000002p0, 0x1.000006p0,
                            0x1.800002p0, 0x1.7ffffep0, 0x1.40000ap0, 0x1.555556p0}) {
      scales.push_back(mantissa);
    }
    Random random(17);
    for (int i = 0; i < 40; ++i) scales.push_back(1 + (random.bits() >> 9) * 0x1p-23);
    for (int exponent : {-149, -147, -140, -130, -126, -100, -61, -60, -59, 59, 60, 61, 100}) {
      scales.push_back(std::ldexp(0x1.92492p0, exponent));
    }
  }
  if (info().grouped()) {
    for (int mantissa = 1025; mantissa < 2048; mantissa += 31) scales.push_back(mantissa / 1024.0);
    scales.push_back(2047 / 1024.0);
  }
  const int group = info().grouped() ? 32 : static_cast<int>(t.size()) + 1;
  const std::int64_t per_row = group - 1;
  const auto rows = (static_cast<std::int64_t>(t.size()) + per_row - 1) / per_row;
  const double anchor = info().format == Format::kFp16 || info().format == Format::kBf16
                            ? 1
                            : (info().zero_point == 8 || info().zero_point == 16 ? -1 : 1) *
                                  static_cast<double>(info().value_max);
  // The minimum is zero, or it would take part in the scale.
  const double least = info().scale_kind == ScaleKind::kGroupMinimum ? 0 : -std::fabs(anchor);
  for (double scale : scales) {
    SCOPED_TRACE(scale);
    Matrix weight(DType::kFloat32, rows, group);
    weight.fill([&](std::int64_t i, std::int64_t j) {
      const auto at = static_cast<std::size_t>(i * per_row + j - 1);
      if (j == 0) return anchor * scale;
      if (at >= t.size() || t[at] < least || t[at] > std::fabs(anchor)) return 0.0;
      return t[at] * scale;
    });
    expect_same_bytes(weight, make_layout(info().format, rows, group, info().grouped() ? 32 : 0));
    if (HasFatalFailure()) return;
  }
}

TEST_P(QuantizeEveryFormat, UnusualGroupsEqualTheReference) {
  const double kTiny = 0x1p-149;  // the smallest float32
  const std::pair<const char*, std::function<double(int, Random&)>> kinds[] = {
      {"zero", [](int, Random&) { return 0.0; }},
      {"minus zero", [](int i, Random&) { return i % 3 == 0 ? 0.0 : -0.0; }},
      {"constant", [](int, Random&) { return 0.3125; }},
      {"negative constant", [](int, Random&) { return -0.7; }},
      {"subnormal", [=](int, Random& r) { return kTiny * (r.bits() >> 12); }},
      {"smallest", [=](int i, Random&) { return i % 5 == 0 ? kTiny : -kTiny; }},
      {"huge", [](int, Random& r) { return 3e38 * (2 * r.uniform() - 1); }},
      {"largest", [](int i, Random&) { return i % 2 == 0 ? 3.4028234663852886e38 : -1.0; }},
      {"both ends", [](int i, Random&) { return (i % 2 == 0 ? 1 : -1) * 3.4028234663852886e38; }},
      {"tiny", [](int, Random& r) { return 1e-30 * r.weight(); }},
      {"all scales",
       [](int, Random& r) {
         return std::ldexp(r.weight(), static_cast<int>(r.bits() >> 24) - 140);
       }},
      {"above half's range", [](int, Random& r) { return 7e4 * r.weight(); }},
      {"positive", [](int, Random& r) { return 1 + r.uniform(); }},
      {"almost constant", [](int, Random& r) { return 1 + 1e-7 * r.uniform(); }},
      {"one weight", [](int i, Random&) { return i == 9 ? 1e-3 : 0.0; }},
  };
  for (const auto& [name, value] : kinds) {
    for (const Shape& shape : {Shape{16, 128}, Shape{19, 75}}) {
      Random random(7);
      Matrix weight(DType::kFloat32, shape.n, shape.k);
      weight.fill([&, v = &value](std::int64_t i, std::int64_t j) {
        return (*v)(static_cast<int>(i * 7 + j), random);
      });
      SCOPED_TRACE(::testing::Message() << info().name << " " << name);
      expect_same_bytes(weight, make_layout(info().format, shape.n, shape.k));
      if (HasFatalFailure()) return;
      // The same kind in one row among ordinary ones.
      Matrix mixed(DType::kFloat32, shape.n, shape.k);
      mixed.fill_random(3);
      for (std::int64_t j = 0; j < shape.k; ++j) mixed.set(4, j, weight.get(4, j));
      expect_same_bytes(mixed, make_layout(info().format, shape.n, shape.k));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(QuantizeEveryFormat, StridedSourcesGiveTheBytesOfTheirCopies) {
  struct Strides {
    const char* name;
    std::int64_t row, col;
  };
  const std::int64_t n = 37, k = 81;
  for (const Strides& s : {Strides{"padded rows", k + 5, 1}, Strides{"transposed", 1, n},
                           Strides{"transposed, padded", 1, n + 3}, Strides{"expanded rows", 0, 1},
                           Strides{"expanded columns", 1, 0}, Strides{"every other", 2 * k, 2},
                           Strides{"reversed rows", -k, 1}, Strides{"reversed columns", k, -1}}) {
    for (DType dtype : kAllDTypes) {
      Matrix strided(dtype, n, k, s.row, s.col);
      strided.fill_random(11);
      Matrix copy(dtype, n, k);
      copy.fill([&](std::int64_t i, std::int64_t j) { return strided.get(i, j); });
      const Layout layout = make_layout(info().format, n, k);
      PackedBuffer a(layout, 1), b(layout, 2);
      EXPECT_EQ(quantize(strided.view(), layout, a.span()),
                quantize(copy.view(), layout, b.span()));
      EXPECT_TRUE(a == b) << info().name << " " << s.name << " " << dtype_name(dtype);
    }
  }
}

// Columns of more tiles than are taken together, cut into runs that end within them, and rows left
// over; inputs of one chunk and of several, with and without a rest; and, with a scale per row, of
// more than fits the copy of a whole strip.
TEST_P(QuantizeEveryFormat, TallTransposedSourcesGiveTheBytesOfTheirCopies) {
  std::vector<Shape> shapes = {{75 * 16 + 5, 40}, {19 * 16 + 1, 200}, {12 * 16, 256}};
  if (info().scale_kind == ScaleKind::kRow) shapes.push_back({100, 5000});
  for (const Shape& shape : shapes) {
    const Layout layout = make_layout(info().format, shape.n, shape.k);
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      Matrix copy(dtype, shape.n, shape.k);
      copy.fill_random(12);
      Matrix columns = transposed_copy(copy);
      PackedBuffer expected(layout, 1);
      const int exponent = quantize(copy.view(), layout, expected.span());
      for (int threads : {1, 2, 3}) {
        PackedBuffer got(layout, 2);
        EXPECT_EQ(quantize(columns.view(), layout, got.span(), TestThreads(threads)), exponent);
        EXPECT_TRUE(got == expected) << info().name << " " << dtype_name(dtype) << " " << shape.n
                                     << "x" << shape.k << " " << threads;
      }
    }
  }
}

TEST_P(QuantizeEveryFormat, BytesDoNotDependOnTheThreadCount) {
  for (double scale : {0.05, 1e-12}) {  // the second needs an exponent, hence two passes
    Matrix weight(DType::kBFloat16, 150, 96);
    weight.fill_random(5, scale);
    const Layout layout = make_layout(info().format, 150, 96);
    PackedBuffer expected(layout, 1);
    const int exponent = quantize(weight.view(), layout, expected.span());
    for (int count : {2, 3, 7, 40}) {
      PackedBuffer got(layout, 2);
      EXPECT_EQ(quantize(weight.view(), layout, got.span(), TestThreads(count)), exponent);
      EXPECT_TRUE(got == expected) << info().name << " with " << count << " threads";
    }
  }
}

TEST_P(QuantizeEveryFormat, BytesDoNotDependOnTheInstructionSet) {
  const std::string in_force(active_isa());
  for (double scale : {0.05, 1e-12}) {
    Matrix weight(DType::kFloat32, 21, 150);
    weight.fill_random(6, scale);
    const Layout layout = make_layout(info().format, 21, 150);
    PackedBuffer expected(layout, 1);
    force_isa("scalar");
    const int exponent = quantize(weight.view(), layout, expected.span());
    for (std::string_view isa : available_isas()) {
      force_isa(isa);
      PackedBuffer got(layout, 2);
      EXPECT_EQ(quantize(weight.view(), layout, got.span()), exponent);
      EXPECT_TRUE(got == expected) << info().name << " on " << isa;
    }
  }
  force_isa(in_force);
}

#if defined(__SSE2__)
// Hosts switch subnormals off (torch.set_flush_denormal, libraries linked with fast math) or change
// the rounding mode. Neither may reach the bytes, and both must be as before afterwards.
TEST_P(QuantizeEveryFormat, BytesDoNotDependOnTheFloatEnvironment) {
  Matrix weight(DType::kFloat32, 16, 64);
  Random random(8);
  weight.fill([&](std::int64_t, std::int64_t) { return 0x1p-149 * (random.bits() >> 14); });
  const Layout layout = make_layout(info().format, 16, 64);
  PackedBuffer expected(layout, 1), got(layout, 2);
  const int exponent = quantize(weight.view(), layout, expected.span());
  const unsigned before = _mm_getcsr();
  const unsigned hostile = 0xffc0;  // flush to zero, round toward zero, denormals are zero
  _mm_setcsr(hostile);
  const int exponent_again = quantize(weight.view(), layout, got.span());
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(exponent_again, exponent);
  EXPECT_TRUE(got == expected) << info().name;
  EXPECT_EQ(after & 0xffc0, hostile & 0xffc0);
}
#endif

// A tile of few rows: for 16-bit types the largest weight was once looked for in as many columns as
// there were rows, so the exponent was wrong and infinities passed.
TEST_P(QuantizeEveryFormat, EveryColumnOfASingleRowCounts) {
  const Layout layout = make_layout(info().format, 1, 64);
  for (std::int64_t column = 0; column < 64; ++column) {
    Matrix weight(DType::kFloat32, 1, 64);
    weight.fill_random(4);
    weight.set(0, column, 1e7);
    expect_same_bytes(weight, layout);
    weight.set(0, column, HUGE_VAL);
    PackedBuffer packed(layout);
    EXPECT_THROW(quantize(weight.view(), layout, packed.span()), Error) << column;
  }
}

TEST_P(QuantizeEveryFormat, NonFiniteWeightsRaiseWithTheirPlace) {
  for (DType dtype : kAllDTypes) {
    for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      for (const Shape& place : {Shape{0, 0}, Shape{20, 70}, Shape{7, 63}, Shape{16, 3}}) {
        Matrix weight(dtype, 21, 71);
        weight.fill_random(9);
        weight.set(place.n, place.k, bad);
        weight.set(20, 70, bad);  // a later one is not the one to name
        const Layout layout = make_layout(info().format, 21, 71);
        PackedBuffer packed(layout);
        Matrix columns = transposed_copy(weight);
        for (Matrix* source : {&weight, &columns}) {
          try {
            quantize(source->view(), layout, packed.span());
            FAIL() << info().name << ": expected an error";
          } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::kValue);
            EXPECT_THAT(error.what(), HasSubstr("weight[" + std::to_string(place.n) + ", " +
                                                std::to_string(place.k) + "]"));
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, QuantizeEveryFormat, ::testing::Range(0, kFormatCount),
                         [](const ::testing::TestParamInfo<int>& info) {
                           return std::string(formats()[static_cast<std::size_t>(info.param)].name);
                         });

class QuantizeFp8 : public ::testing::TestWithParam<Format> {};

// Every weight of 16 bits that a row can hold below its largest, in order, for largest weights of
// all mantissas: fp8 kernels look codes up by mantissa and treat what comes out subnormal apart.
TEST_P(QuantizeFp8, EveryWeightOf16BitsEqualsTheReference) {
  struct Case {
    DType dtype;
    int mantissa_bits;
    std::vector<int> exponents;  // biased, of the largest weights
  };
  const Case cases[] = {{DType::kBFloat16, 7, {127 - 52, 127 - 4, 127, 127 + 60, 254}},
                        {DType::kFloat16, 10, {0, 1, 6, 11, 15, 30}}};
  for (const Case& c : cases) {
    const int mantissas = 1 << c.mantissa_bits;
    for (const int exponent : c.exponents) {
      SCOPED_TRACE(::testing::Message() << dtype_name(c.dtype) << " exponent " << exponent);
      // Down to where everything is zero.
      const int first = std::max(0, exponent - 40) * mantissas;
      const std::int64_t rows = c.dtype == DType::kBFloat16 ? 128 : 48;
      const std::int64_t cols = (exponent + 1) * mantissas - first + 1;
      Matrix weight(c.dtype, rows, cols);
      Random random(static_cast<std::uint32_t>(exponent));
      for (std::int64_t i = 0; i < rows; ++i) {
        const int mantissa = c.dtype == DType::kBFloat16
                                 ? static_cast<int>(i)
                                 : (i == 0 ? 1023 : static_cast<int>(random.bits() >> 22));
        const int largest = exponent * mantissas + mantissa;
        for (std::int64_t j = 0; j < cols; ++j) {
          const int magnitude = std::min(largest, first + static_cast<int>(j));
          const auto bits =
              static_cast<std::uint16_t>(magnitude | (random.bits() >> 31 != 0 ? 0x8000 : 0));
          std::memcpy(weight.at(i, j), &bits, 2);
        }
      }
      expect_same_bytes(weight, make_layout(GetParam(), rows, cols));
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, QuantizeFp8,
                         ::testing::Values(Format::kFp8E4M3, Format::kFp8E5M2),
                         [](const auto& info) {
                           return std::string(format_info(info.param).name);
                         });

TEST(Quantize, EmptyMatricesHaveNoWeights) {
  for (const FormatInfo& info : formats()) {
    for (const Shape& shape : {Shape{0, 0}, Shape{0, 5}, Shape{5, 0}}) {
      Matrix weight(DType::kFloat32, shape.n, shape.k);
      const Layout layout = make_layout(info.format, shape.n, shape.k);
      PackedBuffer packed(layout);
      EXPECT_EQ(quantize(weight.view(), layout, packed.span()), 0);
      for (std::byte b : packed.span()) EXPECT_EQ(b, std::byte{0});
      dequantize(packed.span(), layout, 0, weight.mutable_view());
    }
  }
}

template <typename Function>
std::string error_text(ErrorCode code, const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  ADD_FAILURE() << "expected an error";
  return "";
}

TEST(Quantize, WrongArgumentsAreNamed) {
  const Layout layout = make_layout(Format::kSymInt4, 16, 64);
  PackedBuffer packed(layout);
  Matrix weight(DType::kFloat32, 16, 64);
  Matrix other(DType::kFloat32, 16, 63);
  EXPECT_THAT(error_text(ErrorCode::kValue, [&] { quantize(other.view(), layout, packed.span()); }),
              HasSubstr("expected a weight of shape [16, 64], got [16, 63]"));
  EXPECT_THAT(error_text(ErrorCode::kValue,
                         [&] { quantize(weight.view(), layout, packed.span().first(64)); }),
              HasSubstr("packs into 576 bytes, got a buffer of 64"));
  MatrixView view = weight.view();
  view.dtype = static_cast<DType>(9);
  EXPECT_THAT(error_text(ErrorCode::kType, [&] { quantize(view, layout, packed.span()); }),
              HasSubstr("float32, float16, bfloat16 or float64"));
  Layout broken = layout;
  broken.tile_bytes += 64;
  EXPECT_THAT(
      error_text(ErrorCode::kValue, [&] { quantize(weight.view(), broken, packed.span()); }),
      HasSubstr("make_layout"));
  const Layout bigger = make_layout(Format::kSymInt4, 16, 128);
  PackedBuffer unaligned(bigger);
  EXPECT_THAT(
      error_text(ErrorCode::kValue,
                 [&] { quantize(weight.view(), layout, unaligned.span().subspan(8, 576)); }),
      HasSubstr("multiple of 64"));
}

TEST(FirstNonfinite, FindsTheFirstInRowOrderForEveryDtypeAndStride) {
  const std::int64_t n = 50, k = 70;
  struct Strides {
    std::int64_t row, col;
  };
  for (const Strides& s :
       {Strides{k, 1}, Strides{k + 9, 1}, Strides{1, n}, Strides{2 * k, 2}, Strides{-k, 1}}) {
    for (DType dtype : kAllDTypes) {
      Matrix matrix(dtype, n, k, s.row, s.col);
      matrix.fill_random(1);
      const auto find = [&](int threads) {
        return first_nonfinite(matrix.view(), TestThreads(threads));
      };
      EXPECT_EQ(find(1), -1);
      matrix.set(44, 3, -HUGE_VAL);
      EXPECT_EQ(find(2), 44 * k + 3);
      matrix.set(30, 69, std::nan(""));
      EXPECT_EQ(find(3), 30 * k + 69);
      matrix.set(30, 0, HUGE_VAL);
      EXPECT_EQ(find(1), 30 * k);
      matrix.set(0, 0, HUGE_VAL);
      EXPECT_EQ(find(5), 0);
    }
  }
}

TEST(FirstNonfinite, EveryPositionOfALongRow) {
  for (DType dtype : kAllDTypes) {
    Matrix matrix(dtype, 1, 1200);
    matrix.fill_random(2);
    for (std::int64_t i = 0; i < 1200; ++i) {
      const double saved = matrix.get(0, i);
      matrix.set(0, i, i % 2 == 0 ? HUGE_VAL : std::nan(""));
      ASSERT_EQ(first_nonfinite(matrix.view()), i);
      matrix.set(0, i, saved);
    }
  }
}

TEST(FirstNonfinite, Float64BeyondFloat32CountsAndTheLargestFloat32DoesNot) {
  Matrix matrix(DType::kFloat64, 1, 3);
  matrix.set(0, 0, 3.4028234663852886e38);
  matrix.set(0, 1, 3.4028235677973366e38);  // half a unit past it: rounds to infinity
  EXPECT_EQ(first_nonfinite(matrix.view()), 1);
  matrix.set(0, 1, std::nextafter(3.4028235677973366e38, 0));
  EXPECT_EQ(first_nonfinite(matrix.view()), -1);
}

}  // namespace
}  // namespace lowbit::testing
