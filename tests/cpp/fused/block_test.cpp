// Fused decoder blocks against the same block written in float64 loops, on packed fp32-exact
// weights; runs once per instruction set (label per_isa).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/fused_kernels.h"
#include "fused/support.h"
#include "lowbit/error.h"
#include "lowbit/fused.h"

namespace lowbit {
namespace {

struct Shape {
  const char* name;
  int heads, kv_heads, head_dim;
  std::int64_t hidden, width, batch, tokens, past;
  RopeSpec rope;
  NormKind norm_kind;
  bool head_norms, biases, gated, parallel;
  Activation activation;
  float softcap;
  MaskKind mask;
  // Sinks, norms of the mixed values, inside the MLP and after the sums, head norms that come last.
  bool dressed = false;
  int gate_width = 0;
  Activation gate_activation = Activation::kSigmoid;
};

std::string name_of(const testing::TestParamInfo<Shape>& info) {
  return info.param.name;
}

class Block : public testing::TestWithParam<Shape> {
 protected:
  const Shape& s = GetParam();
  std::mt19937 random{7};
  std::normal_distribution<float> normal;

  std::vector<float> floats(std::int64_t count, float scale = 1, float offset = 0) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = offset + scale * normal(random);
    return values;
  }

  // Weights, held here.
  Weight q{s.heads * s.head_dim, s.hidden, s.biases, random};
  Weight k{s.kv_heads * s.head_dim, s.hidden, s.biases, random};
  Weight v{s.kv_heads * s.head_dim, s.hidden, s.biases, random};
  // At least one, so that there is a matrix.
  Weight head_gate{std::max(1, s.heads* s.gate_width), s.hidden, s.biases, random};
  Weight o{s.hidden, s.heads* s.head_dim, s.biases, random};
  Weight gate{s.width, s.hidden, false, random};
  Weight up{s.width, s.hidden, false, random};
  Weight down{s.hidden, s.width, s.biases, random};
  std::vector<float> norm1 = floats(s.hidden, 0.3f, 1), norm2 = floats(s.hidden, 0.3f, 1);
  std::vector<float> bias1 = floats(s.hidden, 0.3f);
  std::vector<float> head_norm = floats(s.head_dim, 0.3f);
  std::vector<float> mixed_norm = floats(s.heads * s.head_dim, 0.3f, 1);
  std::vector<float> inner_norm = floats(s.width, 0.3f, 1), sinks = floats(s.heads);
  std::int64_t positions = s.past + s.tokens;
  std::vector<float> x = floats(s.batch * s.tokens * s.hidden);
  std::vector<float> keys = floats(s.batch * s.kv_heads * (positions + 3) * s.head_dim);
  std::vector<float> values = floats(s.batch * s.kv_heads * (positions + 3) * s.head_dim);
  std::vector<float> cos = floats(s.tokens * s.head_dim), sin = floats(s.tokens * s.head_dim);
  std::vector<float> float_mask;
  float positive = 0.2f, negative = -0.4f;  // of xielu
  std::vector<std::uint8_t> bool_mask;
  BlockSpec block;
  BlockCall call;

