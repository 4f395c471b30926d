// Latent attention and values of another size than keys against their formulas in float64; runs
// once per instruction set (label per_isa).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "fused/support.h"
#include "lowbit/error.h"
#include "lowbit/fused.h"

namespace lowbit {
namespace {

struct Shape {
  const char* name;
  int heads, own, tail, value_dim, width;  // a key has own + tail channels; width 0: no latents
  int low_rank;                            // of queries; 0: none
  std::int64_t batch, tokens, past;
  RopeKind rope;
  int gate_width = 0;
  bool sinks = false;
  MaskKind mask = MaskKind::kNone;
};

std::string name_of(const testing::TestParamInfo<Shape>& info) {
  return info.param.name;
}

constexpr std::int64_t kHidden = 64;

class Latent : public testing::TestWithParam<Shape> {
 protected:
  const Shape& s = GetParam();
  std::mt19937 random{11};
  std::normal_distribution<float> normal;

  std::vector<float> floats(std::int64_t count, float scale = 1, float offset = 0) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = offset + scale * normal(random);
    return values;
  }

  int d = s.own + s.tail;
  bool latent = s.width > 0;
  // Columns: queries or their latent, then the latent and the tail, or keys and values; gates.
  int q_columns = s.low_rank > 0 ? s.low_rank : s.heads* d;
  int kept_keys = latent ? s.width : s.heads * d;
  int kept_values = latent ? s.tail : s.heads * s.value_dim;
  Weight q{q_columns, kHidden, true, random};
  Weight kv{kept_keys + kept_values, kHidden, true, random};
  Weight gates{std::max(1, s.heads* s.gate_width), kHidden, false, random};
  Weight q_up{s.heads * d, std::max(s.low_rank, 1), false, random};
  // A few rows of every head belong to nothing.
  int rows = 3 + s.own + s.value_dim;
  Weight expand{s.heads * rows, std::max(s.width, 1), false, random};
  Weight o{kHidden, s.heads* s.value_dim, false, random};
  std::vector<float> norm1 = floats(kHidden, 0.3f, 1);
  std::vector<float> q_norm = floats(std::max(s.low_rank, 1), 0.3f, 1);
  std::vector<float> kv_norm = floats(std::max(s.width, 1), 0.3f, 1);
  std::vector<float> sinks = floats(s.heads);
  std::int64_t positions = s.past + s.tokens, room = positions + 5;
  int cache_heads = latent ? 1 : s.heads;
  int key_size = latent ? s.width : d, value_size = latent ? s.tail : s.value_dim;
  std::vector<float> x = floats(s.batch * s.tokens * kHidden);
  std::vector<float> keys = floats(s.batch * cache_heads * room * key_size);
  std::vector<float> values = floats(s.batch * cache_heads * room * value_size);
  std::vector<float> cos = floats(s.tokens * s.tail), sin = floats(s.tokens * s.tail);
  std::vector<std::uint8_t> mask;
  BlockSpec block;
  BlockCall call;

  void SetUp() override {
    AttentionSpec& a = block.attention;
    a.heads = a.kv_heads = s.heads;
    a.head_dim = d;
    a.value_dim = s.value_dim;
    a.in = {q.packed, kv.packed};
    a.norm = norm_of(norm1);
    a.q = {0, d, d};
    if (s.low_rank > 0) a.low_rank = {s.low_rank, 0, norm_of(q_norm), q_up.packed};
    if (latent) {
      a.latent = {s.width, q_columns, norm_of(kv_norm), s.tail, q_columns + s.width, expand.packed,
                  rows,    1,         s.own + 2};
    } else {
      a.k = {q_columns, d, 0};
      a.v = {q_columns + s.heads * d, s.value_dim, 0};
    }
    if (s.gate_width > 0) {
      a.in.push_back(gates.packed);
      a.gate_width = s.gate_width;
      a.gate = {q_columns + kept_keys + kept_values, s.gate_width, 0};
    }
    if (s.sinks) a.sinks = sinks.data();
    a.rope = {s.rope, s.own, s.tail, 1};
    a.scale = 0.8f / std::sqrt(static_cast<float>(d));
    a.out = o.packed;
    call.x = x.data();
    call.batch = s.batch;
    call.tokens = s.tokens;
    call.hidden = kHidden;
    call.cos = cos.data();
    call.sin = sin.data();
    call.rope_stride = s.tail;
    call.past = s.past;
    call.precision = Precision::kFp32;
    call.causal = s.mask == MaskKind::kNone;
    if (!call.causal) {
      for (std::int64_t i = 0; i < s.batch * s.heads * s.tokens * positions; ++i) {
        const std::int64_t position = i % positions, token = i / positions % s.tokens;
        mask.push_back(position <= s.past + token && (random() % 4 != 0 || position == 0));
      }
      call.mask = {mask.data(), s.mask, s.heads * s.tokens * positions, s.tokens * positions,
                   positions};
    }
  }

