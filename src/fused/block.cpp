// Decoder blocks: the packed products of linear_driver.h with everything between them.
//
// A call works on chunks of tokens, so that what lies between two products stays in the caches and
// memory stays bounded at any prompt length:
//   1. per chunk: norm, projections; q is kept, k and v go to the cache
//   2. per chunk: attention over the whole cache, output projection, residual, MLP half
#include "lowbit/fused.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/fused_kernels.h"
#include "cpu/linear_driver.h"
#include "lowbit/error.h"

namespace lowbit {
namespace {

using cpu::FusedKernels;

constexpr std::int64_t kChunkTokens = 512;  // as linear_driver prepares activations

// Rows that one attention task computes: enough that transposing a block of keys (about 1 / 6 of a
// product row per key) is paid by many, few enough that rows and scores stay in an L1.
constexpr int kTaskRows = 24;

// Positions that one attention task reads when a single token attends to a long cache. Depends on
// nothing but shapes, so the order of the sums does too.
constexpr std::int64_t kTaskPositions = 512;

// Below about this many row-position pairs times head size, sharing the attention of a block costs
// more than it gains. A join is some 0.7 us; one region for all blocks, with threads that wait for
// each other spinning, made it 0.2 us and gained nothing: products wait for memory.
constexpr std::int64_t kSerialWork = 1 << 15;

std::int64_t columns_of(const std::vector<PackedMatrix>& matrices) {
  std::int64_t columns = 0;
  for (const PackedMatrix& matrix : matrices) columns += matrix.layout.n;
  return columns;
}

void require(bool ok, const std::string& text) {
  if (!ok) throw Error(ErrorCode::kValue, "fused block: " + text);
}

void multiply(const std::vector<PackedMatrix>& matrices, const float* x, std::int64_t tokens,
              std::int64_t k, float* out, std::int64_t out_stride, Precision precision,
              const Threads& threads) {
  constexpr std::size_t kMaxMatrices = 8;
  require(matrices.size() <= kMaxMatrices, "at most 8 projections of one input");
  cpu::RowBlock blocks[kMaxMatrices];
  std::int64_t column = 0;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const PackedMatrix& m = matrices[i];
    blocks[i] = {m.packed,     m.layout,     m.exponent,      m.bias,
                 m.bias_dtype, out + column, DType::kFloat32, out_stride};
    column += m.layout.n;
  }
  cpu::linear_multi({x, DType::kFloat32, k, tokens, k}, precision,
                    std::span(blocks, matrices.size()), threads);
}

// body(token) for all tokens; on the calling thread where there are few.
template <typename Body>
void for_tokens(std::int64_t tokens, const Threads& threads, const Body& body) {
  const std::int64_t tasks = tokens < 32 ? 1 : std::min<std::int64_t>(threads.count(), tokens);
  if (tasks == 1) {
    for (std::int64_t t = 0; t < tokens; ++t) body(t);
    return;
  }
  threads.run(tasks, [&](std::int64_t task) {
    for (std::int64_t t = tokens * task / tasks; t < tokens * (task + 1) / tasks; ++t) body(t);
  });
}

// Grow-only float memory of the calling thread: operators run for every token, and malloc would
// return large blocks to the system each time.
float* floats(int slot, std::int64_t count) {
  return reinterpret_cast<float*>(cpu::thread_workspace(slot, count * 4 + 64));
}

struct Work {
  const FusedKernels& kernels;
  const BlockCall& call;
  const Threads& threads;
  std::int64_t rows;  // batch * tokens
};

void normalize(const Work& work, const NormSpec& norm, float* row, std::int64_t n) {
  if (norm.kind != NormKind::kNone) work.kernels.norm(norm, row, n, row);
}

// ---- projections -------------------------------------------------------------------------------

// Where one head of the projected row lies.
const float* head_of(const HeadMap& map, const float* row, int group, int index) {
  return row + map.offset + group * map.group_stride + index * map.head_stride;
}

// Floats of a head of queries: the gates follow.
std::int64_t query_width(const AttentionSpec& spec) {
  return spec.head_dim + spec.gate_width;
}

// Where token t of head h goes.
struct HeadTarget {
  char* data;
  DType dtype;
  std::int64_t batch_stride, head_stride, stride;  // elements
  CacheFormat format = CacheFormat::kFloat;
  CachePart part = CachePart::kKeys;
  std::int64_t past = 0;

  void store(const FusedKernels& kernels, const float* head, int d, std::int64_t b, std::int64_t h,
             std::int64_t t) const {
    const std::int64_t start = b * batch_stride + h * head_stride;
    if (format == CacheFormat::kFloat) {
      const auto element = static_cast<std::int64_t>(dtype_bytes(dtype));
      kernels.store(head, dtype, d, data + (start + (past + t) * stride) * element);
      return;
    }
    const std::int64_t position = past + t;
    kernels.cache_put(
        head, d, format, part, static_cast<int>(position % kCacheBlock),
        reinterpret_cast<std::byte*>(data) + start + position / kCacheBlock * cache_block_bytes(d));
  }
};

HeadTarget key_target(const CacheView& cache, std::int64_t past) {
  return {static_cast<char*>(cache.keys),
          cache.dtype,
          cache.key_batch_stride,
          cache.key_head_stride,
          cache.key_stride,
          cache.format,
          CachePart::kKeys,
          past};
}

HeadTarget value_target(const CacheView& cache, std::int64_t past) {
  return {static_cast<char*>(cache.values),
          cache.dtype,
          cache.value_batch_stride,
          cache.value_head_stride,
          cache.value_stride,
          cache.format,
          CachePart::kValues,
          past};
}

// The heads of one token that are worked on together.
std::int64_t head_floats(const AttentionSpec& spec) {
  const std::int64_t head = std::max(spec.head_dim, spec.values());
  return std::max<std::int64_t>(spec.heads * head, spec.latent.width);
}

// Norms, projects and rotates tokens [begin, end) and writes queries (scaled by `q_scale`), keys
// and values where they go.
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
  for_tokens(count, work.threads, [&](std::int64_t t) {
    kernels.norm(spec.norm, x + (begin + t) * hidden, hidden, normed + t * hidden);
  });
  multiply(spec.in, normed, count, hidden, projected, columns, call.precision, work.threads);