  void SetUp() override {
    AttentionSpec& a = block.attention;
    a.heads = s.heads;
    a.kv_heads = s.kv_heads;
    a.head_dim = s.head_dim;
    a.in = {q.packed, k.packed, v.packed};
    a.q = {0, s.heads / s.kv_heads * s.head_dim, s.head_dim};
    a.k = {s.heads * s.head_dim, s.head_dim, 0};
    a.v = {(s.heads + s.kv_heads) * s.head_dim, s.head_dim, 0};
    if (s.gate_width > 0) {
      a.in.push_back(head_gate.packed);
      a.gate_width = s.gate_width;
      a.gate = {(s.heads + 2 * s.kv_heads) * s.head_dim, s.heads / s.kv_heads * s.gate_width,
                s.gate_width};
      a.gate_activation = s.gate_activation;
    }
    a.norm.kind = s.norm_kind;
    a.norm.weight = norm1.data();
    a.norm.bias = s.norm_kind == NormKind::kLayer ? bias1.data() : nullptr;
    a.norm.eps = 1e-5f;
    if (s.head_norms) {
      a.q_norm = {
          NormKind::kRms, head_norm.data(), nullptr, DType::kFloat32, DType::kFloat32, 1e-6f, 1};
      a.k_norm = a.q_norm;
    }
    a.rope = s.rope;
    a.scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
    a.softcap = s.softcap;
    a.out = o.packed;
    a.multiplier = 0.7f;
    MlpSpec& m = block.mlp;
    m.width = s.width;
    m.gated = s.gated;
    if (s.gated) {
      m.in = {gate.packed, up.packed};
      m.up_offset = s.width;
    } else {
      m.in = {gate.packed};
    }
    m.activation = s.activation;
    m.gate.alpha = 1.3f;
    m.gate.positive = &positive;
    m.gate.negative = &negative;
    m.gate.beta = 0.5f;
    m.norm = a.norm;
    m.norm.weight = norm2.data();
    m.down = down.packed;
    block.parallel = s.parallel;
    if (s.dressed) {
      a.norm_last = true;
      a.sinks = sinks.data();
      a.mixed_norm = a.norm;
      a.mixed_norm.kind = NormKind::kRms;
      a.mixed_norm.weight = mixed_norm.data();
      a.mixed_norm.bias = nullptr;
      m.inner_norm = a.mixed_norm;
      m.inner_norm.weight = inner_norm.data();
      a.post_norm = m.post_norm = a.norm;
      m.post_norm.weight = norm2.data();
    }

    call.x = x.data();
    call.batch = s.batch;
    call.tokens = s.tokens;
    call.hidden = s.hidden;
    call.cos = cos.data();
    call.sin = sin.data();
    call.rope_stride = s.head_dim;
    call.past = s.past;
    call.precision = Precision::kFp32;
    call.causal = s.mask == MaskKind::kNone;
    if (s.mask != MaskKind::kNone) {
      for (std::int64_t i = 0; i < s.batch * s.tokens * positions; ++i) {
        const std::int64_t position = i % positions, token = i / positions % s.tokens;
        const bool seen = position <= s.past + token && (random() % 4 != 0 || position == 0);
        bool_mask.push_back(seen);
        float_mask.push_back(seen ? 0.5f * normal(random) : -1e9f);
      }
      call.mask.kind = s.mask;
      call.mask.data = s.mask == MaskKind::kBool ? static_cast<const void*>(bool_mask.data())
                                                 : static_cast<const void*>(float_mask.data());
      call.mask.batch_stride = s.tokens * positions;
      call.mask.stride = positions;
    }
  }

  CacheView view(std::vector<float>& k_memory, std::vector<float>& v_memory) const {
    const std::int64_t head = (positions + 3) * s.head_dim;
    return {k_memory.data(),
            v_memory.data(),
            DType::kFloat32,
            s.kv_heads * head,
            head,
            s.head_dim,
            s.kv_heads * head,
            head,
            s.head_dim};
  }

  // A head normed and rotated, in the order of the block.
  Vector placed(const NormSpec& head_norm, Vector head, std::int64_t token) const {
    if (!block.attention.norm_last) head = norm(head_norm, std::move(head));
    head = rotated(std::move(head), token);
    return block.attention.norm_last ? norm(head_norm, std::move(head)) : head;
  }

  Vector rotated(Vector head, std::int64_t token) const {
    const RopeSpec& rope = block.attention.rope;
    const int half = rope.width / 2;
    for (int p = 0; p < half && rope.kind != RopeKind::kNone; ++p) {
      const bool halves = rope.kind == RopeKind::kHalves;
      const std::size_t i = static_cast<std::size_t>(rope.begin + (halves ? p : 2 * p));
      const std::size_t j = i + static_cast<std::size_t>(halves ? half : 1);
      const std::size_t at = static_cast<std::size_t>(token * s.head_dim + p * rope.table_step);
      const double a = head[i], b = head[j], c = cos[at], d = sin[at];
      head[i] = a * c - b * d;
      head[j] = b * c + a * d;
    }
    return head;
  }