  static NormSpec norm_of(const std::vector<float>& weight) {
    NormSpec norm;
    norm.kind = NormKind::kRms;
    norm.weight = weight.data();
    norm.eps = 1e-5f;
    return norm;
  }

  CacheView view(std::vector<float>& k, std::vector<float>& v) const {
    CacheView cache;
    cache.keys = k.data();
    cache.values = v.data();
    cache.key_stride = key_size;
    cache.key_head_stride = room * key_size;
    cache.key_batch_stride = cache_heads * cache.key_head_stride;
    cache.value_stride = value_size;
    cache.value_head_stride = room * value_size;
    cache.value_batch_stride = cache_heads * cache.value_head_stride;
    return cache;
  }

  void rotate(Vector& head, std::size_t begin, std::int64_t token) const {
    const std::size_t half = static_cast<std::size_t>(s.tail / 2);
    const Vector part(head.begin() + static_cast<std::ptrdiff_t>(begin), head.end());
    for (std::size_t p = 0; p < half && s.rope != RopeKind::kNone; ++p) {
      const bool halves = s.rope == RopeKind::kHalves;
      const double a = part[halves ? p : 2 * p], b = part[halves ? p + half : 2 * p + 1];
      const std::size_t at = static_cast<std::size_t>(token * s.tail) + p;
      const double c = double{cos[at]}, e = double{sin[at]};
      const bool apart = s.rope != RopeKind::kInterleaved;
      head[begin + (apart ? p : 2 * p)] = a * c - b * e;
      head[begin + (apart ? p + half : 2 * p + 1)] = b * c + a * e;
    }
  }

  static Vector slice(const Vector& from, std::int64_t at, std::int64_t count) {
    return {from.begin() + at, from.begin() + at + count};
  }

