#include "fused/latents.h"

#include <algorithm>

namespace lowbit::fused {
namespace {

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
        spec.sinks = static_cast<const char*>(spec.sinks) + from * bytes_of(spec.sinks_dtype);
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
      if (a.mask.kind != MaskKind::kNone) {
        part_of_heads.mask.data = static_cast<const char*>(a.mask.data) +
                                  from * a.mask.head_stride * mask_bytes(a.mask.kind);
      }
      attend_chunk(part_of_heads);
    }
  }
}

}  // namespace

std::int64_t latent_floats(const AttentionSpec& spec, std::int64_t rows) {
  return spec.latent.width > 0 ? rows * spec.heads * spec.values() : 0;
}

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

}  // namespace lowbit::fused
