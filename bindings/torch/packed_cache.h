// Quantized keys and values of a cache, as they come from Python.
#pragma once

#include <cstdint>

#include "check.h"
#include "lowbit/fused.h"

namespace lowbit::binding {

inline CacheFormat checked_cache_format(const char* op, std::int64_t number, bool quantized) {
  LOWBIT_CHECK(number >= (quantized ? 1 : 0) && number < kCacheFormatCount, ErrorCode::kValue, op,
               ": cache_format must be ", quantized ? "" : "0 (a float type), ",
               "1 (int8) or 2 (fp8), got ", number);
  return static_cast<CacheFormat>(number);
}

// Quantized keys or values: uint8 [batch, kv_heads, blocks, block_bytes], contiguous, with room for
// `positions`.
inline void check_packed_cache(const char* op, const Tensor& cache, std::int64_t head_dim,
                               std::int64_t positions) {
  check_cpu(op, "cache", cache);
  LOWBIT_CHECK(cache.scalar_type() == ScalarType::Byte, ErrorCode::kType, op,
               ": quantized keys and values must be uint8, got ",
               torch::headeronly::toString(cache.scalar_type()));
  LOWBIT_CHECK(head_dim > 0 && head_dim < (1 << 20) && cache.dim() == 4 && cache.is_contiguous() &&
                   cache.size(3) == cache_block_bytes(head_dim) &&
                   cache.size(2) >= (positions + kCacheBlock - 1) / kCacheBlock,
               ErrorCode::kValue, op,
               ": quantized keys and values must be contiguous [batch, kv_heads, blocks, ",
               cache_block_bytes(head_dim), "] with blocks of 64 for ", positions,
               " positions, got ", shape_text(cache));
}

}  // namespace lowbit::binding
