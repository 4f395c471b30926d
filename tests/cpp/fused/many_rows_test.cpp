// Attention of many rows in bfloat16, and of few rows over bfloat16, against float64, held to the
// bounds of docs/numerics.md ("Attention in bfloat16"); runs once per instruction set (label
// per_isa).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/fused_kernels.h"

namespace lowbit {
namespace {

using cpu::FewRows;
using cpu::ManyRows;

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Bytes = std::unique_ptr<std::byte, Free>;

Bytes aligned(std::int64_t bytes) {
  return Bytes(static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>(bytes))));
}

// One head with its queries, and what the kernels make of them.
struct Case {
  int rows, d;
  std::int64_t positions;
  DType dtype = DType::kFloat32;
  std::vector<float> q, keys, values;  // keys and values as the cache holds them
  float softcap = 0;
  MaskKind mask_kind = MaskKind::kNone;
  std::vector<std::int64_t> limits;          // empty: none
  std::vector<std::vector<float>> additive;  // of every row
  std::vector<float> acc, max, sum;

  Case(int row_count, int head_size, std::int64_t count, DType type, std::mt19937& random,
       float size = 1)
      : rows(row_count), d(head_size), positions(count), dtype(type) {
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, std::int64_t n, float scale) {
      to.resize(static_cast<std::size_t>(n));
      for (float& value : to) value = scale * normal(random);
    };
    fill(q, std::int64_t{rows} * d, size / std::sqrt(static_cast<float>(d)));
    fill(keys, positions * d, 1);
    fill(values, positions * d, 1);
    for (std::vector<float>* cached : {&keys, &values}) {
      const std::vector<std::byte> stored = store(*cached);
      cpu::fused_kernels().load(stored.data(), dtype, static_cast<std::int64_t>(cached->size()),
                                cached->data());
    }
  }

  std::vector<std::byte> store(const std::vector<float>& from) const {
    std::vector<std::byte> stored(from.size() * dtype_bytes(dtype));
    cpu::fused_kernels().store(from.data(), dtype, static_cast<std::int64_t>(from.size()),
                               stored.data());
    return stored;
  }

  void run(const ManyRows& many) {
    const std::int64_t bytes = many.packed_bytes(positions, d);
    const Bytes packed_keys = aligned(bytes), packed_values = aligned(bytes);
    const std::vector<std::byte> k = store(keys), v = store(values);
    for (std::int64_t block = 0; block * kCacheBlock < positions; ++block) {
      many.pack({k.data(), dtype, d, d}, {v.data(), dtype, d, d}, positions, d, block,
                packed_keys.get(), packed_values.get());
    }
    cpu::AttendRows args{};
    args.keys = packed_keys.get();
    args.values = packed_values.get();
    run(many.attend, many.scratch(d), args);
  }

  // Roundings of values, of weights, and of what makes scores.
  double value_unit = 0x1p-8, weight_unit = 0x1p-8, score_unit = 0x1p-7 + 0x1p-14;

  // From position `begin` on.
  void run(const FewRows& few, std::int64_t begin) {
    const std::vector<std::byte> k = store(keys), v = store(values);
    cpu::AttendRows args{};
    args.keys = k.data();
    args.values = v.data();
    args.key_stride = args.value_stride = d;
    args.begin = begin;
    value_unit = 0;
    weight_unit = 0x1p-15;
    score_unit = 0x1p-16 + d * 0x1p-24;
    run(few.attend, few.scratch(rows, d), args);
  }

  void run(void (*attend)(const cpu::AttendRows&), std::int64_t scratch_floats,
           cpu::AttendRows& args) {
    std::vector<std::vector<std::byte>> masks;
    std::vector<const void*> mask_rows;
    const DType mask_type = mask_kind == MaskKind::kFloat16    ? DType::kFloat16
                            : mask_kind == MaskKind::kBFloat16 ? DType::kBFloat16
                                                               : DType::kFloat32;
    for (const std::vector<float>& row : additive) {
      std::vector<std::byte> mask(row.size() * 4);
      if (mask_kind == MaskKind::kBool) {
        for (std::size_t i = 0; i < row.size(); ++i) mask[i] = std::byte{row[i] == 0};
      } else {
        cpu::fused_kernels().store(row.data(), mask_type, positions, mask.data());
      }
      masks.push_back(std::move(mask));
      mask_rows.push_back(masks.back().data());
    }
    const std::size_t n = static_cast<std::size_t>(rows);
    acc.assign(n * static_cast<std::size_t>(d), -1);
    max.assign(n, -1);
    sum.assign(n, -1);
    std::vector<float> scratch(static_cast<std::size_t>(scratch_floats), NAN);
    args.q = q.data();
    args.rows = rows;
    args.d = args.values_d = d;
    args.dtype = dtype;
    args.end = positions;
    args.limits = limits.empty() ? nullptr : limits.data();
    args.masks = additive.empty() ? nullptr : mask_rows.data();
    args.mask_kind = mask_kind;
    args.softcap = softcap;
    args.acc = acc.data();
    args.max = max.data();
    args.sum = sum.data();
    args.scratch = scratch.data();
    attend(args);
  }

  // The score of a pair, and what rounding its factors may change.
  std::pair<double, double> score(int r, std::int64_t p) const {
    double s = 0, size = 0;
    for (int i = 0; i < d; ++i) {
      const double product = double{q[static_cast<std::size_t>(r * d + i)]} *
                             double{keys[static_cast<std::size_t>(p * d + i)]};
      s += product;
      size += std::fabs(product);
    }
    if (softcap > 0) s = softcap * std::tanh(s / double{softcap});
    if (!additive.empty()) {
      s += additive[static_cast<std::size_t>(r)][static_cast<std::size_t>(p)];
    }
    return {s, size * score_unit + 0x1p-20 * double{softcap} + 0x1p-22 * std::fabs(s)};
  }

  // The relative error of a row, its square root of a mean, after checking every element's bound.
  double check(int r, std::int64_t begin = 0) const {
    const std::int64_t limit = limits.empty() ? positions : limits[static_cast<std::size_t>(r)];
    std::vector<double> weights(static_cast<std::size_t>(begin), -INFINITY);
    double most = -INFINITY, delta = 0, total = 0;
    for (std::int64_t p = begin; p < std::min(limit, positions); ++p) {
      const auto [s, error] = score(r, p);
      weights.push_back(s);
      most = std::max(most, s);
      if (s > -INFINITY) delta = std::max(delta, error);
    }
    for (double& w : weights) total += w = std::exp(w - most);
    const float* have = acc.data() + std::int64_t{r} * d;
    EXPECT_NEAR(max[static_cast<std::size_t>(r)], most, delta + 1e-5) << "row " << r;
    double square = 0, size = 0;
    for (int i = 0; i < d; ++i) {
      double want = 0, magnitude = 0;
      for (std::size_t p = 0; p < weights.size(); ++p) {
        const double part = weights[p] / total *
                            values[p * static_cast<std::size_t>(d) + static_cast<std::size_t>(i)];
        want += part;
        magnitude += std::fabs(part);
      }
      const double got = have[i] / sum[static_cast<std::size_t>(r)];
      const double factor = std::exp(2 * delta) * (1 + value_unit) * (1 + weight_unit);
      const double bound = (factor * (1 + 0x1p-14 * weight_unit / 0x1p-8) - 1) * magnitude;
      EXPECT_NEAR(got, want, bound) << "row " << r << " channel " << i;
      square += (got - want) * (got - want);
      size += magnitude * magnitude;
    }
    return std::sqrt(square / size);
  }
};

