// Experts chosen per token against their formula in float64; runs once per instruction set (label
// per_isa).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fused/support.h"
#include "lowbit/error.h"
#include "lowbit/fused.h"

namespace lowbit {
namespace {

// Experts whose matrices lie one after the other, as run_experts() reads them.
struct Experts {
  std::vector<std::unique_ptr<Weight>> each;
  std::vector<std::byte> memory;
  std::vector<float> biases;
  PackedMatrix packed;

  Experts(std::int64_t count, std::int64_t n, std::int64_t k, bool biased, std::mt19937& random) {
    for (std::int64_t e = 0; e < count; ++e) {
      each.push_back(std::make_unique<Weight>(n, k, biased, random));
    }
    packed = each[0]->packed;
    const std::size_t bytes = static_cast<std::size_t>(packed.layout.bytes());
    memory.resize(static_cast<std::size_t>(count) * bytes + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    std::byte* to = memory.data() + (64 - address % 64) % 64;
    packed.packed = to;
    for (const auto& one : each) {
      std::memcpy(to, one->packed.packed, bytes);
      to += bytes;
      biases.insert(biases.end(), one->bias.begin(), one->bias.end());
    }
    packed.bias = biased ? biases.data() : nullptr;
  }
};

struct Shape {
  const char* name;
  std::int64_t experts, hidden, width, tokens, chosen;
  bool gated, gate_last, biased;
  Activation activation;
  bool clamped = false;  // and gate and up in turn
};

std::string name_of(const testing::TestParamInfo<Shape>& info) {
  return info.param.name;
}

class ChosenExperts : public testing::TestWithParam<Shape> {
 protected:
  const Shape& s = GetParam();
  std::mt19937 random{5};
  std::int64_t columns = s.gated ? 2 * s.width : s.width;
  Experts in{s.experts, columns, s.hidden, s.biased, random};
  Experts down{s.experts, s.hidden, s.width, s.biased, random};
  std::vector<float> x;
  std::vector<float> weights;
  std::vector<std::int64_t> ids;
  BlockSpec block;
  BlockCall call;

  void SetUp() override {
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < s.tokens * s.hidden; ++i) x.push_back(normal(random));
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      std::vector<std::int64_t> all(static_cast<std::size_t>(s.experts + 1));
      for (std::size_t e = 0; e < all.size(); ++e) all[e] = static_cast<std::int64_t>(e);
      std::shuffle(all.begin(), all.end(), random);
      // The number of experts is among the ids: none.
      ids.insert(ids.end(), all.begin(), all.begin() + s.chosen);
      for (std::int64_t i = 0; i < s.chosen; ++i) weights.push_back(normal(random));
    }
    MlpSpec& m = block.mlp;
    m.in = {in.packed};
    m.down = down.packed;
    m.experts = s.experts;
    m.width = s.width;
    m.gated = s.gated;
    m.gate_offset = s.gate_last ? s.width : 0;
    m.up_offset = s.gate_last ? 0 : s.width;
    m.activation = s.activation;
    if (s.clamped) {
      m.gate = {2, -INFINITY, 0.7f, -0.6f, 0.6f, 1, 1.7f};
      m.gate_offset = s.gate_last ? 1 : 0;
      m.up_offset = s.gate_last ? 0 : 1;
    }
    m.multiplier = 0.6f;
    m.residual = false;
    call.x = x.data();
    call.tokens = s.tokens;
    call.hidden = s.hidden;
    call.precision = Precision::kFp32;
  }

  Vector expected() const {
    Vector all;
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      const Vector row(x.begin() + t * s.hidden, x.begin() + (t + 1) * s.hidden);
      Vector sum(static_cast<std::size_t>(s.hidden));
      for (std::int64_t i = 0; i < s.chosen; ++i) {
        const std::size_t at = static_cast<std::size_t>(t * s.chosen + i);
        if (ids[at] == s.experts) continue;
        const std::size_t expert = static_cast<std::size_t>(ids[at]);
        const Vector wide = in.each[expert]->times(row);
        Vector inner(static_cast<std::size_t>(s.width));
        for (std::size_t j = 0; j < inner.size(); ++j) {
          inner[j] = gated(block.mlp, wide, j);
        }
        const Vector out = down.each[expert]->times(inner);
        for (std::size_t j = 0; j < sum.size(); ++j) {
          sum[j] += double{weights[at]} * double{block.mlp.multiplier} * out[j];
        }
      }
      all.insert(all.end(), sum.begin(), sum.end());
    }
    return all;
  }

  std::vector<float> run(const Threads& threads = serial_threads()) {
    std::vector<float> out(x.size(), NAN);
    call.out = out.data();
    run_experts(block, call, ids.data(), weights.data(), DType::kFloat32, s.chosen, threads);
    return out;
  }
};

TEST_P(ChosenExperts, AgreeWithTheirFormula) {
  expect_near(run(), expected());
}

TEST_P(ChosenExperts, DoNotDependOnTheNumberOfThreads) {
  EXPECT_EQ(run(), run(Threaded()));
}

TEST_P(ChosenExperts, CountTwiceWhenChosenTwice) {
  for (std::int64_t i = 0; i < s.chosen; ++i) ids[static_cast<std::size_t>(i)] = ids[0];
  expect_near(run(), expected());
}

TEST_P(ChosenExperts, NobodyChosenGivesZero) {
  std::fill(ids.begin(), ids.end(), s.experts);
  EXPECT_EQ(run(), std::vector<float>(x.size(), 0.0f));
}

TEST_P(ChosenExperts, RefuseAnExpertThatDoesNotExist) {
  for (const std::int64_t wrong : {std::int64_t{-1}, s.experts + 1}) {
    ids.back() = wrong;
    EXPECT_THROW(run(), Error) << wrong;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ChosenExperts,
    testing::Values(
        Shape{"one_token", 6, 64, 48, 1, 2, true, false, false, Activation::kSilu},
        // More than are multiplied together.
        Shape{"one_token_of_many", 24, 64, 32, 1, 19, true, true, false, Activation::kSilu},
        Shape{"prompt", 5, 96, 40, 37, 3, true, false, false, Activation::kGeluTanh},
        Shape{"biased", 4, 64, 64, 9, 2, true, false, true, Activation::kSilu},
        Shape{"clamped_token", 6, 64, 48, 1, 3, true, false, true, Activation::kSwish, true},
        Shape{"clamped", 4, 64, 40, 11, 2, true, true, true, Activation::kSwish, true},
        Shape{"plain", 4, 32, 80, 3, 1, false, false, true, Activation::kRelu2},
        // Longer than a chunk for one expert.
        Shape{"one_expert", 1, 16, 16, 1100, 1, true, false, false, Activation::kSilu}),
    name_of);

}  // namespace
}  // namespace lowbit