  // The block as its formula says; fills keys and values.
  Vector expected() {
    Vector result;
    const CacheView cache = view(keys, values);
    const auto at = [&](std::vector<float>& memory, std::int64_t b, std::int64_t h,
                        std::int64_t p) {
      return memory.data() + b * cache.key_batch_stride + h * cache.key_head_stride +
             p * cache.key_stride;
    };
    const std::int64_t d = s.head_dim;
    std::vector<Vector> queries, gates;
    for (std::int64_t t = 0; t < s.batch * s.tokens; ++t) {
      const Vector row(x.begin() + t * s.hidden, x.begin() + (t + 1) * s.hidden);
      const Vector normed = norm(block.attention.norm, row);
      const Vector pq = q.times(normed), pk = k.times(normed), pv = v.times(normed);
      Vector all;
      for (int h = 0; h < s.heads; ++h) {
        const Vector head =
            placed(block.attention.q_norm, Vector(pq.begin() + h * d, pq.begin() + (h + 1) * d),
                   t % s.tokens);
        all.insert(all.end(), head.begin(), head.end());
      }
      queries.push_back(all);
      gates.push_back(head_gate.times(normed));
      for (int h = 0; h < s.kv_heads; ++h) {
        const Vector head =
            placed(block.attention.k_norm, Vector(pk.begin() + h * d, pk.begin() + (h + 1) * d),
                   t % s.tokens);
        for (std::int64_t i = 0; i < d; ++i) {
          const std::int64_t p = s.past + t % s.tokens;
          at(keys, t / s.tokens, h, p)[i] = static_cast<float>(head[static_cast<std::size_t>(i)]);
          at(values, t / s.tokens, h, p)[i] =
              static_cast<float>(pv[static_cast<std::size_t>(h * d + i)]);
        }
      }
    }
    for (std::int64_t t = 0; t < s.batch * s.tokens; ++t) {
      Vector mixed(static_cast<std::size_t>(s.heads * d));
      for (int h = 0; h < s.heads; ++h) {
        const std::int64_t b = t / s.tokens, kv = h / (s.heads / s.kv_heads);
        Vector weights;
        double sum = 0, most = -INFINITY;
        for (std::int64_t p = 0; p < positions; ++p) {
          double score = 0;
          for (std::int64_t i = 0; i < d; ++i) {
            score += queries[static_cast<std::size_t>(t)][static_cast<std::size_t>(h * d + i)] *
                     at(keys, b, kv, p)[i];
          }
          score *= static_cast<double>(block.attention.scale);
          if (s.softcap > 0) score = s.softcap * std::tanh(score / s.softcap);
          const std::size_t m = static_cast<std::size_t>(t * positions + p);
          if (s.mask == MaskKind::kBool && bool_mask[m] == 0) score = -INFINITY;
          if (s.mask == MaskKind::kFloat32) score += float_mask[m];
          if (call.causal && p > s.past + t % s.tokens) score = -INFINITY;
          weights.push_back(score);
          most = std::max(most, score);
        }
        for (double& w : weights) sum += w = std::exp(w - most);
        if (s.dressed) {
          sum += std::exp(static_cast<double>(sinks[static_cast<std::size_t>(h)]) - most);
        }
        for (std::int64_t p = 0; p < positions; ++p) {
          for (std::int64_t i = 0; i < d; ++i) {
            mixed[static_cast<std::size_t>(h * d + i)] +=
                weights[static_cast<std::size_t>(p)] / sum * at(values, b, kv, p)[i];
          }
        }
        for (std::int64_t i = 0; i < d && s.gate_width > 0; ++i) {
          const std::int64_t column = s.gate_width == 1 ? h : h * d + i;
          mixed[static_cast<std::size_t>(h * d + i)] *=
              activation(s.gate_activation,
                         gates[static_cast<std::size_t>(t)][static_cast<std::size_t>(column)]);
        }
      }
      Vector row(x.begin() + t * s.hidden, x.begin() + (t + 1) * s.hidden);
      const Vector before = row;
      const Vector update = o.times(norm(block.attention.mixed_norm, mixed));
      for (std::size_t i = 0; i < row.size(); ++i) row[i] += 0.7f * update[i];
      row = norm(block.attention.post_norm, row);
      const Vector normed = norm(block.mlp.norm, s.parallel ? before : row);
      Vector inner = gate.times(normed);
      const Vector other = up.times(normed);
      for (std::size_t i = 0; i < inner.size(); ++i) {
        inner[i] = activation(s.activation, inner[i], block.mlp.gate) * (s.gated ? other[i] : 1);
      }
      const Vector last = down.times(norm(block.mlp.inner_norm, inner));
      for (std::size_t i = 0; i < row.size(); ++i) row[i] += last[i];
      row = norm(block.mlp.post_norm, row);
      result.insert(result.end(), row.begin(), row.end());
    }
    return result;
  }
};

TEST_P(Block, AgreesWithItsFormula) {
  std::vector<float> have_keys = keys, have_values = values;
  const Vector want = expected();
  std::vector<float> out(x.size());
  call.out = out.data();
  const BlockSpec* const blocks[] = {&block};
  const CacheView caches[] = {view(have_keys, have_values)};
  run_blocks(blocks, caches, call);
  expect_near(out, want);
  expect_near(have_keys, Vector(keys.begin(), keys.end()));
  expect_near(have_values, Vector(values.begin(), values.end()));
}

TEST_P(Block, DoesNotDependOnTheNumberOfThreads) {
  std::vector<float> outs[2];
  for (int threaded = 0; threaded < 2; ++threaded) {
    std::vector<float> k_memory = keys, v_memory = values;
    outs[threaded].resize(x.size());
    call.out = outs[threaded].data();
    const BlockSpec* const blocks[] = {&block, &block};
    const CacheView cache = view(k_memory, v_memory);
    const CacheView caches[] = {cache, cache};
    if (threaded != 0) {
      run_blocks(blocks, caches, call, Threaded());
    } else {
      run_blocks(blocks, caches, call);
    }
  }
  EXPECT_EQ(std::memcmp(outs[0].data(), outs[1].data(), outs[0].size() * 4), 0);
}

// Where products may round, attention of many rows is in bfloat16 on some levels: other paths
// through masks, limits, batches and chunks, with the error of roundings to 8 bits.
TEST_P(Block, RoundedProductsStayNearOnAnyNumberOfThreads) {
  const Vector want = expected();
  call.precision = Precision::kBf16;
  std::vector<float> outs[2];
  for (int threaded = 0; threaded < 2; ++threaded) {
    std::vector<float> k_memory = keys, v_memory = values;
    outs[threaded].resize(x.size());
    call.out = outs[threaded].data();
    const BlockSpec* const blocks[] = {&block};
    const CacheView cache = view(k_memory, v_memory);
    if (threaded != 0) {
      run_blocks(blocks, {&cache, 1}, call, Threaded());
    } else {
      run_blocks(blocks, {&cache, 1}, call);
    }
  }
  EXPECT_EQ(std::memcmp(outs[0].data(), outs[1].data(), outs[0].size() * 4), 0);
  expect_near(outs[0], want, 0.03);
}

TEST_P(Block, TwoPartsMakeTheWhole) {
  const Vector want = expected();
  std::vector<float> out(x.size());
  call.out = out.data();
  const std::int64_t d = s.head_dim, rows = s.batch * s.tokens;
  std::vector<float> new_q(static_cast<std::size_t>(rows * s.heads * (d + s.gate_width)));
  std::vector<float> new_k(static_cast<std::size_t>(rows * s.kv_heads * d)), new_v(new_k.size());
  project(block, call, new_q.data(), new_k.data(), new_v.data());
  attend(block, call, new_q.data(), view(keys, values), positions);
  expect_near(out, want);
}

// Keys and values in bfloat16 against the same numbers in float32, which other kernels may read.
TEST_P(Block, CachesInBFloat16AreReadAsTheyAre) {
  expected();  // fills in the new keys and values
  const cpu::FusedKernels& kernels = cpu::fused_kernels();
  std::vector<std::uint16_t> halves[2];
  std::vector<float>* const floats_of[2] = {&keys, &values};
  for (int i = 0; i < 2; ++i) {
    const auto n = static_cast<std::int64_t>(floats_of[i]->size());
    halves[i].resize(floats_of[i]->size());
    kernels.store(floats_of[i]->data(), DType::kBFloat16, n, halves[i].data());
    kernels.load(halves[i].data(), DType::kBFloat16, n, floats_of[i]->data());
  }
  const std::int64_t rows = s.batch * s.tokens, d = s.head_dim;
  std::vector<float> new_q(static_cast<std::size_t>(rows * s.heads * (d + s.gate_width)));
  std::vector<float> new_k(static_cast<std::size_t>(rows * s.kv_heads * d)), new_v(new_k.size());
  project(block, call, new_q.data(), new_k.data(), new_v.data());
  std::vector<float> out(x.size()), want(x.size());
  CacheView cache = view(keys, values);
  call.out = want.data();
  attend(block, call, new_q.data(), cache, positions);
  cache.keys = halves[0].data();
  cache.values = halves[1].data();
  cache.dtype = DType::kBFloat16;
  call.out = out.data();
  attend(block, call, new_q.data(), cache, positions, Threaded());
  expect_near(out, Vector(want.begin(), want.end()));
}

// Blocks of a quantized cache with room for everything, filled with rubbish.
struct Packed {
  CachedHeads heads;
  std::vector<std::byte> memory;

