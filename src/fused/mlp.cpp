#include "fused/mlp.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lowbit::fused {
namespace {

double softplus_of(const Work& work, const void* parameter, DType dtype) {
  if (parameter == nullptr) return 0;
  float value;
  work.kernels.load(parameter, dtype, 1, &value);
  return value > 20 ? value : std::log1p(std::exp(double{value}));
}

// NaN stays NaN.
float clamped(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace

ActivationNumbers numbers_of(const Work& work, const GateSpec& gate) {
  const double positive = softplus_of(work, gate.positive, gate.positive_dtype);
  const double negative = softplus_of(work, gate.negative, gate.negative_dtype) + double{gate.beta};
  return {gate.alpha, static_cast<float>(positive), static_cast<float>(negative), gate.beta};
}

void gate_row(const Work& work, const MlpSpec& spec, const ActivationNumbers& numbers,
              const float* row, float* inner) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const GateSpec& gate = spec.gate;
  const float* gates = row + spec.gate_offset;
  const float* up = spec.gated ? row + spec.up_offset : nullptr;
  const bool plain_gate = gate.step == 1 && gate.low == -kInfinity && gate.high == kInfinity;
  const bool plain_up =
      gate.step == 1 && gate.up_low == -kInfinity && gate.up_high == kInfinity && gate.up_plus == 0;
  if (!plain_gate) {
    for (std::int64_t i = 0; i < spec.width; ++i) {
      inner[i] = clamped(gates[i * gate.step], gate.low, gate.high);
    }
    gates = inner;
  }
  work.kernels.activate(spec.activation, numbers, gates, plain_up ? up : nullptr, spec.width,
                        inner);
  if (plain_up || up == nullptr) return;
  for (std::int64_t i = 0; i < spec.width; ++i) {
    inner[i] *= clamped(up[i * gate.step], gate.up_low, gate.up_high) + gate.up_plus;
  }
}

std::int64_t mlp_floats(const MlpSpec& spec, std::int64_t tokens, std::int64_t hidden) {
  return tokens * (2 * hidden + columns_of(spec.in) + spec.width);
}

void mlp_chunk(const Work& work, const MlpSpec& spec, const float* from, std::int64_t count,
               float* to, float* memory, const MakeRow& make) {
  const std::int64_t hidden = work.call.hidden;
  const std::int64_t columns = columns_of(spec.in);
  float* normed = memory;
  float* update = normed + count * hidden;
  float* wide = update + count * hidden;
  float* inner = wide + count * columns;
  multiply(work, spec.in, normed, count, hidden, wide, columns, [&](std::int64_t t) {
    if (make) make(t);
    work.kernels.norm(spec.norm, from + t * hidden, hidden, normed + t * hidden);
  });
  const ActivationNumbers numbers = numbers_of(work, spec.gate);
  multiply(work, {spec.down}, inner, count, spec.width, update, hidden, [&](std::int64_t t) {
    gate_row(work, spec, numbers, wide + t * columns, inner + t * spec.width);
    normalize(work, spec.inner_norm, inner + t * spec.width, spec.width);
  });
  for_tokens(count, work.threads,
             [&](std::int64_t t) { merge(work, spec, update + t * hidden, to + t * hidden); });
}

}  // namespace lowbit::fused
