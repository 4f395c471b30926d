// lowbit::linear against exact sums in float64, for every format, precision and instruction set
// that this machine has. Tolerances are the bounds of docs/numerics.md, nothing looser.
#include "lowbit/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cpu/generic/normal_float_pair.h"
#include "cpu/linear_driver.h"
#include "linear/random_problem.h"
#include "lowbit/dispatch.h"
#include "lowbit/error.h"

namespace lowbit {
namespace {

// What docs/numerics.md says of their entries, and what error_bound takes for granted.
template <Format F>
double largest_pair_error() {
  using Pair = cpu::NormalFloatPair<F>;
  const auto codebook = format_info(F).codebook;
  EXPECT_EQ(std::size(Pair::first), codebook.size());
  double largest = 0;
  for (std::size_t i = 0; i < codebook.size(); ++i) {
    const double value = static_cast<double>(Pair::kFirst) * Pair::first[i] +
                         static_cast<double>(Pair::kSecond) * Pair::second[i];
    const double expected = static_cast<double>(codebook[i]);
    if (expected == 0) {
      EXPECT_EQ(value, 0);
    }
    largest = std::max(largest, std::fabs(value - expected));
  }
  return largest;
}

TEST(NormalFloatPair, TwoBytesAreTheCodebook) {
  EXPECT_LE(largest_pair_error<Format::kNf3>(), std::ldexp(1.7, -24));
  EXPECT_LE(largest_pair_error<Format::kNf4>(), std::exp2(-18.59));
}

using testing::error_bound;
using testing::Floats2d;
using testing::linear_args;
using testing::random_weights;
using testing::Weights;

// Real threads, made anew for each region: slow and simple.
class SpawnThreads final : public Threads {
 public:
  explicit SpawnThreads(int count) : count_(count) {}
  int count() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    std::vector<std::thread> threads;
    for (std::int64_t i = 0; i < tasks; ++i) threads.emplace_back([&body, i] { body(i); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int count_;
};

// Every level of this machine, or the one that the environment forces.
std::vector<std::string> levels() {
  std::vector<std::string> names;
  if (const char* forced = std::getenv("LOWBIT_FORCE_ISA"); forced != nullptr && *forced != 0) {
    names.emplace_back(forced);
    return names;
  }
  for (std::string_view name : available_isas()) names.emplace_back(name);
  return names;
}

class Linear : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_isa(GetParam()); }
  void TearDown() override { force_isa(""); }
};

constexpr Precision kPrecisions[] = {Precision::kFp32, Precision::kBf16, Precision::kInt8,
                                     Precision::kAuto};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void expect_within_bound(const Floats2d& x, const Weights& w, const Floats2d* bias,
                         const Floats2d& out, Precision precision) {
  const std::vector<double> values = x.values();
  int reported = 0;
  for (std::int64_t t = 0; t < x.rows && reported < 3; ++t) {
    for (std::int64_t n = 0; n < w.layout.n && reported < 3; ++n) {
      double exact;
      const double bound = error_bound(values, w, bias, precision, out.dtype, t, n, &exact);
      const double error = std::fabs(out.get(t, n) - exact);
      if (!(error <= bound)) {
        ++reported;
        ADD_FAILURE() << format_info(w.layout.format).name << " precision "
                      << static_cast<int>(precision) << " m " << x.rows << " n " << w.layout.n
                      << " k " << w.layout.k << " g " << w.layout.group_size << " x dtype "
                      << static_cast<int>(x.dtype) << " out dtype " << static_cast<int>(out.dtype)
                      << ": out[" << t << "][" << n << "] = " << out.get(t, n) << ", exact "
                      << exact << ", error " << error << ", bound " << bound;
      }
    }
  }
}

TEST_P(Linear, StaysWithinTheBounds) {
  std::mt19937_64 rng(1);
  const std::int64_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 18, 31, 33, 35, 47};
  for (const FormatInfo& info : formats()) {
    for (Precision precision : kPrecisions) {
      for (std::int64_t m : tokens) {
        const std::int64_t n = 1 + static_cast<std::int64_t>(rng() % 70);
        const std::int64_t k = 1 + static_cast<std::int64_t>(rng() % 600);
        const int group = info.grouped() ? kGroupSizes[rng() % 4] : 0;
        const Weights w =
            random_weights(info.format, n, k, group, rng, static_cast<int>(rng() % 3) * 5 - 5);
        Floats2d x(kDTypes[rng() % 3], m, k, static_cast<std::int64_t>(rng() % 3));
        x.fill_normal(rng);
        Floats2d bias(kDTypes[rng() % 3], 1, n);
        bias.fill_normal(rng);
        const Floats2d* used = rng() % 2 == 0 ? &bias : nullptr;
        Floats2d out(kDTypes[rng() % 3], m, n, static_cast<std::int64_t>(rng() % 3));
        linear(linear_args(x, w, used, out, precision));
        expect_within_bound(x, w, used, out, precision);
        if (HasFailure()) return;
      }
    }
  }
}

// Chunks of K, several passes over tokens, odd numbers of tiles, panels that take turns at a chunk.
TEST_P(Linear, LargeShapes) {
  if (GetParam() == "scalar") GTEST_SKIP() << "this level sums as the reference does";
  std::mt19937_64 rng(2);
  struct Shape {
    std::int64_t m, n, k;
  };
  std::vector<Shape> shapes = {
      {38, 17, 16500}, {530, 33, 96}, {39, 150, 1100}, {35, 2100, 600}, {100, 850, 330}};
  // NEON has neither chunks nor panels, only long sums, and is emulated in tests.
  if (GetParam().starts_with("neon")) shapes = {{6, 17, 16500}, {530, 33, 96}};
  for (const FormatInfo& info : formats()) {
#ifdef __SANITIZE_ADDRESS__
    // Ten times as slow, and what counts is which bytes are touched: a type of each width.
    if (info.format == Format::kSymInt4 || info.format == Format::kFp4 ||
        info.format == Format::kSymInt5 || info.format == Format::kFp8E4M3 ||
        info.format == Format::kFp16) {
      continue;
    }
#endif
    for (const Shape& s : shapes) {
      if (s.n > 2000 && info.format != Format::kAsymInt4) continue;
      // Groups of panels, the last of them incomplete, and several blocks of tokens.
      if (s.n == 850 && info.format != Format::kAsymInt4 && info.format != Format::kFp8E5M2 &&
          info.format != Format::kBf16) {
        continue;
      }
      const Weights w = random_weights(info.format, s.n, s.k, info.grouped() ? 64 : 0, rng);
      Floats2d x(DType::kBFloat16, s.m, s.k);
      x.fill_normal(rng);
      for (Precision precision : kPrecisions) {
        Floats2d out(DType::kFloat32, s.m, s.n);
        linear(linear_args(x, w, nullptr, out, precision), SpawnThreads(2));
        expect_within_bound(x, w, nullptr, out, precision);
        Floats2d serial(DType::kFloat32, s.m, s.n);
        linear(linear_args(x, w, nullptr, serial, precision));
        EXPECT_EQ(std::memcmp(out.bytes.data(), serial.bytes.data(), out.bytes.size()), 0)
            << info.name << " m " << s.m << " n " << s.n << " k " << s.k;
        if (HasFailure()) return;
      }
    }
  }
}

// Few tokens and inputs that are a multiple of four groups of 64, padded or not: kernels that take
// such runs of groups for several row tiles in turn, the last of which are fewer. The same bits
// from any number of threads, whose shares begin anywhere.
TEST_P(Linear, RunsOfGroups) {
  std::mt19937_64 rng(10);
  const std::int64_t rows[] = {1, 16, 60, 16 * 9 + 5};
  for (const FormatInfo& info : formats()) {
    if (!info.grouped()) continue;
    for (std::int64_t m : {1, 2, 3, 4, 5, 8, 9, 12, 13, 16}) {
      const std::int64_t n = rows[rng() % 4];
      const std::int64_t k = 256 * (1 + static_cast<std::int64_t>(rng() % 3)) -
                             static_cast<std::int64_t>(rng() % 2 * (rng() % 32));
      const Weights w = random_weights(info.format, n, k, 64, rng);
      Floats2d x(kDTypes[rng() % 3], m, k, static_cast<std::int64_t>(rng() % 3));
      x.fill_normal(rng);
      Floats2d bias(DType::kFloat32, 1, n);
      bias.fill_normal(rng);
      for (Precision precision : {Precision::kFp32, Precision::kInt8}) {
        const DType dtype = kDTypes[rng() % 3];
        const auto stride = static_cast<std::int64_t>(rng() % 2);
        Floats2d one(dtype, m, n, stride);
        linear(linear_args(x, w, &bias, one, precision));
        expect_within_bound(x, w, &bias, one, precision);
        for (int threads : {2, 3, 7}) {
          Floats2d many(dtype, m, n, stride);
          linear(linear_args(x, w, &bias, many, precision), SpawnThreads(threads));
          EXPECT_EQ(one.bytes, many.bytes) << info.name << " m " << m << " n " << n << " k " << k;
        }
        if (HasFailure()) return;
      }
    }
  }
}

// More activations than the second-level cache is counted on to hold.
TEST_P(Linear, ManyTokensAndInputs) {
  if (GetParam() == "scalar") {
    GTEST_SKIP() << "this level does the same for any number of tokens and inputs";
  }
  std::mt19937_64 rng(9);
  for (Format format : {Format::kSymInt4, Format::kAsymInt5, Format::kNf3, Format::kFp8E4M3}) {
    const int group = format_info(format).grouped() ? 64 : 0;
    const Weights w = random_weights(format, 70, 4500, group, rng);
    Floats2d x(DType::kBFloat16, 250, 4500);
    x.fill_normal(rng);
    Floats2d out(DType::kBFloat16, 250, 70);
    linear(linear_args(x, w, nullptr, out, Precision::kInt8), SpawnThreads(2));
    expect_within_bound(x, w, nullptr, out, Precision::kInt8);
  }
}

TEST_P(Linear, DoesNotDependOnTheThreadCount) {
  std::mt19937_64 rng(3);
  for (const FormatInfo& info : formats()) {
    for (std::int64_t m : {1, 3, 7, 40}) {
      const std::int64_t n = 16 * 7 + 5, k = 352;
      const Weights w = random_weights(info.format, n, k, info.grouped() ? 64 : 0, rng);
      Floats2d x(DType::kFloat32, m, k);
      x.fill_normal(rng);
      for (Precision precision : kPrecisions) {
        Floats2d one(DType::kFloat32, m, n);
        linear(linear_args(x, w, nullptr, one, precision));
        for (int threads : {2, 3, 16}) {
          Floats2d many(DType::kFloat32, m, n);
          linear(linear_args(x, w, nullptr, many, precision), SpawnThreads(threads));
          ASSERT_EQ(std::memcmp(one.bytes.data(), many.bytes.data(), one.bytes.size()), 0)
              << info.name << " m " << m << " threads " << threads;
        }
      }
    }
  }
}

// Passes of up to 128 tokens, in pairs of 16 and with an odd 16, and inputs that are cut into
// spans: the same bits from any number of threads.
TEST_P(Linear, PassesOfTokens) {
  std::mt19937_64 rng(8);
  const auto check = [&](Format format, std::int64_t m, std::int64_t n, std::int64_t k) {
    const Weights w = random_weights(format, n, k, format_info(format).grouped() ? 64 : 0, rng);
    Floats2d x(DType::kBFloat16, m, k), bias(DType::kFloat32, 1, n);
    x.fill_normal(rng);
    bias.fill_normal(rng);
    Floats2d one(DType::kFloat32, m, n), many(DType::kFloat32, m, n);
    linear(linear_args(x, w, &bias, one, Precision::kBf16));
    expect_within_bound(x, w, &bias, one, Precision::kBf16);
    linear(linear_args(x, w, &bias, many, Precision::kBf16), SpawnThreads(3));
    EXPECT_EQ(one.bytes, many.bytes) << format_info(format).name << " m " << m;
  };
  for (const FormatInfo& info : formats()) {
    for (std::int64_t m : {49, 80, 97, 128}) check(info.format, m, 40, 224);
  }
  for (Format format : {Format::kAsymInt5, Format::kFp8E4M3, Format::kBf16}) {
    check(format, 120, 40, 5440);
  }
}

TEST_P(Linear, NonFiniteActivationsStayInTheirRows) {
  std::mt19937_64 rng(4);
  const double kBad[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
  for (const FormatInfo& info : formats()) {
    for (Precision precision : kPrecisions) {
      for (std::int64_t m : {1, 2, 5, 14, 20}) {
        const std::int64_t n = 40, k = 200;
        const Weights w = random_weights(info.format, n, k, info.grouped() ? 32 : 0, rng);
        Floats2d x(kDTypes[rng() % 3], m, k);
        x.fill_normal(rng);
        const std::int64_t bad = static_cast<std::int64_t>(rng() % static_cast<unsigned>(m));
        x.set(bad, static_cast<std::int64_t>(rng() % 200), kBad[rng() % 3]);
        Floats2d out(DType::kFloat32, m, n);
        linear(linear_args(x, w, nullptr, out, precision));
        for (std::int64_t t = 0; t < m; ++t) {
          for (std::int64_t r = 0; r < n; ++r) {
            ASSERT_EQ(std::isfinite(out.get(t, r)), t != bad)
                << info.name << " precision " << static_cast<int>(precision) << " m " << m
                << " token " << t << " (bad: " << bad << ") row " << r << ": " << out.get(t, r);
          }
        }
      }
    }
  }
}

// Activations as large and as small as float32 allows neither overflow on the way nor vanish.
TEST_P(Linear, ExtremeMagnitudes) {
  std::mt19937_64 rng(5);
  for (const FormatInfo& info : formats()) {
    for (double magnitude : {0x1p-90, 0x1p90}) {
      for (std::int64_t m : {1, 20}) {
        const Weights w = random_weights(info.format, 20, 130, info.grouped() ? 64 : 0, rng);
        Floats2d x(DType::kFloat32, m, 130);
        x.fill_normal(rng);
        for (std::int64_t t = 0; t < m; ++t) {
          for (std::int64_t i = 0; i < 130; ++i) x.set(t, i, x.get(t, i) * magnitude);
        }
        Floats2d out(DType::kFloat32, m, 20);
        for (Precision precision : kPrecisions) {
          linear(linear_args(x, w, nullptr, out, precision));
          expect_within_bound(x, w, nullptr, out, precision);
        }
      }
    }
  }
}

TEST_P(Linear, EmptyDimensions) {
  std::mt19937_64 rng(6);
  Floats2d bias(DType::kFloat32, 1, 20);
  bias.fill_normal(rng);
  const Weights no_inputs = random_weights(Format::kSymInt4, 20, 0, 64, rng);
  Floats2d x(DType::kFloat32, 3, 0), out(DType::kBFloat16, 3, 20);
  linear(linear_args(x, no_inputs, &bias, out, Precision::kAuto));
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t n = 0; n < 20; ++n) {
      EXPECT_NEAR(out.get(t, n), bias.get(0, n), std::fabs(bias.get(0, n)) * 0x1p-8);
    }
  }
  const Weights w = random_weights(Format::kNf4, 20, 64, 64, rng);
  Floats2d none(DType::kFloat32, 0, 64), nothing(DType::kFloat32, 0, 20);
  linear(linear_args(none, w, nullptr, nothing, Precision::kAuto));
}