  Packed(std::int64_t count, std::int64_t positions, std::int64_t d, CacheFormat format,
         CachePart part) {
    const std::int64_t blocks = (positions + kCacheBlock - 1) / kCacheBlock;
    heads.stride = blocks * cache_block_bytes(d);
    memory.assign(static_cast<std::size_t>(count * heads.stride), std::byte{0xff});
    heads.blocks = memory.data();
    heads.heads = count;
    heads.head_dim = d;
    heads.format = format;
    heads.part = part;
  }
  Packed(const Packed&) = delete;

  std::vector<float> read(std::int64_t positions) const {
    std::vector<float> out(static_cast<std::size_t>(heads.heads * positions * heads.head_dim));
    cache_read(heads, positions, out.data(), DType::kFloat32);
    return out;
  }
};

// docs/numerics.md, Quantized keys and values: half a step of int8; 2^-4 of the value or half the
// smallest step of e4m3. Plus what is left of the products' own error.
void expect_quantized(const std::vector<float>& have, const std::vector<float>& want,
                      std::int64_t d, CacheFormat format) {
  ASSERT_EQ(have.size(), want.size());
  float size = 0;
  for (float w : want) size = std::max(size, std::fabs(w));
  const auto n = static_cast<std::int64_t>(want.size());
  for (std::int64_t row = 0; row < n; row += d) {
    for (std::int64_t g = row; g < row + d; g += kCacheGroup) {
      float absmax = 0;
      const std::int64_t end = std::min(row + d, g + kCacheGroup);
      for (std::int64_t i = g; i < end; ++i) {
        absmax = std::max(absmax, std::fabs(want[static_cast<std::size_t>(i)]));
      }
      for (std::int64_t i = g; i < end; ++i) {
        const float w = want[static_cast<std::size_t>(i)];
        const float step = 1.0f + 0x1p-7f;
        const float bound = format == CacheFormat::kInt8
                                ? absmax / 254 * step
                                : std::max(std::fabs(w) * 0x1p-4f, absmax / 448 * 0x1p-10f * step);
        ASSERT_NEAR(have[static_cast<std::size_t>(i)], w, bound * 1.01f + 3e-4f * size);
      }
    }
  }
}

TEST_P(Block, QuantizedCachesHoldTheBoundAndAreReadAsTheyAre) {
  const std::int64_t d = s.head_dim, heads = s.batch * s.kv_heads, rows = s.batch * s.tokens;
  const auto part_of = [&](const std::vector<float>& all, std::int64_t stride, std::int64_t count) {
    std::vector<float> part;
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto begin = all.begin() + h * stride * d;
      part.insert(part.end(), begin, begin + count * d);
    }
    return part;
  };
  const std::vector<float> old_keys = part_of(keys, positions + 3, s.past);
  const std::vector<float> old_values = part_of(values, positions + 3, s.past);
  expected();  // fills in the new ones
  for (const CacheFormat format : {CacheFormat::kInt8, CacheFormat::kFp8}) {
    Packed k_packed(heads, positions, d, format, CachePart::kKeys);
    Packed v_packed(heads, positions, d, format, CachePart::kValues);
    cache_append(k_packed.heads, 0, s.past, old_keys.data(), DType::kFloat32);
    cache_append(v_packed.heads, 0, s.past, old_values.data(), DType::kFloat32, Threaded());
    CacheView cache;
    cache.keys = k_packed.memory.data();
    cache.values = v_packed.memory.data();
    cache.format = format;
    cache.key_head_stride = cache.value_head_stride = k_packed.heads.stride;
    cache.key_batch_stride = cache.value_batch_stride = s.kv_heads * k_packed.heads.stride;
    std::vector<float> out(x.size());
    call.out = out.data();
    const BlockSpec* const blocks[] = {&block};
    run_blocks(blocks, {&cache, 1}, call, Threaded());

    std::vector<float> k_read = k_packed.read(positions), v_read = v_packed.read(positions);
    expect_quantized(k_read, part_of(keys, positions + 3, positions), d, format);
    expect_quantized(v_read, part_of(values, positions + 3, positions), d, format);

    // The same attention over what was read.
    std::vector<float> q_new(static_cast<std::size_t>(rows * s.heads * (d + s.gate_width)));
    std::vector<float> k_new(static_cast<std::size_t>(rows * s.kv_heads * d)), v_new(k_new.size());
    project(block, call, q_new.data(), k_new.data(), v_new.data());
    const std::int64_t head = positions * d, row = s.kv_heads * head;
    std::vector<float> want(x.size());
    call.out = want.data();
    attend(block, call, q_new.data(),
           {k_read.data(), v_read.data(), DType::kFloat32, row, head, d, row, head, d}, positions);
    expect_near(out, Vector(want.begin(), want.end()));

    // Where products may round, many rows read it through bfloat16.
    call.precision = Precision::kBf16;
    call.out = out.data();
    attend(block, call, q_new.data(), cache, positions, Threaded());
    expect_near(out, Vector(want.begin(), want.end()), 0.03);
    call.precision = Precision::kFp32;
  }
}