// Limits, a softcap, masks: by the number of the case.
void dress(Case& one, int i, std::mt19937& random) {
  if (i % 3 == 1) {
    for (int r = 0; r < one.rows; ++r) {
      one.limits.push_back(
          1 + static_cast<std::int64_t>(random() % static_cast<unsigned>(one.positions + 3)));
    }
  }
  if (i % 4 == 2) one.softcap = 2;
  if (i % 2 == 1) {
    const MaskKind kinds[] = {MaskKind::kBool, MaskKind::kFloat32, MaskKind::kFloat16,
                              MaskKind::kBFloat16};
    one.mask_kind = kinds[random() % std::size(kinds)];
    for (int r = 0; r < one.rows; ++r) {
      std::vector<float> row(static_cast<std::size_t>(one.positions));
      for (float& m : row) {
        m = random() % 3 == 0 ? -INFINITY
            : one.mask_kind == MaskKind::kBool
                ? 0.0f
                : static_cast<float>(static_cast<int>(random() % 9) - 4) / 4;
      }
      row[0] = 0;
      one.additive.push_back(row);
    }
  }
}

class ManyRowsTest : public testing::Test {
 protected:
  void SetUp() override {
    many = cpu::many_rows();
    if (many == nullptr) GTEST_SKIP() << "no kernels for many rows at this level";
  }
  const ManyRows* many = nullptr;
  std::mt19937 random{11};
};

class FewRowsTest : public testing::Test {
 protected:
  void SetUp() override {
    few = cpu::few_rows();
    if (few == nullptr) GTEST_SKIP() << "no kernels for few rows at this level";
  }
  const FewRows* few = nullptr;
  std::mt19937 random{12};
};