  // Fills keys and values as the cache keeps them.
  Vector expected() {
    std::vector<Vector> queries, gate_rows;
    for (std::int64_t t = 0; t < s.batch * s.tokens; ++t) {
      const std::int64_t b = t / s.tokens, at = s.past + t % s.tokens;
      const Vector normed = norm(block.attention.norm,
                                 Vector(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden));
      Vector query = q.times(normed);
      if (s.low_rank > 0) query = q_up.times(norm(block.attention.low_rank.norm, query));
      Vector turned;
      for (int h = 0; h < s.heads; ++h) {
        Vector head = slice(query, h * d, d);
        rotate(head, static_cast<std::size_t>(s.own), t % s.tokens);
        turned.insert(turned.end(), head.begin(), head.end());
      }
      queries.push_back(turned);
      gate_rows.push_back(gates.times(normed));
      const Vector made = kv.times(normed);
      for (int h = 0; h < cache_heads; ++h) {
        Vector key = slice(made, h * key_size, key_size);
        Vector value = slice(made, kept_keys + h * value_size, value_size);
        if (latent) {
          key = norm(block.attention.latent.norm, key);
          rotate(value, 0, t % s.tokens);
        } else {
          rotate(key, static_cast<std::size_t>(s.own), t % s.tokens);
        }
        const std::int64_t row = (b * cache_heads + h) * room + at;
        for (int i = 0; i < key_size; ++i) {
          keys[static_cast<std::size_t>(row * key_size + i)] =
              static_cast<float>(key[static_cast<std::size_t>(i)]);
        }
        for (int i = 0; i < value_size; ++i) {
          values[static_cast<std::size_t>(row * value_size + i)] =
              static_cast<float>(value[static_cast<std::size_t>(i)]);
        }
      }
    }
    std::vector<Vector> expanded;
    for (std::int64_t row = 0; row < s.batch * room && latent; ++row) {
      const bool held = row % room < positions;
      expanded.push_back(held ? expand.times(Vector(keys.begin() + row * key_size,
                                                    keys.begin() + (row + 1) * key_size))
                              : Vector());
    }
    Vector result;
    for (std::int64_t t = 0; t < s.batch * s.tokens; ++t) {
      const std::int64_t b = t / s.tokens;
      Vector mixed(static_cast<std::size_t>(s.heads * s.value_dim));
      for (int h = 0; h < s.heads; ++h) {
        std::vector<Vector> seen_values;
        Vector scores;
        double most = -INFINITY, sum = 0;
        for (std::int64_t p = 0; p < positions; ++p) {
          const std::int64_t row = latent ? b * room + p : (b * s.heads + h) * room + p;
          Vector key(keys.begin() + row * key_size, keys.begin() + (row + 1) * key_size);
          Vector value(values.begin() + row * value_size, values.begin() + (row + 1) * value_size);
          if (latent) {
            const Vector& all = expanded[static_cast<std::size_t>(row)];
            key = slice(all, h * rows + 1, s.own);
            key.insert(key.end(), value.begin(), value.end());
            value = slice(all, h * rows + s.own + 2, s.value_dim);
          }
          double score = 0;
          for (int i = 0; i < d; ++i) {
            score += queries[static_cast<std::size_t>(t)][static_cast<std::size_t>(h * d + i)] *
                     key[static_cast<std::size_t>(i)];
          }
          score *= double{block.attention.scale};
          const std::size_t m = static_cast<std::size_t>(
              ((b * s.heads + h) * s.tokens + t % s.tokens) * positions + p);
          if (call.causal ? p > s.past + t % s.tokens : mask[m] == 0) score = -INFINITY;
          scores.push_back(score);
          seen_values.push_back(value);
          most = std::max(most, score);
        }
        for (double& w : scores) sum += w = std::exp(w - most);
        if (s.sinks) sum += std::exp(double{sinks[static_cast<std::size_t>(h)]} - most);
        for (std::size_t p = 0; p < scores.size(); ++p) {
          for (int i = 0; i < s.value_dim; ++i) {
            mixed[static_cast<std::size_t>(h * s.value_dim + i)] +=
                scores[p] / sum * seen_values[p][static_cast<std::size_t>(i)];
          }
        }
        for (int i = 0; i < s.value_dim && s.gate_width > 0; ++i) {
          const int at = s.gate_width == 1 ? h : h * s.gate_width + i;
          mixed[static_cast<std::size_t>(h * s.value_dim + i)] *=
              activation(Activation::kSigmoid,
                         gate_rows[static_cast<std::size_t>(t)][static_cast<std::size_t>(at)]);
        }
      }
      const Vector update = o.times(mixed);
      for (std::size_t i = 0; i < update.size(); ++i) {
        result.push_back(double{x[static_cast<std::size_t>(t * kHidden) + i]} + update[i]);
      }
    }
    return result;
  }