constexpr RopeSpec kHalf{RopeKind::kHalves, 0, 16, 1};
INSTANTIATE_TEST_SUITE_P(
    Shapes, Block,
    testing::Values(Shape{"llama_decode", 6, 2, 16, 64, 96, 1, 1, 70, kHalf, NormKind::kRms, false,
                          false, true, false, Activation::kSilu, 0, MaskKind::kNone},
                    Shape{"llama_prompt", 4, 4, 16, 64, 96, 1, 130, 0, kHalf, NormKind::kRms, false,
                          false, true, false, Activation::kSilu, 0, MaskKind::kNone},
                    Shape{"append_to_a_batch", 4, 1, 16, 64, 96, 3, 5, 9, kHalf, NormKind::kRms,
                          true, true, true, false, Activation::kGeluTanh, 0, MaskKind::kBool},
                    Shape{"odd_head_size", 2, 1, 20, 40, 36, 2, 3, 4,
                          RopeSpec{RopeKind::kInterleaved, 4, 12, 1}, NormKind::kLayer, false, true,
                          false, true, Activation::kGelu, 0, MaskKind::kFloat32},
                    Shape{"interleaved_table", 2, 2, 24, 48, 64, 1, 7, 0,
                          RopeSpec{RopeKind::kInterleaved, 0, 24, 2}, NormKind::kRms, false, false,
                          false, false, Activation::kRelu2, 30, MaskKind::kNone},
                    Shape{"no_rotation", 8, 2, 32, 96, 33, 1, 1, 0, RopeSpec{}, NormKind::kLayer,
                          false, true, true, true, Activation::kQuickGelu, 0, MaskKind::kNone},
                    Shape{"long_cache", 3, 1, 16, 32, 32, 2, 1, 1500, kHalf, NormKind::kRms, false,
                          false, true, false, Activation::kRelu, 0, MaskKind::kNone},
                    Shape{"wide_head", 2, 1, 80, 64, 64, 1, 2, 66, kHalf, NormKind::kRms, true,
                          false, true, false, Activation::kTanh, 0, MaskKind::kBool},
                    Shape{"many_tokens", 2, 1, 8, 16, 16, 1, 600, 2,
                          RopeSpec{RopeKind::kHalves, 0, 8, 1}, NormKind::kRms, false, false, true,
                          false, Activation::kSigmoid, 0, MaskKind::kNone},
                    Shape{"many_rows_of_a_batch", 8, 2, 64, 64, 32, 2, 40, 100, kHalf,
                          NormKind::kRms, false, false, true, false, Activation::kSilu, 0,
                          MaskKind::kFloat32},
                    Shape{"dressed_prompt", 6, 2, 48, 64, 32, 1, 150, 90, kHalf, NormKind::kLayer,
                          true, true, true, false, Activation::kSilu, 8, MaskKind::kNone, true},
                    Shape{"gated_decode",
                          6,
                          2,
                          16,
                          64,
                          96,
                          1,
                          1,
                          600,
                          kHalf,
                          NormKind::kRms,
                          true,
                          true,
                          true,
                          false,
                          Activation::kSilu,
                          0,
                          MaskKind::kNone,
                          false,
                          16},
                    Shape{"gated_prompt",
                          4,
                          2,
                          32,
                          64,
                          48,
                          2,
                          33,
                          5,
                          kHalf,
                          NormKind::kRms,
                          false,
                          false,
                          true,
                          false,
                          Activation::kSilu,
                          0,
                          MaskKind::kBool,
                          true,
                          32},
                    Shape{"gated_by_heads",
                          4,
                          2,
                          20,
                          64,
                          48,
                          2,
                          9,
                          3,
                          RopeSpec{},
                          NormKind::kRms,
                          false,
                          false,
                          true,
                          true,
                          Activation::kSoftplus,
                          0,
                          MaskKind::kNone,
                          false,
                          1,
                          Activation::kSoftplus},
                    Shape{"xielu", 4, 2, 16, 64, 90, 1, 5, 0, kHalf, NormKind::kRms, false, false,
                          false, false, Activation::kXielu, 0, MaskKind::kNone},
                    Shape{"swish", 4, 2, 16, 64, 90, 1, 5, 0, kHalf, NormKind::kRms, false, false,
                          true, false, Activation::kSwish, 0, MaskKind::kNone},
                    Shape{"dressed", 4, 2, 16, 64, 96, 2, 3, 5, kHalf, NormKind::kLayer, true, true,
                          true, false, Activation::kSilu, 0, MaskKind::kBool, true},
                    Shape{"dressed_long_cache", 4, 2, 16, 64, 96, 1, 1, 1100, kHalf, NormKind::kRms,
                          true, false, false, false, Activation::kGelu, 0, MaskKind::kNone, true}),
    name_of);