TEST_F(ManyRowsTest, StaysInsideItsBound) {
  const int sizes[] = {8, 20, 32, 64, 80, 96, 128, 130, 256};
  const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const std::int64_t counts[] = {1, 2, 63, 64, 65, 127, 128, 129, 192, 300, 701};
  for (int i = 0; i < 60; ++i) {
    const auto pick = [&](const auto& from) { return from[random() % std::size(from)]; };
    const int rows = 1 + static_cast<int>(random() % static_cast<unsigned>(many->rows));
    Case one(rows, pick(sizes), pick(counts), pick(types), random, i % 5 == 4 ? 3 : 1);
    dress(one, i, random);
    SCOPED_TRACE(testing::Message() << rows << " rows, head size " << one.d << ", " << one.positions
                                    << " positions, case " << i);
    one.run(*many);
    double square = 0;
    for (int r = 0; r < rows; ++r) square += std::pow(one.check(r), 2);
    // Roundings are independent: of this size where the bound is ten times as large.
    EXPECT_LT(std::sqrt(square / rows), 0.01);
    if (HasFailure()) break;
  }
}

TEST_F(ManyRowsTest, WhatIsNotSeenIsNothing) {
  Case one(5, 64, 200, DType::kFloat32, random);
  one.limits = {200, 0, 130, 64, 1};
  one.run(*many);
  EXPECT_EQ(one.max[1], -INFINITY);
  EXPECT_EQ(one.sum[1], 0);
  for (int i = 0; i < one.d; ++i) EXPECT_EQ(one.acc[static_cast<std::size_t>(one.d + i)], 0);
  for (int r : {0, 2, 3, 4}) one.check(r);
}

TEST_F(ManyRowsTest, ARowThatIsNotFiniteStaysAlone) {
  for (const float bad : {NAN, INFINITY}) {
    Case one(many->rows, 64, 150, DType::kFloat32, random);
    one.q[3 * 64 + 5] = bad;
    one.run(*many);
    for (int r = 0; r < one.rows; ++r) {
      if (r == 3) {
        EXPECT_FALSE(std::isfinite(one.acc[3 * 64] / one.sum[3]));
        EXPECT_NE(one.sum[3], 0);  // which would mean that it sees nothing
      } else {
        one.check(r);
      }
    }
  }
}

TEST_F(ManyRowsTest, LaterMaximaMakeEarlierWeightsSmall) {
  Case one(many->rows, 32, 512, DType::kFloat32, random, 0.01f);
  // Scores that rise from block to block, by less and by more than what weights may grow.
  for (int r = 0; r < one.rows; ++r) one.q[static_cast<std::size_t>(r * 32)] = 1;
  for (int p = 0; p < 512; ++p) {
    const int block = p / 64;
    one.keys[static_cast<std::size_t>(p * 32)] = static_cast<float>(block < 4 ? block : 20 * block);
  }
  one.run(*many);
  for (int r = 0; r < one.rows; ++r) one.check(r);
}

TEST_F(ManyRowsTest, KeysThatAreNotSeenHaveNoSay) {
  Case one(2, 64, 150, DType::kFloat32, random);
  one.limits = {100, 150};
  one.keys[120 * 64 + 1] = NAN;
  one.run(*many);
  one.check(0);
  EXPECT_TRUE(std::isnan(one.acc[64] / one.sum[1]));
}

TEST_F(FewRowsTest, StayInsideTheirBound) {
  const int sizes[] = {32, 64, 96, 128, 256};
  const std::int64_t counts[] = {1, 15, 16, 17, 31, 33, 64, 130, 255, 256, 257, 300, 512, 700};
  for (int i = 0; i < 60; ++i) {
    const auto pick = [&](const auto& from) { return from[random() % std::size(from)]; };
    const int rows = 1 + static_cast<int>(random() % 24);
    Case one(rows, pick(sizes), pick(counts), DType::kBFloat16, random, i % 5 == 4 ? 3 : 1);
    dress(one, i, random);
    std::int64_t begin = 0;
    if (one.limits.empty() && i % 4 == 0) begin = (one.positions - 1) / 64 * 64;
    SCOPED_TRACE(testing::Message() << rows << " rows, head size " << one.d << ", " << begin
                                    << " to " << one.positions << ", case " << i);
    if (begin > 0 && !one.additive.empty()) one.additive.clear();
    one.run(*few, begin);
    for (int r = 0; r < rows; ++r) one.check(r, begin);
    if (HasFailure()) break;
  }
}

TEST_F(FewRowsTest, WhatIsNotFiniteOrNotSeenStaysAlone) {
  Case one(10, 64, 300, DType::kBFloat16, random);
  one.limits.assign(10, 300);
  one.limits[4] = 0;
  one.limits[9] = 100;
  one.q[2 * 64 + 3] = NAN;
  one.keys[270 * 64] = NAN;
  one.run(*few, 0);
  EXPECT_EQ(one.sum[4], 0);
  EXPECT_EQ(one.max[4], -INFINITY);
  one.check(9);
  for (int r : {0, 1, 2, 3, 5, 6, 7, 8}) {
    EXPECT_TRUE(std::isnan(one.acc[static_cast<std::size_t>(r * 64)])) << r;
  }
}

}  // namespace
}  // namespace lowbit
