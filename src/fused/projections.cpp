#include "fused/projections.h"

#include <algorithm>

namespace lowbit::fused {
namespace {

// Where one head of the projected row lies.
const float* head_of(const HeadMap& map, const float* row, int group, int index) {
  return row + map.offset + group * map.group_stride + index * map.head_stride;
}

// The heads of one token that are worked on together.
std::int64_t head_floats(const AttentionSpec& spec) {
  const std::int64_t head = std::max(spec.head_dim, spec.values());
  return std::max<std::int64_t>(spec.heads * head, spec.latent.width);
}

}  // namespace

std::int64_t query_width(const AttentionSpec& spec) {
  return spec.head_dim + spec.gate_width;
}

void project_chunk(const Work& work, const AttentionSpec& spec, const float* x, std::int64_t begin,
                   std::int64_t end, float q_scale, const HeadTarget& q, const HeadTarget& k,
                   const HeadTarget& v, float* memory) {
  const BlockCall& call = work.call;
  const FusedKernels& kernels = work.kernels;
  const std::int64_t count = end - begin, hidden = call.hidden;
  const std::int64_t columns = columns_of(spec.in);
  float* normed = memory;
  float* projected = normed + count * hidden;
  float* heads = projected + count * columns;
  multiply(work, spec.in, normed, count, hidden, projected, columns, [&](std::int64_t t) {
    kernels.norm(spec.norm, x + (begin + t) * hidden, hidden, normed + t * hidden);
  });

  // Where queries are columns: of the projections, or of one product more.
  const LowRankQuery& low_rank = spec.low_rank;
  const float* query_rows = projected;
  std::int64_t query_columns = columns;
  if (low_rank.width > 0) {
    float* rank = heads;
    float* expanded = rank + count * low_rank.width;
    query_rows = expanded;
    query_columns = low_rank.expand.layout.n;
    multiply(work, {low_rank.expand}, rank, count, low_rank.width, expanded, query_columns,
             [&](std::int64_t t) {
               kernels.norm(low_rank.norm, projected + t * columns + low_rank.at, low_rank.width,
                            rank + t * low_rank.width);
             });
    heads = expanded + count * query_columns;
  }

  const int d = spec.head_dim;
  const int group = spec.heads / spec.kv_heads;
  // Per token: one head at a time, or all of them where their norm needs them together.
  const std::int64_t row_floats = head_floats(spec) + 2 * spec.rope.width;
  for_tokens(count, work.threads, [&](std::int64_t t) {
    const float* row = projected + t * columns;
    float* buffer = heads + t * row_floats;
    float* cos = buffer + head_floats(spec);
    float* sin = cos + spec.rope.width;
    const std::int64_t b = (begin + t) / call.tokens, s = (begin + t) % call.tokens;
    if (spec.rope.kind != RopeKind::kNone) {
      // The last angle is that of pair width / 2 - 1.
      const std::int64_t entries = (spec.rope.width / 2 - 1) * spec.rope.table_step + 1;
      const std::int64_t at =
          (b * call.rope_batch_stride + s * call.rope_stride) * bytes_of(call.rope_dtype);
      kernels.load(static_cast<const char*>(call.cos) + at, call.rope_dtype, entries, cos);
      kernels.load(static_cast<const char*>(call.sin) + at, call.rope_dtype, entries, sin);
    }
    const auto emit = [&](const HeadMap& map, const float* from, int size, int count_of_heads,
                          const NormSpec& head_norm, bool rotated, float scale,
                          const HeadTarget& target) {
      const int per_group = count_of_heads / spec.kv_heads;
      for (int h = 0; h < count_of_heads; ++h) {
        std::copy_n(head_of(map, from, h / per_group, h % per_group), size, buffer + h * size);
      }
      if (spec.norm_over_heads) {
        kernels.norm(head_norm, buffer, std::int64_t{count_of_heads} * size, buffer);
      }
      for (int h = 0; h < count_of_heads; ++h) {
        float* head = buffer + h * size;
        if (!spec.norm_over_heads && !spec.norm_last) kernels.norm(head_norm, head, size, head);
        if (rotated) kernels.rotate(spec.rope, cos, sin, head);
        if (spec.norm_last) kernels.norm(head_norm, head, size, head);
        if (scale != 1) {
          for (int i = 0; i < size; ++i) head[i] *= scale;
        }
        target.store(kernels, head, size, b, h, s);
      }
    };
    const bool rotated = spec.rope.kind != RopeKind::kNone;
    emit(spec.q, query_rows + t * query_columns, d, spec.kv_heads * group, spec.q_norm, rotated,
         q_scale, q);
    if (spec.gate_width > 0) {
      HeadTarget gates = q;
      gates.data += d * bytes_of(q.dtype);
      for (int h = 0; h < spec.heads; ++h) {
        gates.store(kernels, head_of(spec.gate, row, h / group, h % group), spec.gate_width, b, h,
                    s);
      }
    }
    if (spec.cross) return;
    if (const LatentSpec& latent = spec.latent; latent.width > 0) {
      kernels.norm(latent.norm, row + latent.at, latent.width, buffer);
      k.store(kernels, buffer, latent.width, b, 0, s);
      std::copy_n(row + latent.tail_at, latent.tail, buffer);
      RopeSpec rope = spec.rope;
      rope.begin -= d - latent.tail;
      if (rotated) kernels.rotate(rope, cos, sin, buffer);
      v.store(kernels, buffer, latent.tail, b, 0, s);
      return;
    }
    emit(spec.k, row, d, spec.kv_heads, spec.k_norm, rotated, 1, k);
    emit(spec.v, row, spec.values(), spec.kv_heads, NormSpec{}, false, 1, v);
  });
}

std::int64_t project_floats(const AttentionSpec& spec, std::int64_t tokens, std::int64_t hidden) {
  const LowRankQuery& low_rank = spec.low_rank;
  const std::int64_t more = low_rank.width > 0 ? low_rank.width + low_rank.expand.layout.n : 0;
  return tokens * (hidden + columns_of(spec.in) + more + head_floats(spec) + 2 * spec.rope.width);
}

}  // namespace lowbit::fused
