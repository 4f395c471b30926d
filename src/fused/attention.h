// Attention of a chunk of tokens over a cache, in float32 or in bfloat16.
#pragma once

#include "fused/projections.h"
#include "fused/work.h"

namespace lowbit::fused {

// Rows that one attention task computes: enough that transposing a block of keys (about 1 / 6 of a
// product row per key) is paid by many, few enough that rows and scores stay in an L1.
constexpr int kTaskRows = 24;

inline std::int64_t mask_bytes(MaskKind kind) {
  return kind == MaskKind::kBool ? 1 : kind == MaskKind::kFloat32 ? 4 : 2;
}

// The attention of one chunk of tokens: what its tasks, in float32 or in bfloat16, have in common.
// q is float32, scaled, [batch, tokens, heads, query_width]; out is [count, heads * values_d].
struct Attention {
  const Work& work;
  const AttentionSpec& spec;
  const float* q;
  const CacheView& cache;
  std::int64_t positions, begin, end;
  float* out;
  // Latents are keys and values of all heads, and tails end the keys.
  bool over_latents = false;
  // Heads of a row of q and of `out`: more than spec.heads where those are worked on in parts.
  int row_heads = spec.heads;
  const BlockCall& call = work.call;
  MaskView mask = spec.cross ? call.cross_mask : call.mask;
  bool causal = call.causal && !spec.cross;
  int d = spec.head_dim, values_d = spec.values();
  int group = spec.heads / spec.kv_heads;
  std::int64_t element = cache.format == CacheFormat::kFloat ? bytes_of(cache.dtype) : 1;

  const float* query(std::int64_t token, std::int64_t head) const {
    return q + (token * row_heads + head) * query_width(spec);
  }
  const void* keys(std::int64_t b, std::int64_t kv) const {
    return static_cast<const char*>(cache.keys) +
           (b * cache.key_batch_stride + kv * cache.key_head_stride) * element;
  }
  const void* values(std::int64_t b, std::int64_t kv) const {
    return over_latents ? keys(b, kv) : parts(b, kv);
  }
  std::int64_t value_stride() const { return over_latents ? cache.key_stride : cache.value_stride; }
  // What the cache has as values.
  const void* parts(std::int64_t b, std::int64_t kv) const {
    return static_cast<const char*>(cache.values) +
           (b * cache.value_batch_stride + kv * cache.value_head_stride) * element;
  }
  // One behind the last position that a token sees without its mask.
  std::int64_t limit(std::int64_t token) const {
    return causal ? std::min(positions, call.past + token % call.tokens + 1) : positions;
  }
};

// Attention of the tokens [begin, end), rows of the flattened batch.
void attend_chunk(const Attention& attention);

}  // namespace lowbit::fused