// A cross attention reads keys and values as they are: what an ordinary attention writes and reads.
TEST_P(Block, CrossAttentionReadsWhatIsThere) {
  if (call.causal && s.tokens > 1) GTEST_SKIP() << "a cross attention is never causal";
  block.attention.rope = {};
  const Vector want = expected();
  block.attention.cross = true;
  std::vector<float> out(x.size());
  call.out = out.data();
  const std::vector<float> before = keys;
  const BlockSpec* const blocks[] = {&block};
  CacheView cache = view(keys, values);
  cache.positions = positions;
  std::swap(call.mask, call.cross_mask);
  run_blocks(blocks, {&cache, 1}, call);
  expect_near(out, want);
  EXPECT_EQ(keys, before);
}

TEST_P(Block, ColumnsAreTheProjectionsOfTheNorm) {
  const std::int64_t rows = s.batch * s.tokens;
  const std::int64_t width =
      (s.heads + 2 * s.kv_heads) * s.head_dim + std::int64_t{s.heads} * s.gate_width;
  std::vector<float> normed(x.size()), projected(static_cast<std::size_t>(rows * width));
  columns(block, call, normed.data(), projected.data());
  Vector want_normed, want;
  for (std::int64_t t = 0; t < rows; ++t) {
    const Vector row = norm(block.attention.norm,
                            Vector(x.begin() + t * s.hidden, x.begin() + (t + 1) * s.hidden));
    want_normed.insert(want_normed.end(), row.begin(), row.end());
    for (const Weight* weight : {&q, &k, &v, &head_gate}) {
      if (weight == &head_gate && s.gate_width == 0) continue;
      const Vector part = weight->times(row);
      want.insert(want.end(), part.begin(), part.end());
    }
  }
  expect_near(normed, want_normed);
  expect_near(projected, want);
}