  std::vector<float> run(std::vector<float>& k, std::vector<float>& v,
                         const Threads& threads = serial_threads()) {
    std::vector<float> out(x.size(), NAN);
    call.out = out.data();
    const BlockSpec* const blocks[] = {&block};
    const CacheView caches[] = {view(k, v)};
    run_blocks(blocks, caches, call, threads);
    return out;
  }
};

TEST_P(Latent, AgreesWithItsFormula) {
  std::vector<float> k = keys, v = values;
  const Vector want = expected();
  expect_near(run(k, v), want);
  expect_near(k, Vector(keys.begin(), keys.end()));
  expect_near(v, Vector(values.begin(), values.end()));
}

TEST_P(Latent, DoesNotDependOnTheNumberOfThreads) {
  std::vector<float> k = keys, v = values, k2 = keys, v2 = values;
  EXPECT_EQ(run(k, v), run(k2, v2, Threaded()));
}

TEST_P(Latent, RoundedProductsStayNear) {
  std::vector<float> k = keys, v = values;
  const Vector want = expected();
  call.precision = Precision::kBf16;
  expect_near(run(k, v), want, 0.03);
}

// By parts, for caches that others keep.
TEST_P(Latent, ProjectedAndAttendedItIsTheSame) {
  std::vector<float> k = keys, v = values;
  const std::vector<float> want = run(k, v);
  const std::int64_t count = s.batch * s.tokens, width = d + s.gate_width;
  std::vector<float> queries(static_cast<std::size_t>(count * s.heads * width));
  std::vector<float> new_keys(static_cast<std::size_t>(count * cache_heads * key_size));
  std::vector<float> new_values(static_cast<std::size_t>(count * cache_heads * value_size));
  project(block, call, queries.data(), new_keys.data(), new_values.data());
  for (std::int64_t b = 0; b < s.batch * cache_heads; ++b) {
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      for (int i = 0; i < key_size; ++i) {
        ASSERT_EQ(new_keys[static_cast<std::size_t>((b * s.tokens + t) * key_size + i)],
                  k[static_cast<std::size_t>((b * room + s.past + t) * key_size + i)]);
      }
      for (int i = 0; i < value_size; ++i) {
        ASSERT_EQ(new_values[static_cast<std::size_t>((b * s.tokens + t) * value_size + i)],
                  v[static_cast<std::size_t>((b * room + s.past + t) * value_size + i)]);
      }
    }
  }
  std::vector<float> out(x.size(), NAN);
  call.out = out.data();
  attend(block, call, queries.data(), view(k, v), positions);
  expect_near(out, Vector(want.begin(), want.end()), 1e-5);
}

TEST_P(Latent, RefusesProductsThatDoNotFit) {
  if (!latent) GTEST_SKIP() << "a shape without latents";
  std::vector<float> k = keys, v = values;
  block.attention.latent.head_rows -= 1;
  EXPECT_THROW(run(k, v), Error);
}

constexpr RopeKind kPairs = RopeKind::kPairsToHalves;

INSTANTIATE_TEST_SUITE_P(
    Shapes, Latent,
    testing::Values(
        Shape{"token", 4, 16, 16, 24, 48, 40, 1, 1, 130, kPairs},
        Shape{"token_of_odd_sizes", 5, 12, 6, 10, 36, 0, 2, 1, 9, RopeKind::kHalves},
        // Few rows over positions that are read in parts.
        Shape{"token_far_on", 4, 16, 8, 16, 32, 0, 1, 1, 1200, RopeKind::kInterleaved, 1, true},
        Shape{"many_heads", 30, 8, 8, 16, 64, 0, 1, 2, 300, kPairs},
        Shape{"several", 4, 16, 16, 16, 48, 40, 2, 3, 70, kPairs, 0, false, MaskKind::kBool},
        Shape{"prompt", 4, 16, 16, 24, 48, 40, 1, 37, 0, kPairs},
        Shape{"prompt_with_mask", 3, 21, 10, 13, 40, 0, 2, 33, 4, RopeKind::kHalves, 1, true,
              MaskKind::kBool},
        Shape{"no_rotation", 4, 16, 16, 16, 48, 0, 1, 5, 2, RopeKind::kNone},
        Shape{"longer_than_a_chunk", 2, 8, 8, 8, 16, 0, 1, 520, 0, RopeKind::kHalves},
        // More than is expanded at a time.
        Shape{"heads_in_parts", 64, 4, 4, 4, 64, 0, 1, 1, 3500, RopeKind::kHalves, 0, true},
        Shape{"wide_keys", 4, 8, 16, 16, 0, 0, 2, 7, 5, RopeKind::kHalves, 16},
        Shape{"wide_keys_token", 4, 8, 16, 12, 0, 24, 1, 1, 700, kPairs},
        Shape{"wide_keys_prompt", 4, 8, 16, 12, 0, 0, 1, 90, 3, RopeKind::kHalves, 0, true},
        Shape{"wide_values", 4, 4, 12, 40, 0, 0, 1, 40, 3, RopeKind::kHalves}),
    name_of);

}  // namespace
}  // namespace lowbit
