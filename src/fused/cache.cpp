#include "fused/cache.h"

namespace lowbit {
namespace fused {

void HeadTarget::store(const FusedKernels& kernels, const float* head, int d, std::int64_t b,
                       std::int64_t h, std::int64_t t) const {
  const std::int64_t start = b * batch_stride + h * head_stride;
  if (format == CacheFormat::kFloat) {
    kernels.store(head, dtype, d, data + (start + (past + t) * stride) * bytes_of(dtype));
    return;
  }
  const std::int64_t position = past + t;
  kernels.cache_put(
      head, d, format, part, static_cast<int>(position % kCacheBlock),
      reinterpret_cast<std::byte*>(data) + start + position / kCacheBlock * cache_block_bytes(d));
}

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

}  // namespace fused

using namespace fused;

void cache_append(const CachedHeads& cache, std::int64_t past, std::int64_t tokens, const void* x,
                  DType dtype, const Threads& threads) {
  const FusedKernels& kernels = cpu::fused_kernels();
  const std::int64_t d = cache.head_dim, element = bytes_of(dtype);
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
  const std::int64_t element = bytes_of(dtype);
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

}  // namespace lowbit