TEST(Kernels, NothingSeenGivesZeroAndNanStays) {
  const cpu::FusedKernels& kernels = cpu::fused_kernels();
  constexpr int d = 16;
  std::vector<float> q(d, 1.0f), k(3 * d, 1.0f), v(3 * d, 2.0f), acc(d);
  std::vector<float> scratch(static_cast<std::size_t>(kernels.attend_scratch(1, d, d)));
  float max = 0, sum = 0;
  cpu::AttendRows args{};
  args.q = q.data();
  args.rows = 1;
  args.d = args.values_d = d;
  args.keys = k.data();
  args.values = v.data();
  args.dtype = DType::kFloat32;
  args.key_stride = args.value_stride = d;
  args.end = 3;
  const std::int64_t limits[] = {0};
  args.limits = limits;
  args.acc = acc.data();
  args.max = &max;
  args.sum = &sum;
  args.scratch = scratch.data();
  kernels.attend(args);
  EXPECT_EQ(sum, 0);
  args.limits = nullptr;
  k[d] = NAN;
  kernels.attend(args);
  EXPECT_TRUE(std::isnan(sum));
}

TEST(Kernels, StoresRoundToNearestAndKeepNan) {
  const cpu::FusedKernels& kernels = cpu::fused_kernels();
  const float values[] = {1.0f,      -2.5f, 1.00390625f, 1.01171875f, NAN,  INFINITY,
                          -INFINITY, 0.0f,  -0.0f,       1e-40f,      3e38f};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (int repeat = 0; repeat < 2; ++repeat) {  // through vectors and through the rest
      std::vector<float> from;
      for (int i = 0; i < (repeat == 0 ? 3 : 1); ++i) from.insert(from.end(), values, values + 11);
      std::vector<float> memory(from.size()), back(from.size());
      const auto n = static_cast<std::int64_t>(from.size());
      kernels.store(from.data(), dtype, n, memory.data());
      kernels.load(memory.data(), dtype, n, back.data());
      for (std::size_t i = 0; i < from.size(); ++i) {
        if (std::isnan(from[i])) {
          EXPECT_TRUE(std::isnan(back[i]));
        } else if (std::isinf(from[i]) || from[i] == 0) {
          EXPECT_EQ(back[i], from[i]);
        } else if (dtype == DType::kFloat16 && std::fabs(from[i]) > 65520) {
          EXPECT_TRUE(std::isinf(back[i]));
        } else {
          const float unit = dtype == DType::kFloat32   ? 0
                             : dtype == DType::kFloat16 ? 0x1p-11f
                                                        : 0x1p-8f;
          EXPECT_LE(std::fabs(back[i] - from[i]), unit * std::fabs(from[i]) + 0x1p-25f);
        }
      }
    }
  }
}