// Several matrices share one set of prepared activations: the same bits as one call each, also
// where rows are made just before they are prepared, each once.
TEST_P(Linear, RowBlocksShareActivations) {
  std::mt19937_64 rng(7);
  const std::int64_t k = 160;
  for (std::int64_t m : {1, 6, 50, 600}) {
    Floats2d x(DType::kBFloat16, m, k);
    x.fill_normal(rng);
    std::vector<Weights> weights;
    for (std::int64_t n : {48, 5, 33}) {
      weights.push_back(random_weights(Format::kSymInt4, n, k, 32, rng));
    }
    weights.push_back(random_weights(Format::kAsymInt5, 16, k, 32, rng));  // other activations
    weights.push_back(random_weights(Format::kBf16, 30, k, 0, rng));
    std::vector<Floats2d> outs, expected;
    std::vector<cpu::RowBlock> blocks;
    for (const Weights& w : weights) outs.emplace_back(DType::kFloat32, m, w.layout.n);
    expected = outs;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const LinearArgs args = linear_args(x, weights[i], nullptr, outs[i], Precision::kInt8);
      blocks.push_back({static_cast<const std::byte*>(args.packed), args.layout, args.exponent,
                        nullptr, DType::kFloat32, args.out, args.out_dtype, args.out_stride});
      linear(linear_args(x, weights[i], nullptr, expected[i], Precision::kInt8));
    }
    const cpu::Tokens tokens{x.bytes.data(), x.dtype, x.stride, m, k};
    cpu::linear_multi(tokens, Precision::kInt8, blocks, SpawnThreads(3));
    for (std::size_t i = 0; i < weights.size(); ++i) {
      EXPECT_EQ(outs[i].bytes, expected[i].bytes) << "block " << i << " m " << m;
      std::fill(outs[i].bytes.begin(), outs[i].bytes.end(), std::byte{0});
    }
    const std::vector<std::byte> source(x.bytes.begin(), x.bytes.end());
    std::fill(x.bytes.begin(), x.bytes.end(), std::byte{0});
    const std::int64_t row = x.stride * 2;
    std::vector<int> made(static_cast<std::size_t>(m));
    cpu::linear_multi(tokens, Precision::kInt8, blocks, SpawnThreads(3),
                      [&](std::int64_t begin, std::int64_t end) {
                        std::copy(source.begin() + begin * row, source.begin() + end * row,
                                  x.bytes.begin() + begin * row);
                        for (std::int64_t i = begin; i < end; ++i) {
                          ++made[static_cast<std::size_t>(i)];
                        }
                      });
    for (int count : made) EXPECT_EQ(count, 1);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      EXPECT_EQ(outs[i].bytes, expected[i].bytes) << "made, block " << i << " m " << m;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Linear, ::testing::ValuesIn(levels()),
                         [](const auto& info) { return info.param; });

template <class F>
std::string error_text(ErrorCode code, F&& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

TEST(LinearErrors, BadArgumentsAreRefusedByName) {
  std::mt19937_64 rng(8);
  const Weights w = random_weights(Format::kSymInt4, 20, 64, 64, rng);
  Floats2d x(DType::kFloat32, 2, 64), out(DType::kFloat32, 2, 20);
  const LinearArgs good = linear_args(x, w, nullptr, out, Precision::kAuto);
  LinearArgs args = good;
  args.x_dtype = DType::kFloat64;
  EXPECT_NE(error_text(ErrorCode::kType, [&] { linear(args); }).find("float64"), std::string::npos);
  args = good;
  args.packed = w.packed.get() + 1;
  EXPECT_NE(error_text(ErrorCode::kValue, [&] { linear(args); }).find("aligned"),
            std::string::npos);
  args = good;
  args.m = -1;
  error_text(ErrorCode::kValue, [&] { linear(args); });
  args = good;
  args.out_stride = 19;
  error_text(ErrorCode::kValue, [&] { linear(args); });
  args = good;
  args.precision = static_cast<Precision>(9);
  error_text(ErrorCode::kValue, [&] { linear(args); });
}

}  // namespace
}  // namespace lowbit
