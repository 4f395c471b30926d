// Experts: MLPs of which every token has been given some.
#include <algorithm>
#include <vector>

#include "fused/check.h"
#include "fused/mlp.h"
#include "fused/work.h"

namespace lowbit {
namespace {

using namespace fused;

PackedMatrix expert_of(const PackedMatrix& all, std::int64_t expert) {
  PackedMatrix one = all;
  one.packed += expert * all.layout.bytes();
  if (all.bias != nullptr) {
    one.bias =
        static_cast<const char*>(all.bias) + expert * all.layout.n * bytes_of(all.bias_dtype);
  }
  return one;
}

struct Choice {
  std::int64_t expert, token;
  float weight;
};

// The last part of an expert for `count` rows of projected columns, into `update`.
void expert_rows(const Work& work, const MlpSpec& spec, std::int64_t expert, const float* wide,
                 std::int64_t stride, std::int64_t count, float* inner, float* update) {
  const ActivationNumbers numbers = numbers_of(work, spec.gate);
  multiply(work, {expert_of(spec.down, expert)}, inner, count, spec.width, update, work.call.hidden,
           [&](std::int64_t t) {
             gate_row(work, spec, numbers, wide + t * stride, inner + t * spec.width);
           });
}

}  // namespace

void run_experts(const BlockSpec& block, const BlockCall& call, const std::int64_t* ids,
                 const void* weights, DType weights_dtype, std::int64_t per_token,
                 const Threads& threads) {
  const std::int64_t rows = call.batch * call.tokens, hidden = call.hidden;
  if (rows == 0) return;
  check(block, call);
  const MlpSpec& spec = block.mlp;
  const Work work{cpu::fused_kernels(), call, threads, rows};
  require(spec.experts > 0 && spec.in.size() == 1, "this block has no experts");

  // By expert, then by token: the order of the sums.
  std::vector<Choice> choices;
  std::vector<float> factors(static_cast<std::size_t>(rows * per_token));
  work.kernels.load(weights, weights_dtype, rows * per_token, factors.data());
  for (std::int64_t i = 0; i < rows * per_token; ++i) {
    require(ids[i] >= 0 && ids[i] <= spec.experts, "an expert that does not exist");
    if (ids[i] == spec.experts) continue;
    choices.push_back({ids[i], i / per_token, factors[static_cast<std::size_t>(i)]});
  }
  std::stable_sort(choices.begin(), choices.end(),
                   [](const Choice& a, const Choice& b) { return a.expert < b.expert; });

  const std::int64_t columns = spec.in[0].layout.n;
  const std::int64_t total = static_cast<std::int64_t>(choices.size());
  constexpr std::int64_t kTogether = 8;  // experts of one token in one product
  const std::int64_t most = std::max<std::int64_t>(chunk_of(total), 1);
  const std::int64_t wide_floats = std::max(most, kTogether) * columns;
  float* x = floats(2, rows * hidden * 2 + most * (2 * hidden + spec.width) + wide_floats);
  float* out = x + rows * hidden;
  float* gathered = out + rows * hidden;
  float* update = gathered + most * hidden;
  float* inner = update + most * hidden;
  float* wide = inner + most * spec.width;
  load_tokens(work, call.x, call.dtype, rows, hidden, x);
  std::fill_n(out, rows * hidden, 0.0f);

  const auto add = [&](const Choice& choice, const float* row) {
    work.kernels.add(row, choice.weight * spec.multiplier, hidden, out + choice.token * hidden);
  };
  for (std::int64_t at = 0; at < total;) {
    const Choice* first = choices.data() + at;
    if (rows == 1) {
      std::vector<PackedMatrix> together;
      for (std::int64_t i = 0; i < std::min(kTogether, total - at); ++i) {
        together.push_back(expert_of(spec.in[0], first[i].expert));
      }
      const std::int64_t count = static_cast<std::int64_t>(together.size());
      multiply(work, together, x, 1, hidden, wide, count * columns);
      for (std::int64_t i = 0; i < count; ++i) {
        expert_rows(work, spec, first[i].expert, wide + i * columns, columns, 1, inner, update);
        add(first[i], update);
      }
      at += count;
      continue;
    }
    std::int64_t count = 0;
    while (at + count < total && count < most && first[count].expert == first->expert) {
      std::copy_n(x + first[count].token * hidden, hidden, gathered + count * hidden);
      ++count;
    }
    multiply(work, {expert_of(spec.in[0], first->expert)}, gathered, count, hidden, wide, columns);
    expert_rows(work, spec, first->expert, wide, columns, count, inner, update);
    for (std::int64_t i = 0; i < count; ++i) add(first[i], update + i * hidden);
    at += count;
  }
  store_tokens(work, out, call.dtype, rows, hidden, call.out);
}

}  // namespace lowbit