// The layout that lowbit/fused.h draws, byte by byte.
TEST(QuantizedCache, BytesLieWhereTheyAreDrawn) {
  constexpr int d = 20;
  ASSERT_EQ(cache_block_bytes(d), 64 * (32 + 2));
  std::vector<float> x(2 * d);
  for (int i = 0; i < d; ++i) x[static_cast<std::size_t>(d + i)] = static_cast<float>(i - 8) * 8;
  x[2 * d - 1] = 127;
  for (const CachePart part : {CachePart::kKeys, CachePart::kValues}) {
    Packed packed(1, 64, d, CacheFormat::kInt8, part);
    cache_append(packed.heads, 5, 2, x.data(), DType::kFloat32);
    for (int i = 0; i < 32; ++i) {
      const int code = i >= d ? 0 : i == d - 1 ? 127 : (i - 8) * 8;
      const int at =
          part == CachePart::kKeys ? (i / 4 * 64 + 6) * 4 + i % 4 : (6 / 4 * 32 + i) * 4 + 6 % 4;
      const auto byte = static_cast<std::uint8_t>(part == CachePart::kKeys ? code + 128 : code);
      EXPECT_EQ(static_cast<std::uint8_t>(packed.memory[static_cast<std::size_t>(at)]), byte) << i;
    }
    std::uint16_t scales[2];
    std::memcpy(scales, packed.memory.data() + 64 * 32 + 5 * 2, 4);
    EXPECT_EQ(scales[0], 0);       // a head of zeros
    EXPECT_EQ(scales[1], 0x3f80);  // 127 / 127
  }
}

TEST(QuantizedCache, EveryFp8ValueComesBackAndTheRestIsRoundedToTheNearest) {
  std::vector<float> values;
  for (int code = 0; code < 127; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    values.push_back(exponent == 0
                         ? std::ldexp(static_cast<float>(mantissa), -9)
                         : std::ldexp(1.0f + static_cast<float>(mantissa) / 8, exponent - 7));
  }
  const auto through = [](float value) {
    Packed packed(1, 1, 4, CacheFormat::kFp8, CachePart::kValues);
    const float row[4] = {448, value, -value, 0};
    cache_append(packed.heads, 0, 1, row, DType::kFloat32);
    const std::vector<float> read = packed.read(1);
    EXPECT_EQ(read[0], 448);
    EXPECT_EQ(read[1], -read[2]);
    return read[1];
  };
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(through(values[i]), values[i]);
    if (i + 1 == values.size()) continue;
    const float middle = (values[i] + values[i + 1]) / 2;
    EXPECT_EQ(through(middle), values[i + i % 2]) << "ties to even";
    EXPECT_EQ(through(std::nextafter(middle, 0.0f)), values[i]);
    EXPECT_EQ(through(std::nextafter(middle, 999.0f)), values[i + 1]);
  }
}

TEST(QuantizedCache, WhatIsNotFiniteStaysInItsGroup) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const CacheFormat format : {CacheFormat::kInt8, CacheFormat::kFp8}) {
      Packed packed(1, 2, 40, format, CachePart::kKeys);
      std::vector<float> x(80, 1.0f);
      x[33] = bad;
      cache_append(packed.heads, 0, 2, x.data(), DType::kFloat32);
      const std::vector<float> read = packed.read(2);
      for (std::size_t i = 0; i < read.size(); ++i) {
        EXPECT_EQ(std::isnan(read[i]), i >= 32 && i < 40) << i;
      }
    }
  }
}

TEST(Blocks, ShapesThatDisagreeRaise) {
  BlockSpec block;
  block.attention.heads = 3;
  block.attention.kv_heads = 2;
  BlockCall call;
  float x = 0;
  call.x = call.out = &x;
  call.hidden = 1;
  const BlockSpec* const blocks[] = {&block};
  EXPECT_THROW(run_blocks(blocks, {}, call), Error);
}

}  // namespace
}  // namespace lowbit
