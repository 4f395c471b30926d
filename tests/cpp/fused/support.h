// Shared by the tests of fused operators: packed weights with their values, and parts of a block in
// float64.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "lowbit/fused.h"

namespace lowbit {
namespace {

using Vector = std::vector<double>;

// Activations keep 15 bits in every product and pass through at most five of them.
constexpr double kTolerance = 3e-4;

// The aligned bytes and the dequantized values of one matrix.
struct Weight {
  std::vector<std::byte> memory;
  std::vector<float> bias;
  PackedMatrix packed;
  Vector values;  // [n, k]

  Weight(std::int64_t n, std::int64_t k, bool with_bias, std::mt19937& random) {
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(k)));
    std::vector<float> dense(static_cast<std::size_t>(n * k));
    for (float& w : dense) w = normal(random);
    packed.layout = make_layout(Format::kSymInt8, n, k);
    memory.resize(static_cast<std::size_t>(packed.layout.bytes()) + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    std::byte* aligned = memory.data() + (64 - address % 64) % 64;
    const std::span<std::byte> bytes(aligned, static_cast<std::size_t>(packed.layout.bytes()));
    packed.exponent = quantize({dense.data(), DType::kFloat32, n, k, k, 1}, packed.layout, bytes);
    packed.packed = aligned;
    values.resize(dense.size());
    dequantize(bytes, packed.layout, packed.exponent, {values.data(), DType::kFloat64, n, k, k, 1});
    if (with_bias) {
      for (std::int64_t i = 0; i < n; ++i) bias.push_back(normal(random) * 5);
      packed.bias = bias.data();
    }
  }
  Weight(const Weight&) = delete;

  Vector times(const Vector& x) const {
    const auto& layout = packed.layout;
    Vector out(static_cast<std::size_t>(layout.n));
    for (std::int64_t i = 0; i < layout.n; ++i) {
      double sum = bias.empty() ? 0.0 : bias[static_cast<std::size_t>(i)];
      for (std::int64_t j = 0; j < layout.k; ++j) {
        sum += values[static_cast<std::size_t>(i * layout.k + j)] * x[static_cast<std::size_t>(j)];
      }
      out[static_cast<std::size_t>(i)] = sum;
    }
    return out;
  }
};

inline Vector norm(const NormSpec& spec, Vector x) {
  if (spec.kind == NormKind::kNone) return x;
  const double n = static_cast<double>(x.size());
  double mean = 0, square = 0;
  if (spec.kind == NormKind::kLayer) {
    for (double v : x) mean += v / n;
  }
  for (double v : x) square += (v - mean) * (v - mean) / n;
  const float* weight = static_cast<const float*>(spec.weight);
  const float* bias = static_cast<const float*>(spec.bias);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = (x[i] - mean) / std::sqrt(square + static_cast<double>(spec.eps));
    if (weight != nullptr) x[i] *= weight[i] + spec.offset;
    if (bias != nullptr) x[i] += bias[i];
  }
  return x;
}

inline double activation(Activation kind, double x, const GateSpec& spec = {}) {
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  switch (kind) {
    case Activation::kIdentity:
      return x;
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kRelu2:
      return x > 0 ? x * x : 0;
    case Activation::kQuickGelu:
      return x * sigmoid(1.702 * x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSoftplus:
      return std::log1p(std::exp(x));
    case Activation::kSwish:
      return x * sigmoid(double{spec.alpha} * x);
    case Activation::kXielu: {
      const auto softplus = [](const void* p) {
        return std::log1p(std::exp(double{*static_cast<const float*>(p)}));
      };
      const double beta = double{spec.beta};
      return beta * x + (x > 0 ? softplus(spec.positive) * x * x
                               : (softplus(spec.negative) + beta) * (std::expm1(x) - x));
    }
  }
  return NAN;
}

// Input j of `down` from a row of columns.
inline double gated(const MlpSpec& m, const Vector& wide, std::size_t j) {
  const auto at = [&](std::int64_t offset) {
    return wide[static_cast<std::size_t>(offset + static_cast<std::int64_t>(j) * m.gate.step)];
  };
  const auto clamp = [](double x, float low, float high) {
    return std::min(std::max(x, double{low}), double{high});
  };
  const double gate =
      activation(m.activation, clamp(at(m.gate_offset), m.gate.low, m.gate.high), m.gate);
  if (!m.gated) return gate;
  const double up = clamp(at(m.up_offset), m.gate.up_low, m.gate.up_high);
  return gate * (up + double{m.gate.up_plus});
}

class Threaded final : public Threads {
 public:
  int count() const override { return 3; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    std::vector<std::thread> threads;
    for (std::int64_t t = 0; t < tasks; ++t) threads.emplace_back([&body, t] { body(t); });
    for (std::thread& thread : threads) thread.join();
  }
};

inline void expect_near(const std::vector<float>& have, const Vector& want,
                        double tolerance = kTolerance) {
  ASSERT_EQ(have.size(), want.size());
  double size = 0;
  for (double w : want) size = std::max(size, std::fabs(w));
  for (std::size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(have[i], want[i], tolerance * size) << "element " << i;
  }
}

}  // namespace
}  // namespace lowbit
