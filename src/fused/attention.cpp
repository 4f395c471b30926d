#include "fused/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lowbit::fused {
namespace {

// Positions that one attention task reads when a single token attends to a long cache. Depends on
// nothing but shapes, so the order of the sums does too.
constexpr std::int64_t kTaskPositions = 512;

// Below about this many row-position pairs times head size, sharing the attention of a block costs
// more than it gains. A join is some 0.7 us; one region for all blocks, with threads that wait for
// each other spinning, made it 0.2 us and gained nothing: products wait for memory.
constexpr std::int64_t kSerialWork = 1 << 15;

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
          masks[r] = static_cast<const char*>(a.mask.data) +
                     (b * a.mask.batch_stride + (kv * a.group + i) * a.mask.head_stride +
                      s * a.mask.stride) *
                         mask_bytes(a.mask.kind);
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
            static_cast<const char*>(spec.sinks) + (kv * a.group + i) * bytes_of(spec.sinks_dtype),
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

// What packed keys and values of the heads that are worked on together may take.
constexpr std::int64_t kPackedBytes = std::int64_t{32} << 20;

// Fewer rows of one key/value head than this do not pay for packing it.
constexpr std::int64_t kManyRows = 16;

// The kernels that round keys, values, queries and weights to bfloat16, where that is asked for and
// worth it; nullptr: float32.
const cpu::ManyRows* many_rows_for(const Attention& a) {
  const BlockCall& call = a.call;
  if (a.over_latents || a.values_d > a.d) return nullptr;
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

// Packs one block of positions of a key/value head, dequantized where the cache is not.
void pack_block(const Attention& a, const cpu::ManyRows& many, std::int64_t b, std::int64_t kv,
                std::int64_t positions, std::int64_t block, std::byte* keys, std::byte* values) {
  const CacheView& cache = a.cache;
  if (cache.format == CacheFormat::kFloat) {
    many.pack({a.keys(b, kv), cache.dtype, cache.key_stride, a.d},
              {a.values(b, kv), cache.dtype, cache.value_stride, a.values_d}, positions, a.d, block,
              keys, values);
    return;
  }
  const FusedKernels& kernels = a.work.kernels;
  const int d = a.d;
  const int count =
      static_cast<int>(std::min<std::int64_t>(kCacheBlock, positions - block * kCacheBlock));
  float* rows = floats(3, 2 * kCacheBlock * d + kernels.cache_get_scratch(d));
  float* value_rows = rows + kCacheBlock * d;
  float* scratch = value_rows + kCacheBlock * d;
  const auto block_of = [&](const void* head) {
    return static_cast<const std::byte*>(head) + block * cache_block_bytes(d);
  };
  kernels.cache_get(block_of(a.keys(b, kv)), d, cache.format, CachePart::kKeys, count, rows,
                    scratch);
  kernels.cache_get(block_of(a.values(b, kv)), d, cache.format, CachePart::kValues, count,
                    value_rows, scratch);
  const std::int64_t at = block * many.packed_bytes(kCacheBlock, d);
  many.pack({rows, DType::kFloat32, d, d}, {value_rows, DType::kFloat32, d, d}, count, d, 0,
            keys + at, values + at);
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
      pack_block(a, many, b, kv, positions, task % blocks, keys, keys + bytes);
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

}  // namespace

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

}  // namespace lowbit::fused
