// Operators of quantized key and value caches: append, read, memory.
#include "lowbit/fused.h"
#include "packed_cache.h"

namespace lowbit::binding {
namespace {

CachedHeads cached_heads(const char* op, const Tensor& cache, std::int64_t head_dim,
                         std::int64_t positions, std::int64_t format, std::int64_t part) {
  check_packed_cache(op, cache, head_dim, positions);
  LOWBIT_CHECK(part == 0 || part == 1, ErrorCode::kValue, op,
               ": part must be 0 (keys) or 1 (values), got ", part);
  CachedHeads heads;
  heads.blocks = static_cast<std::byte*>(cache.data_ptr());
  heads.stride = cache.size(2) * cache.size(3);
  heads.heads = cache.size(0) * cache.size(1);
  heads.head_dim = head_dim;
  heads.format = checked_cache_format(op, format, /*quantized=*/true);
  heads.part = static_cast<CachePart>(part);
  return heads;
}

void cache_append_(const Tensor& cache, const Tensor& x_given, std::int64_t past,
                   std::int64_t cache_format, std::int64_t part) {
  const char* op = "cache_append_";
  const DType dtype = float_dtype(op, "x", x_given.scalar_type(), false);
  check_cpu(op, "x", x_given);
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  LOWBIT_CHECK(x.dim() == 4 && cache.dim() == 4 && x.size(0) == cache.size(0) &&
                   x.size(1) == cache.size(1) && past >= 0 && past < (std::int64_t{1} << 40),
               ErrorCode::kValue, op, ": x must be [batch, kv_heads, tokens, head_dim] of ",
               shape_text(cache), " behind ", past, " positions, got ", shape_text(x));
  const CachedHeads heads =
      cached_heads(op, cache, x.size(3), past + x.size(2), cache_format, part);
  cache_append(heads, past, x.size(2), x.data_ptr(), dtype, torch_threads());
}

Tensor cache_read(const Tensor& cache, std::int64_t positions, std::int64_t head_dim,
                  std::int64_t cache_format, std::int64_t part, ScalarType dtype) {
  const char* op = "cache_read";
  LOWBIT_CHECK(positions >= 0 && positions < (std::int64_t{1} << 40), ErrorCode::kValue, op,
               ": positions must be 0 to 2^40 - 1, got ", positions);
  const CachedHeads heads = cached_heads(op, cache, head_dim, positions, cache_format, part);
  const DType out_dtype = float_dtype(op, "dtype", dtype, false);
  const std::int64_t sizes[4] = {cache.size(0), cache.size(1), positions, head_dim};
  Tensor out = empty_cpu(sizes, 4, dtype);
  lowbit::cache_read(heads, positions, out.data_ptr(), out_dtype, torch_threads());
  return out;
}

std::int64_t block_bytes_of(std::int64_t head_dim) {
  LOWBIT_CHECK(head_dim > 0 && head_dim < (1 << 20), ErrorCode::kValue,
               "cache_block_bytes: head_dim must be 1 to 2^20 - 1, got ", head_dim);
  return cache_block_bytes(head_dim);
}

Tensor cache_memory(std::int64_t bytes) {
  LOWBIT_CHECK(bytes >= 0, ErrorCode::kValue, "cache_memory: bytes must not be negative, got ",
               bytes);
  return streamed_bytes(1, bytes, Streamed::kCaches);
}

}  // namespace
}  // namespace lowbit::binding

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  using namespace lowbit::binding;
  m.impl("cache_append_", LOWBIT_BOX(cache_append_));
  m.impl("cache_read", LOWBIT_BOX(cache_read));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  using namespace lowbit::binding;
  m.impl("cache_block_bytes", LOWBIT_BOX(block_bytes_of));
  m.impl("cache_memory", LOWBIT_BOX(cache_memory));
}
