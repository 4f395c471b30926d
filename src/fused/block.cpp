// Decoder blocks: the packed products of linear_driver.h with everything between them.
//
// A call works on chunks of tokens, so that what lies between two products stays in the caches and
// memory stays bounded at any prompt length:
//   1. per chunk: norm, projections; q is kept, k and v go to the cache
//   2. per chunk: attention over the whole cache, output projection, residual, MLP half
#include <algorithm>

#include "fused/attention.h"
#include "fused/check.h"
#include "fused/latents.h"
#include "fused/mlp.h"
#include "fused/projections.h"

namespace lowbit {
namespace {

using namespace fused;

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
  MakeRow finish_row;
  if (block.parallel && mlp) std::copy_n(rows, count * hidden, before);
  if (attention) {
    const std::int64_t width = std::int64_t{block.attention.heads} * block.attention.values();
    float* update = rest;
    rest += count * hidden;
    float* mixed = mixed_rows == nullptr ? rest : mixed_rows + begin * width;
    if (mixed_rows == nullptr) {
      attend_chunk({work, block.attention, q, cache, positions, begin, end, mixed});
    }
    multiply(
        work, {block.attention.out}, mixed, count, width, update, hidden,
        block.attention.mixed_norm.kind == NormKind::kNone ? MakeRow{} : [&](std::int64_t t) {
          normalize(work, block.attention.mixed_norm, mixed + t * width, width);
        });
    finish_row = [=, &work, &block](std::int64_t t) {
      merge(work, block.attention, update + t * hidden, rows + t * hidden);
    };
  }
  if (mlp) {
    mlp_chunk(work, block.mlp, block.parallel ? before : rows, count, rows, rest, finish_row);
  } else if (attention) {
    for_tokens(count, work.threads, finish_row);
  }
}

// Everything behind the projections, for all tokens; `mixed` holds latent_floats of them.
void finish_block(const Work& work, const BlockSpec& block, const float* q, const CacheView& cache,
                  std::int64_t positions, float* x, float* mixed, float* memory) {
  const AttentionSpec& a = block.attention;
  const bool latent = a.heads > 0 && a.latent.width > 0;
  if (latent) attend_latents({work, a, q, cache, positions, 0, work.rows, mixed});
  const std::int64_t chunk = chunk_of(work.rows);
  for (std::int64_t begin = 0; begin < work.rows; begin += chunk) {
    finish_chunk(work, block, q, cache, positions, begin, std::min(work.rows, begin + chunk), x,
                 latent ? mixed : nullptr, memory);
  }
}

std::int64_t finish_floats(const BlockSpec& block, std::int64_t tokens, std::int64_t hidden) {
  const std::int64_t mixed =
      tokens * std::int64_t{block.attention.heads} * block.attention.values();
  const std::int64_t mlp = block.mlp.width > 0 ? mlp_floats(block.mlp, tokens, hidden) : 0;
  return tokens * 2 * hidden + std::max(mixed, mlp);
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
  load_tokens(work, call.x, call.dtype, rows, hidden, x);

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
    finish_block(work, block, q, cache, a.cross ? cache.positions : call.past + call.tokens, x,
                 mixed, memory);
  }
  store_tokens(work, x, call.dtype, rows, hidden, call.out);
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
  load_tokens(work, call.x, call.dtype, rows, hidden, x);
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
  const std::int64_t element = bytes_of(call.dtype);
  float* x = floats(2, chunk * (hidden + width));
  float* projected = x + chunk * hidden;
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    const std::int64_t count = std::min(chunk, rows - begin);
    work.kernels.load(static_cast<const char*>(call.x) + begin * hidden * element, call.dtype,
                      count * hidden, x);
    for_tokens(count, threads,
               [&](std::int64_t t) { normalize(work, a.norm, x + t * hidden, hidden); });
    multiply(work, a.in, x, count, hidden, projected, width);
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
  load_tokens(work, call.x, call.dtype, rows, hidden, x);
  // [batch, heads, tokens, width] to float32 [batch, tokens, heads, width], queries scaled
  const std::int64_t element = bytes_of(call.dtype);
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
  finish_block(work, block, queries, cache, positions, x, mixed, memory);
  store_tokens(work, x, call.dtype, rows, hidden, call.out);
}

}  // namespace lowbit