  // Where queries are columns: of the projections, or of one product more.
  const LowRankQuery& low_rank = spec.low_rank;
  const float* query_rows = projected;
  std::int64_t query_columns = columns;
  if (low_rank.width > 0) {
    float* rank = heads;
    float* expanded = rank + count * low_rank.width;
    for_tokens(count, work.threads, [&](std::int64_t t) {
      kernels.norm(low_rank.norm, projected + t * columns + low_rank.at, low_rank.width,
                   rank + t * low_rank.width);
    });
    query_rows = expanded;
    query_columns = low_rank.expand.layout.n;
    multiply({low_rank.expand}, rank, count, low_rank.width, expanded, query_columns,
             call.precision, work.threads);
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
      const std::int64_t at = (b * call.rope_batch_stride + s * call.rope_stride) *
                              static_cast<std::int64_t>(dtype_bytes(call.rope_dtype));
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
      gates.data += d * static_cast<std::int64_t>(dtype_bytes(q.dtype));
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

// ---- attention ---------------------------------------------------------------------------------

struct Strip {
  std::int64_t first, count;  // tokens of the flattened batch
};

// Tokens [begin, end) in runs of at most `run` of one batch row.
std::vector<Strip> strips_of(const BlockCall& call, std::int64_t begin, std::int64_t end,
                             std::int64_t run) {
  std::vector<Strip> strips;
  for (std::int64_t t = begin; t < end;) {
    const std::int64_t row_end = std::min(end, (t / call.tokens + 1) * call.tokens);
    const std::int64_t count = std::min(run, row_end - t);
    strips.push_back({t, count});
    t += count;
  }
  return strips;
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
  std::int64_t element =
      cache.format == CacheFormat::kFloat ? static_cast<std::int64_t>(dtype_bytes(cache.dtype)) : 1;

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

// The rows of a strip for one key/value head: queries, limits and masks, of which `args` points to.
struct StripRows {
  std::int64_t limits[kTaskRows * 8];
  const void* masks[kTaskRows * 8];

  void take(const Attention& a, const Strip& strip, int kv, float* packed, cpu::AttendRows& args) {
    const std::int64_t b = strip.first / a.call.tokens;
    std::int64_t last = 0;
    for (std::int64_t t = 0; t < strip.count; ++t) {
      const std::int64_t s = (strip.first + t) % a.call.tokens;
      for (int i = 0; i < a.group; ++i) {
        const std::int64_t r = t * a.group + i;
        std::copy_n(a.query(strip.first + t, kv * a.group + i), a.d, packed + r * a.d);
        limits[r] = a.limit(strip.first + t);
        last = std::max(last, limits[r]);
        if (a.mask.kind != MaskKind::kNone) {
          const std::int64_t bytes = a.mask.kind == MaskKind::kBool      ? 1
                                     : a.mask.kind == MaskKind::kFloat32 ? 4
                                                                         : 2;
          masks[r] = static_cast<const char*>(a.mask.data) +
                     (b * a.mask.batch_stride + (kv * a.group + i) * a.mask.head_stride +
                      s * a.mask.stride) *
                         bytes;
        }
      }
    }
    args.q = packed;
    args.rows = static_cast<int>(strip.count * a.group);
    args.d = a.d;
    args.values_d = a.values_d;
    args.tail = a.over_latents ? a.parts(b, kv) : nullptr;
    args.tail_d = a.over_latents ? a.d - a.values_d : 0;
    args.tail_stride = a.cache.value_stride;
    args.begin = 0;
    args.end = last;
    args.limits = a.causal ? limits : nullptr;
    args.masks = a.mask.kind != MaskKind::kNone ? masks : nullptr;
    args.mask_kind = a.mask.kind;
    args.softcap = a.spec.softcap;
  }
};

// Sums of the weighted values, in rows of acc_d, to means in their place.
void finish(const Attention& a, const Strip& strip, int kv, const float* acc, int acc_d,
            const float* max, const float* sum) {
  const AttentionSpec& spec = a.spec;
  const std::int64_t width = std::int64_t{a.row_heads} * a.values_d;
  for (std::int64_t t = 0; t < strip.count; ++t) {
    for (int i = 0; i < a.group; ++i) {
      const std::int64_t r = t * a.group + i;
      float* to = a.out + (strip.first - a.begin + t) * width + (kv * a.group + i) * a.values_d;
      // Nothing seen: zero, as torch's own kernels give.
      float factor = sum[r] == 0 ? 0.0f : 1.0f / sum[r];
      if (spec.sinks != nullptr && sum[r] != 0) {
        // The sink may be larger than every score by any amount: to infinity, and the result to 0.
        float sink;
        a.work.kernels.load(
            static_cast<const char*>(spec.sinks) +
                static_cast<std::size_t>(kv * a.group + i) * dtype_bytes(spec.sinks_dtype),
            spec.sinks_dtype, 1, &sink);
        factor = 1.0f / (sum[r] + std::exp(sink - max[r]));
      }
      for (int j = 0; j < a.values_d; ++j) to[j] = acc[r * acc_d + j] * factor;
      if (spec.gate_width == 0) continue;
      const float* gate = a.query(strip.first + t, kv * a.group + i) + a.d;
      if (spec.gate_width == a.values_d) {
        a.work.kernels.activate(spec.gate_activation, {}, gate, to, a.values_d, to);
      } else {
        float one;
        a.work.kernels.activate(spec.gate_activation, {}, gate, nullptr, 1, &one);
        for (int j = 0; j < a.values_d; ++j) to[j] *= one;
      }
    }
  }
}

// body(task) for all tasks, the last ones first: later strips see more positions. Handed out one by
// one.
template <typename Body>
void share(const Threads& threads, std::int64_t tasks, const Body& body) {
  if (tasks <= 1 || threads.count() == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<std::int64_t> next{tasks};
  std::atomic<bool> failed{false};
  threads.run(std::min<std::int64_t>(threads.count(), tasks), [&](std::int64_t) {
    try {
      for (std::int64_t task; (task = next.fetch_sub(1) - 1) >= 0;) body(task);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw Error(ErrorCode::kResource, "fused block: no memory for attention");
}

// What packed keys and values of the heads that are worked on together may take.
constexpr std::int64_t kPackedBytes = std::int64_t{32} << 20;

// Fewer rows of one key/value head than this do not pay for packing it.
constexpr std::int64_t kManyRows = 16;

// The kernels that round keys, values, queries and weights to bfloat16, where that is asked for and
// worth it; nullptr: float32.
const cpu::ManyRows* many_rows_for(const Attention& a) {
  const BlockCall& call = a.call;
  if (a.cache.format != CacheFormat::kFloat || a.over_latents) return nullptr;
  if (a.values_d > a.d) return nullptr;
  const Format format = a.spec.out.layout.format;
  if (cpu::resolve_precision(format, call.precision, a.work.rows) == Precision::kFp32) {
    return nullptr;  // the products around it are exact
  }
  const std::int64_t tokens = std::min(a.end - a.begin, call.tokens);
  const cpu::ManyRows* many = cpu::many_rows();
  return many == nullptr || tokens * a.group < kManyRows || a.group > many->rows ? nullptr : many;
}

const cpu::FewRows* few_rows_for(const Attention& a) {
  if (a.cache.format != CacheFormat::kFloat || a.cache.dtype != DType::kBFloat16) return nullptr;
  const cpu::FewRows* few = cpu::few_rows();
  // Rows beyond those of a task: its tables are for no more.
  const bool fits =
      few != nullptr && a.d % few->head_multiple == 0 && a.group <= kTaskRows && a.values_d == a.d;
  return fits ? few : nullptr;
}

void attend_many(const Attention& a, const cpu::ManyRows& many) {
  const std::vector<Strip> strips =
      strips_of(a.call, a.begin, a.end, std::max(1, many.rows / a.group));
  const std::int64_t first_row = a.begin / a.call.tokens;
  const std::int64_t heads = ((a.end - 1) / a.call.tokens - first_row + 1) * a.spec.kv_heads;
  std::int64_t positions = 0;  // that any token sees
  for (const Strip& strip : strips) {
    positions = std::max(positions, a.limit(strip.first + strip.count - 1));
  }
  const std::int64_t bytes = many.packed_bytes(positions, a.d);
  const std::int64_t together =
      std::clamp<std::int64_t>(kPackedBytes / std::max<std::int64_t>(2 * bytes, 1), 1, heads);
  std::byte* packed = cpu::thread_workspace(4, 2 * bytes * together);
  const std::int64_t blocks = (positions + kCacheBlock - 1) / kCacheBlock;
  for (std::int64_t from = 0; from < heads; from += together) {
    const std::int64_t to = std::min(heads, from + together);
    share(a.work.threads, (to - from) * blocks, [&](std::int64_t task) {
      const std::int64_t head = task / blocks;
      const std::int64_t b = first_row + (from + head) / a.spec.kv_heads;
      const std::int64_t kv = (from + head) % a.spec.kv_heads;
      std::byte* keys = packed + 2 * head * bytes;
      many.pack({a.keys(b, kv), a.cache.dtype, a.cache.key_stride, a.d},
                {a.values(b, kv), a.cache.dtype, a.cache.value_stride, a.values_d}, positions, a.d,
                task % blocks, keys, keys + bytes);
    });
    const std::int64_t count = static_cast<std::int64_t>(strips.size());
    share(a.work.threads, count * (to - from), [&](std::int64_t task) {
      const Strip& strip = strips[static_cast<std::size_t>(task / (to - from))];
      const std::int64_t head = from + task % (to - from);
      if (strip.first / a.call.tokens - first_row != head / a.spec.kv_heads) return;
      const int kv = static_cast<int>(head % a.spec.kv_heads);
      const std::int64_t rows = strip.count * a.group;
      float* memory = floats(3, rows * (2 * a.d + 2) + many.scratch(a.d));
      StripRows taken;
      cpu::AttendRows args{};
      taken.take(a, strip, kv, memory, args);
      args.keys = packed + 2 * (head - from) * bytes;
      args.values = static_cast<const std::byte*>(args.keys) + bytes;
      args.acc = memory + rows * a.d;
      args.max = args.acc + rows * a.d;
      args.sum = args.max + rows;
      args.scratch = args.sum + rows;
      many.attend(args);
      finish(a, strip, kv, args.acc, a.d, args.max, args.sum);
    });
  }
}

// Attention of the tokens [begin, end), rows of the flattened batch.
void attend_chunk(const Attention& a) {
  if (const cpu::ManyRows* many = many_rows_for(a); many != nullptr) {
    attend_many(a, *many);
    return;
  }
  const Work& work = a.work;
  const AttentionSpec& spec = a.spec;
  const CacheView& cache = a.cache;
  const std::int64_t positions = a.positions;
  const int d = a.d, values_d = a.values_d, group = a.group;

  // A task is one key/value head, a run of tokens of one batch row, and a range of positions.
  const std::int64_t run = std::max(1, kTaskRows / group);
  const std::vector<Strip> strips = strips_of(a.call, a.begin, a.end, run);
  const std::int64_t tokens = a.end - a.begin;
  const std::int64_t splits =
      tokens * group <= kTaskRows ? (positions + kTaskPositions - 1) / kTaskPositions : 1;
  const std::int64_t strip_count = static_cast<std::int64_t>(strips.size());
  const std::int64_t tasks = strip_count * spec.kv_heads * std::max<std::int64_t>(splits, 1);
  const std::int64_t rows_max = run * group;
  const cpu::FewRows* few = few_rows_for(a);
  const int most = static_cast<int>(rows_max);
  const std::int64_t scratch =
      few == nullptr ? work.kernels.attend_scratch(most, d, values_d) : few->scratch(most, d);
  const auto attend = few == nullptr ? work.kernels.attend : few->attend;

  // Partial results of the position ranges of every (strip, head): acc, max, sum.
  const std::int64_t partial_floats = rows_max * (values_d + 2);
  std::vector<float> partials(splits > 1 ? static_cast<std::size_t>(tasks * partial_floats)
                                         : std::size_t{0});

  const auto one = [&](std::int64_t task) {
    const std::int64_t split = task % splits, pair = task / splits;
    const int kv = static_cast<int>(pair % spec.kv_heads);
    const Strip& strip = strips[static_cast<std::size_t>(pair / spec.kv_heads)];
    const std::int64_t rows = strip.count * group, b = strip.first / a.call.tokens;
    const std::int64_t need = rows * (d + values_d + 2) + scratch + 4 * rows;
    float* memory = floats(3, need);
    float* packed = memory;
    float* acc = packed + rows * d;
    float* max = acc + rows * values_d;
    float* sum = max + rows;
    float* rest = sum + rows;
    StripRows taken;
    cpu::AttendRows args;
    taken.take(a, strip, kv, packed, args);
    args.keys = a.keys(b, kv);
    args.values = a.values(b, kv);
    args.dtype = cache.dtype;
    args.format = cache.format;
    args.key_stride = cache.key_stride;
    args.value_stride = a.value_stride();
    args.begin = split * kTaskPositions;
    if (splits > 1) args.end = std::min(args.end, args.begin + kTaskPositions);
    args.scratch = rest;
    if (splits > 1) {
      float* partial = partials.data() + task * partial_floats;
      args.acc = partial;
      args.max = partial + rows_max * values_d;
      args.sum = args.max + rows_max;
      attend(args);
      return;
    }
    args.acc = acc;
    args.max = max;
    args.sum = sum;
    attend(args);
    finish(a, strip, kv, acc, values_d, max, sum);
  };
  const std::int64_t cost = tokens * spec.heads * positions * d;
  share(cost < kSerialWork ? serial_threads() : work.threads, tasks, one);
  if (splits <= 1) return;
  // Put the ranges together, in their order.
  for (std::int64_t pair = 0; pair < tasks / splits; ++pair) {
    const Strip& strip = strips[static_cast<std::size_t>(pair / spec.kv_heads)];
    const std::int64_t rows = strip.count * group;
    float* base = partials.data() + pair * splits * partial_floats;
    float* base_max = base + rows_max * values_d;
    float* base_sum = base_max + rows_max;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t split = 1; split < splits; ++split) {
        const float* other = base + split * partial_floats;
        const float other_max = other[rows_max * values_d + r];
        const float other_sum = other[rows_max * values_d + rows_max + r];
        if (other_sum == 0) continue;
        const float most = std::max(base_max[r], other_max);
        const float a = base_sum[r] == 0 ? 0.0f : std::exp(base_max[r] - most);
        const float c = std::exp(other_max - most);
        for (int j = 0; j < values_d; ++j) {
          const std::int64_t at = r * values_d + j;
          base[at] = base[at] * a + other[at] * c;
        }
        base_sum[r] = base_sum[r] * a + other_sum * c;
        base_max[r] = most;
      }
    }
    finish(a, strip, static_cast<int>(pair % spec.kv_heads), base, values_d, base_max, base_sum);
  }
}

// ---- latent attention --------------------------------------------------------------------------

std::int64_t latent_floats(const AttentionSpec& spec, std::int64_t rows) {
  return spec.latent.width > 0 ? rows * spec.heads * spec.values() : 0;
}

// The whole tiles of `all` that hold rows [begin, begin + count), of which the first `skipped` are
// others.
struct PartOfRows {
  PackedMatrix matrix;
  std::int64_t skipped;

  PartOfRows(const PackedMatrix& all, std::int64_t begin, std::int64_t count) : matrix(all) {
    constexpr std::int64_t kTile = 16;
    const std::int64_t first = begin / kTile * kTile;
    const std::int64_t end = std::min(all.layout.n, (begin + count + kTile - 1) / kTile * kTile);
    skipped = begin - first;
    matrix.packed += first / kTile * all.layout.tile_bytes;
    matrix.layout =
        make_layout(all.layout.format, end - first, all.layout.k, all.layout.group_size);
  }

  std::int64_t floats() const { return matrix.layout.n * matrix.layout.k; }

  const float* dequantized(float* to) const {
    const Layout& layout = matrix.layout;
    dequantize({matrix.packed, static_cast<std::size_t>(layout.bytes())}, layout, matrix.exponent,
               {to, DType::kFloat32, layout.n, layout.k, layout.k, 1});
    return to + skipped * layout.k;
  }
};

// The largest divisor of `heads` up to `most`.
int heads_together(int heads, int most) {
  int together = 1;
  for (int i = 2; i <= most; ++i) {
    if (heads % i == 0) together = i;
  }
  return together;
}

// Few tokens: queries are multiplied by the heads' key rows instead of the latents, and what comes
// out, a mean of latents, by the value rows. Costs per position what its latent is long, whatever
// keys and values would take.
void attend_absorbed(const Attention& a) {
  const LatentSpec& latent = a.spec.latent;
  const FusedKernels& kernels = a.work.kernels;
  const int heads = a.spec.heads, gates = a.spec.gate_width;
  const std::int64_t width = latent.width, own = a.d - latent.tail;
  const std::int64_t count = a.end - a.begin, wide = width + latent.tail + gates;
  float* q =
      reinterpret_cast<float*>(cpu::thread_workspace(5, count * heads * (wide + width) * 4 + 64));
  float* mixed = q + count * heads * wide;
  share(a.work.threads, heads, [&](std::int64_t head) {
    const PartOfRows part(latent.expand, head * latent.head_rows + latent.key_at, own);
    const float* weights = part.dequantized(floats(3, part.floats()));
    for (std::int64_t t = 0; t < count; ++t) {
      const float* from = a.query(a.begin + t, head);
      float* to = q + (t * heads + head) * wide;
      std::fill_n(to, width, 0.0f);
      for (std::int64_t i = 0; i < own; ++i) kernels.add(weights + i * width, from[i], width, to);
      std::copy_n(from + own, latent.tail + gates, to + width);
    }
  });

  AttentionSpec spec = a.spec;
  spec.latent = {};
  spec.head_dim = static_cast<int>(width) + latent.tail;
  spec.value_dim = static_cast<int>(width);
  // All heads read the same keys; in parts, so that threads share a token's heads.
  spec.kv_heads = heads / heads_together(heads, 12);
  CacheView cache = a.cache;
  cache.key_head_stride = cache.value_head_stride = 0;
  attend_chunk({a.work, spec, q, cache, a.positions, a.begin, a.end, mixed, true});

  share(a.work.threads, heads, [&](std::int64_t head) {
    const PartOfRows part(latent.expand, head * latent.head_rows + latent.value_at, a.values_d);
    const float* weights = part.dequantized(floats(3, part.floats()));
    for (std::int64_t t = 0; t < count; ++t) {
      kernels.dots(weights, a.values_d, width, mixed + (t * heads + head) * width,
                   a.out + (t * heads + head) * a.values_d);
    }
  });
}

// What expanded keys and values of the heads that are worked on together may take.
constexpr std::int64_t kExpandedBytes = std::int64_t{16} << 20;

// Many tokens: keys and values of all positions are made, some heads at a time.
void attend_expanded(const Attention& a) {
  const LatentSpec& latent = a.spec.latent;
  const FusedKernels& kernels = a.work.kernels;
  const std::int64_t positions = a.positions, own = a.d - latent.tail, rows = latent.head_rows;
  const std::int64_t each = positions * (rows + a.d) * 4;
  // Heads begin where a tile of rows does.
  std::int64_t step = 1;
  while (step * rows % 16 != 0) step *= 2;
  std::int64_t together = std::max(kExpandedBytes / each / step, std::int64_t{1}) * step;
  together = std::min<std::int64_t>(together, a.spec.heads);
  float* wide = reinterpret_cast<float*>(cpu::thread_workspace(5, each * together + 64));
  float* keys = wide + positions * rows * together;
  const std::int64_t tokens = a.call.tokens, element = a.element;
  for (std::int64_t b = a.begin / tokens; b * tokens < a.end; ++b) {
    for (std::int64_t from = 0; from < a.spec.heads; from += together) {
      const std::int64_t heads = std::min(together, a.spec.heads - from), columns = heads * rows;
      const PartOfRows part(latent.expand, from * rows, columns);
      const cpu::RowBlock block{part.matrix.packed,   part.matrix.layout,
                                part.matrix.exponent, nullptr,
                                DType::kFloat32,      wide,
                                DType::kFloat32,      columns};
      cpu::linear_multi({a.keys(b, 0), a.cache.dtype, a.cache.key_stride, positions, latent.width},
                        a.call.precision, {&block, 1}, a.work.threads);
      const char* tails = static_cast<const char*>(a.parts(b, 0));
      for_tokens(positions, a.work.threads, [&](std::int64_t p) {
        for (std::int64_t h = 0; h < heads; ++h) {
          float* to = keys + (h * positions + p) * a.d;
          std::copy_n(wide + p * columns + h * rows + latent.key_at, own, to);
          kernels.load(tails + p * a.cache.value_stride * element, a.cache.dtype, latent.tail,
                       to + own);
        }
      });
      AttentionSpec spec = a.spec;
      spec.latent = {};
      spec.heads = spec.kv_heads = static_cast<int>(heads);
      if (spec.sinks != nullptr) {
        spec.sinks = static_cast<const char*>(spec.sinks) +
                     static_cast<std::size_t>(from) * dtype_bytes(spec.sinks_dtype);
      }
      CacheView view;
      view.keys = keys;
      view.values = wide + latent.value_at;
      view.key_head_stride = positions * a.d;
      view.key_stride = a.d;
      view.value_head_stride = rows;
      view.value_stride = columns;
      Attention part_of_heads{a.work,
                              spec,
                              a.q + from * query_width(a.spec),
                              view,
                              positions,
                              b * tokens,
                              std::min(a.end, (b + 1) * tokens),
                              a.out + (b * tokens * a.spec.heads + from) * a.values_d,
                              false,
                              a.spec.heads};
      const std::int64_t bytes = a.mask.kind == MaskKind::kBool      ? 1
                                 : a.mask.kind == MaskKind::kFloat32 ? 4
                                                                     : 2;
      if (a.mask.kind != MaskKind::kNone) {
        part_of_heads.mask.data =
            static_cast<const char*>(a.mask.data) + from * a.mask.head_stride * bytes;
      }
      attend_chunk(part_of_heads);
    }
  }
}

// Attention of all tokens over latents, in the way that multiplies less; products of many rows, by
// which keys and values are made, count an eighth.
void attend_latents(const Attention& a) {
  const LatentSpec& latent = a.spec.latent;
  const double tokens = static_cast<double>(a.call.tokens), heads = a.spec.heads;
  const double positions = static_cast<double>(a.positions);
  const double expansion = heads * static_cast<double>(latent.head_rows) * latent.width;
  const double absorbed =
      tokens * (expansion + positions * heads * (2.0 * latent.width + latent.tail));
  const double expanded = positions * expansion + tokens * positions * heads * (a.d + a.values_d);
  if (tokens <= 64 && 8 * absorbed < expanded) {
    attend_absorbed(a);
  } else {
    attend_expanded(a);
  }
}

// ---- halves ------------------------------------------------------------------------------------

// to = post_norm(to + multiplier * out_norm(update)), without `to` inside where there is no
// residual.
template <typename Half>
void merge(const Work& work, const Half& half, float* update, std::int64_t count, float* to) {
  const std::int64_t hidden = work.call.hidden;
  for_tokens(count, work.threads, [&](std::int64_t t) {
    float* row = update + t * hidden;
    normalize(work, half.out_norm, row, hidden);
    float* target = to + t * hidden;
    if (!half.residual) std::fill_n(target, hidden, 0.0f);
    work.kernels.add(row, half.multiplier, hidden, target);
    normalize(work, half.post_norm, target, hidden);
  });
}

double softplus_of(const Work& work, const void* parameter, DType dtype) {
  if (parameter == nullptr) return 0;
  float value;
  work.kernels.load(parameter, dtype, 1, &value);
  return value > 20 ? value : std::log1p(std::exp(double{value}));
}

// Read at every call, as norms are: parameters may change in place.
ActivationNumbers numbers_of(const Work& work, const GateSpec& gate) {
  const double positive = softplus_of(work, gate.positive, gate.positive_dtype);
  const double negative = softplus_of(work, gate.negative, gate.negative_dtype) + double{gate.beta};
  return {gate.alpha, static_cast<float>(positive), static_cast<float>(negative), gate.beta};
}

// NaN stays NaN.
float clamped(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

// The inputs of `down` from one row of columns.
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

// to (+)= MLP(from) for `count` tokens.
void mlp_chunk(const Work& work, const MlpSpec& spec, const float* from, std::int64_t count,
               float* to, float* memory) {
  const std::int64_t hidden = work.call.hidden;
  const std::int64_t columns = columns_of(spec.in);
  float* normed = memory;
  float* update = normed + count * hidden;
  float* wide = update + count * hidden;
  float* inner = wide + count * columns;
  for_tokens(count, work.threads, [&](std::int64_t t) {
    work.kernels.norm(spec.norm, from + t * hidden, hidden, normed + t * hidden);
  });
  multiply(spec.in, normed, count, hidden, wide, columns, work.call.precision, work.threads);
  const ActivationNumbers numbers = numbers_of(work, spec.gate);
  for_tokens(count, work.threads, [&](std::int64_t t) {
    gate_row(work, spec, numbers, wide + t * columns, inner + t * spec.width);
    normalize(work, spec.inner_norm, inner + t * spec.width, spec.width);
  });
  multiply({spec.down}, inner, count, spec.width, update, hidden, work.call.precision,
           work.threads);
  merge(work, spec, update, count, to);
}

// Attention over the cache (unless its results are given), output projection, and the MLP half, for
// tokens [begin, end) of x; the results replace x.
void finish_chunk(const Work& work, const BlockSpec& block, const float* q, const CacheView& cache,
                  std::int64_t positions, std::int64_t begin, std::int64_t end, float* x,
                  float* mixed_rows, float* memory) {
  const std::int64_t count = end - begin, hidden = work.call.hidden;
  float* rows = x + begin * hidden;
  float* before = memory;  // x itself, for a parallel MLP
  float* rest = before + count * hidden;
  const bool mlp = block.mlp.width > 0;
  const bool attention = block.attention.heads > 0;
  if (block.parallel && mlp) std::copy_n(rows, count * hidden, before);
  if (attention) {
    const std::int64_t width = std::int64_t{block.attention.heads} * block.attention.values();
    float* mixed = mixed_rows == nullptr ? rest : mixed_rows + begin * width;
    float* update = rest + count * width;
    if (mixed_rows == nullptr) {
      attend_chunk({work, block.attention, q, cache, positions, begin, end, mixed});
    }
    for_tokens(count, work.threads, [&](std::int64_t t) {
      normalize(work, block.attention.mixed_norm, mixed + t * width, width);
    });
    multiply({block.attention.out}, mixed, count, width, update, hidden, work.call.precision,
             work.threads);
    merge(work, block.attention, update, count, rows);
  }
  if (mlp) {
    mlp_chunk(work, block.mlp, block.parallel ? before : rows, count, rows, rest);
  }
}

std::int64_t finish_floats(const BlockSpec& block, std::int64_t tokens, std::int64_t hidden) {
  const std::int64_t attention =
      tokens * (std::int64_t{block.attention.heads} * block.attention.values() + hidden);
  const std::int64_t mlp = block.mlp.width > 0 ? mlp_floats(block.mlp, tokens, hidden) : 0;
  return tokens * hidden + std::max(attention, mlp);
}

void check(const BlockSpec& block, const BlockCall& call) {
  const AttentionSpec& a = block.attention;
  const auto inputs = [](const std::vector<PackedMatrix>& matrices, std::int64_t k) {
    return std::all_of(matrices.begin(), matrices.end(),
                       [k](const PackedMatrix& m) { return m.layout.k == k; });
  };
  if (a.heads > 0) {
    require(a.kv_heads > 0 && a.heads % a.kv_heads == 0,
            "the number of heads must be a multiple of that of key/value heads");
    require(a.heads / a.kv_heads <= kTaskRows * 8, "at most 192 query heads per key/value head");
    require(!a.in.empty() && inputs(a.in, call.hidden), "x must have the projections' inputs");
    require(a.out.layout.k == std::int64_t{a.heads} * a.values() && a.out.layout.n == call.hidden,
            "the output projection must be [hidden, heads * value size]");
    require(a.gate_width == 0 || a.gate_width == 1 || a.gate_width == a.values(),
            "a head has one gate, or one for each channel");
    require(a.low_rank.width == 0 || a.low_rank.expand.layout.k == a.low_rank.width,
            "low-rank queries must have the inputs of their product");
    const LatentSpec& latent = a.latent;
    require(latent.width == 0 ||
                (latent.expand.layout.k == latent.width && !a.cross && a.kv_heads == a.heads &&
                 latent.expand.layout.n == a.heads * latent.head_rows && latent.tail > 0 &&
                 latent.tail <= a.head_dim && a.gate_width <= 1),
            "a latent attention has keys and values for every head, and one gate at most");
    require(a.rope.kind != RopeKind::kPairsToHalves || a.rope.width <= 256,
            "at most 256 values that turn change places");
    require(a.rope.kind == RopeKind::kNone ||
                (a.rope.width % 2 == 0 && a.rope.begin + a.rope.width <= a.head_dim &&
                 call.cos != nullptr && call.sin != nullptr),
            "a rotation needs its tables and an even part of a head");
  }
  if (block.mlp.width > 0) {
    require(!block.mlp.in.empty() && inputs(block.mlp.in, call.hidden),
            "x must have the inputs of the MLP's first products");
    require(block.mlp.down.layout.k == block.mlp.width && block.mlp.down.layout.n == call.hidden,
            "the MLP's last product must be [hidden, width]");
  }
}

// ---- experts -----------------------------------------------------------------------------------

PackedMatrix expert_of(const PackedMatrix& all, std::int64_t expert) {
  PackedMatrix one = all;
  one.packed += expert * all.layout.bytes();
  if (all.bias != nullptr) {
    one.bias = static_cast<const char*>(all.bias) +
               expert * all.layout.n * static_cast<std::int64_t>(dtype_bytes(all.bias_dtype));
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
  for_tokens(count, work.threads, [&](std::int64_t t) {
    gate_row(work, spec, numbers, wide + t * stride, inner + t * spec.width);
  });
  multiply({expert_of(spec.down, expert)}, inner, count, spec.width, update, work.call.hidden,
           work.call.precision, work.threads);
}

std::int64_t chunk_of(std::int64_t rows) {
  return std::min(rows, kChunkTokens);
}

}  // namespace

void run_blocks(std::span<const BlockSpec* const> blocks, std::span<const CacheView> caches,
                const BlockCall& call, const Threads& threads) {
  const std::int64_t rows = call.batch * call.tokens, hidden = call.hidden;
  if (rows == 0) return;
  const Work work{cpu::fused_kernels(), call, threads, rows};
  const std::int64_t chunk = chunk_of(rows);

  // x, queries, working memory
  std::int64_t q_floats = 0, mixed_floats = 0, memory_floats = 0;
  for (const BlockSpec* block : blocks) {
    check(*block, call);
    const AttentionSpec& a = block->attention;
    q_floats = std::max(q_floats, rows * a.heads * query_width(a));
    memory_floats = std::max(
        {memory_floats, project_floats(a, chunk, hidden), finish_floats(*block, chunk, hidden)});
    mixed_floats = std::max(mixed_floats, latent_floats(a, rows));
  }
  float* x = floats(2, rows * hidden + q_floats + mixed_floats + memory_floats);
  float* q = x + rows * hidden;
  float* mixed = q + q_floats;
  float* memory = mixed + mixed_floats;
  work.kernels.load(call.x, call.dtype, rows * hidden, x);

  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const BlockSpec& block = *blocks[i];
    const AttentionSpec& a = block.attention;
    CacheView cache{};
    if (a.heads > 0) {
      require(i < caches.size(), "every attention half needs a cache");
      cache = caches[i];
      const std::int64_t width = query_width(a);
      const HeadTarget q_target{reinterpret_cast<char*>(q), DType::kFloat32,
                                call.tokens * a.heads * width, width, a.heads * width};
      for (std::int64_t begin = 0; begin < rows; begin += chunk) {
        project_chunk(work, a, x, begin, std::min(rows, begin + chunk), a.scale, q_target,
                      key_target(cache, call.past), value_target(cache, call.past), memory);
      }
    }
    const std::int64_t positions = a.cross ? cache.positions : call.past + call.tokens;
    const bool latent = a.heads > 0 && a.latent.width > 0;
    if (latent) attend_latents({work, a, q, cache, positions, 0, rows, mixed});
    for (std::int64_t begin = 0; begin < rows; begin += chunk) {
      finish_chunk(work, block, q, cache, positions, begin, std::min(rows, begin + chunk), x,
                   latent ? mixed : nullptr, memory);
    }
  }
  work.kernels.store(x, call.dtype, rows * hidden, call.out);
}

void project(const BlockSpec& block, const BlockCall& call, void* q, void* k, void* v,
             const Threads& threads) {
  const std::int64_t rows = call.batch * call.tokens, hidden = call.hidden;
  if (rows == 0) return;
  check(block, call);
  const Work work{cpu::fused_kernels(), call, threads, rows};
  const AttentionSpec& a = block.attention;
  const std::int64_t chunk = chunk_of(rows);
  float* x = floats(2, rows * hidden + project_floats(a, chunk, hidden));
  work.kernels.load(call.x, call.dtype, rows * hidden, x);
  const auto target = [&](void* data, int heads, std::int64_t width) {
    return HeadTarget{static_cast<char*>(data), call.dtype, heads * call.tokens * width,
                      call.tokens * width, width};
  };
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    project_chunk(work, a, x, begin, std::min(rows, begin + chunk), 1,
                  target(q, a.heads, query_width(a)), target(k, a.cache_heads(), a.cache_keys()),
                  target(v, a.cache_heads(), a.cache_values()), x + rows * hidden);
  }
}

void columns(const BlockSpec& block, const BlockCall& call, void* normed, void* columns,
             const Threads& threads) {
  const std::int64_t rows = call.batch * call.tokens, hidden = call.hidden;
  if (rows == 0) return;
  check(block, call);
  const Work work{cpu::fused_kernels(), call, threads, rows};
  const AttentionSpec& a = block.attention;
  const std::int64_t width = columns_of(a.in), chunk = chunk_of(rows);
  const std::int64_t element = static_cast<std::int64_t>(dtype_bytes(call.dtype));
  float* x = floats(2, chunk * (hidden + width));
  float* projected = x + chunk * hidden;
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    const std::int64_t count = std::min(chunk, rows - begin);
    work.kernels.load(static_cast<const char*>(call.x) + begin * hidden * element, call.dtype,
                      count * hidden, x);
    for_tokens(count, threads,
               [&](std::int64_t t) { normalize(work, a.norm, x + t * hidden, hidden); });
    multiply(a.in, x, count, hidden, projected, width, call.precision, threads);
    work.kernels.store(x, call.dtype, count * hidden,
                       static_cast<char*>(normed) + begin * hidden * element);
    work.kernels.store(projected, call.dtype, count * width,
                       static_cast<char*>(columns) + begin * width * element);
  }
}

void attend(const BlockSpec& block, const BlockCall& call, const void* q, const CacheView& cache,
            std::int64_t positions, const Threads& threads) {
  const std::int64_t rows = call.batch * call.tokens, hidden = call.hidden;
  if (rows == 0) return;
  const Work work{cpu::fused_kernels(), call, threads, rows};
  const AttentionSpec& a = block.attention;
  require(a.heads > 0, "this block has no attention half");
  const std::int64_t chunk = chunk_of(rows), d = a.head_dim;
  const std::int64_t width = query_width(a);
  const std::int64_t mixed_floats = latent_floats(a, rows);
  float* x = floats(
      2, rows * (hidden + a.heads * width) + mixed_floats + finish_floats(block, chunk, hidden));
  float* queries = x + rows * hidden;
  float* mixed = queries + rows * a.heads * width;
  float* memory = mixed + mixed_floats;
  work.kernels.load(call.x, call.dtype, rows * hidden, x);
  // [batch, heads, tokens, width] to float32 [batch, tokens, heads, width], queries scaled
  const std::int64_t element = static_cast<std::int64_t>(dtype_bytes(call.dtype));
  for (std::int64_t b = 0; b < call.batch; ++b) {
    for (std::int64_t h = 0; h < a.heads; ++h) {
      for (std::int64_t t = 0; t < call.tokens; ++t) {
        float* to = queries + ((b * call.tokens + t) * a.heads + h) * width;
        work.kernels.load(
            static_cast<const char*>(q) + ((b * a.heads + h) * call.tokens + t) * width * element,
            call.dtype, width, to);
        for (std::int64_t i = 0; i < d; ++i) to[i] *= a.scale;
      }
    }
  }
  const bool latent = a.latent.width > 0;
  if (latent) attend_latents({work, a, queries, cache, positions, 0, rows, mixed});
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    finish_chunk(work, block, queries, cache, positions, begin, std::min(rows, begin + chunk), x,
                 latent ? mixed : nullptr, memory);
  }
  work.kernels.store(x, call.dtype, rows * hidden, call.out);
}

void cache_append(const CachedHeads& cache, std::int64_t past, std::int64_t tokens, const void* x,
                  DType dtype, const Threads& threads) {
  const FusedKernels& kernels = cpu::fused_kernels();
  const std::int64_t d = cache.head_dim, element = static_cast<std::int64_t>(dtype_bytes(dtype));
  const HeadTarget target{reinterpret_cast<char*>(cache.blocks),
                          dtype,
                          0,
                          cache.stride,
                          0,
                          cache.format,
                          cache.part,
                          past};
  threads.run(cache.heads, [&](std::int64_t head) {
    std::vector<float> row(static_cast<std::size_t>(d));
    for (std::int64_t t = 0; t < tokens; ++t) {
      kernels.load(static_cast<const char*>(x) + (head * tokens + t) * d * element, dtype, d,
                   row.data());
      target.store(kernels, row.data(), static_cast<int>(d), 0, head, t);
    }
  });
}

void cache_read(const CachedHeads& cache, std::int64_t positions, void* out, DType dtype,
                const Threads& threads) {
  const FusedKernels& kernels = cpu::fused_kernels();
  const int d = static_cast<int>(cache.head_dim);
  const std::int64_t element = static_cast<std::int64_t>(dtype_bytes(dtype));
  threads.run(cache.heads, [&](std::int64_t head) {
    std::vector<float> rows(static_cast<std::size_t>(kCacheBlock * d));
    std::vector<float> scratch(static_cast<std::size_t>(kernels.cache_get_scratch(d)));
    for (std::int64_t p = 0; p < positions; p += kCacheBlock) {
      const std::int64_t count = std::min<std::int64_t>(kCacheBlock, positions - p);
      kernels.cache_get(cache.blocks + head * cache.stride + p / kCacheBlock * cache_block_bytes(d),
                        d, cache.format, cache.part, static_cast<int>(count), rows.data(),
                        scratch.data());
      kernels.store(rows.data(), dtype, count * d,
                    static_cast<char*>(out) + (head * positions + p) * d * element);
    }
  });
}

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

  const std::int64_t columns = spec.in[0].layout.n,
                     total = static_cast<std::int64_t>(choices.size());
  constexpr std::int64_t kTogether = 8;  // experts of one token in one product
  const std::int64_t most = std::max<std::int64_t>(chunk_of(total), 1);
  const std::int64_t wide_floats = std::max(most, kTogether) * columns;
  float* x = floats(2, rows * hidden * 2 + most * (2 * hidden + spec.width) + wide_floats);
  float* out = x + rows * hidden;
  float* gathered = out + rows * hidden;
  float* update = gathered + most * hidden;
  float* inner = update + most * hidden;
  float* wide = inner + most * spec.width;
  work.kernels.load(call.x, call.dtype, rows * hidden, x);
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
      multiply(together, x, 1, hidden, wide, count * columns, call.precision, threads);
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
    multiply({expert_of(spec.in[0], first->expert)}, gathered, count, hidden, wide, columns,
             call.precision, threads);
    expert_rows(work, spec, first->expert, wide, columns, count, inner, update);
    for (std::int64_t i = 0; i < count; ++i) add(first[i], update + i * hidden);
    at += count;
  }
  work.kernels.store(out, call.dtype, rows * hidden, call.out);
}

}  // namespace lowbit
