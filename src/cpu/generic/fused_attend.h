// Attention of R query rows that share a key/value head, 64 positions at a time:
//   1. the 64 keys are transposed to [d, 64] floats in L1, so that a score is a column: no
//      horizontal sums, and R rows use the transposed block R times;
//   2. scores = q Kt, a register-blocked product of 6 rows x 4 vectors;
//   3. the running softmax: new maximum, exponentials, rescaled accumulators;
//   4. acc += p V by the same product; values are converted while they are loaded.
// With grouped queries R is at least the size of the group, also for a single token.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/generic/fused_cache.h"
#include "cpu/generic/fused_functions.h"
#include "cpu/generic/fused_int8.h"
#include "cpu/generic/fused_product.h"

namespace lowbit::cpu {
namespace {

// Whether accumulators hold, of every two vectors of channels, the even ones and then the odd ones,
// as they come out of one load.
template <DType kType>
constexpr bool kSplitChannels = kType == DType::kBFloat16;

LOWBIT_INLINE bool splits_channels(DType dtype, int d) {
  return dtype == DType::kBFloat16 && d % (kColumns * kLanes) == 0;
}

// Puts accumulators [rows, d] of add_values back in order.
void join_channels(int rows, int d, float* acc) {
  for (std::int64_t at = 0; at < std::int64_t{rows} * d; at += 2 * kLanes) {
    float even[kLanes], odd[kLanes];
    std::memcpy(even, acc + at, sizeof even);
    std::memcpy(odd, acc + at + kLanes, sizeof odd);
    for (int l = 0; l < kLanes; ++l) {
      acc[at + 2 * l] = even[l];
      acc[at + 2 * l + 1] = odd[l];
    }
  }
}

// Lines of `count` rows are on their way while something else is computed.
LOWBIT_INLINE void prefetch_rows(const void* rows, std::int64_t stride, std::int64_t bytes,
                                 int count) {
  for (int r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(rows) + r * stride;
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// acc[rows][d] += p[rows][count] * values. d is a multiple of kLanes.
template <DType kType>
void add_values(int rows, const float* p, const void* values, std::int64_t stride, int count, int d,
                float* acc) {
  int column = 0;
  if (kSplitChannels<kType> && splits_channels(kType, d)) {
    for (; column < d; column += kColumns * kLanes) {
      const auto b = [&](int i, int v) __attribute__((always_inline)) {
        vf pair;
        std::memcpy(
            &pair,
            static_cast<const std::uint16_t*>(values) + i * stride + column + v / 2 * 2 * kLanes,
            sizeof pair);
        return v % 2 == 0 ? half_of_pair<DType::kBFloat16, 0>(pair)
                          : half_of_pair<DType::kBFloat16, 1>(pair);
      };
      product_rows<kColumns, true>(rows, p, kPositions, b, count, acc + column, d);
    }
    return;
  }
  for (; column + kColumns * kLanes <= d; column += kColumns * kLanes) {
    const auto b = [&](int i, int v) __attribute__((always_inline)) {
      return load_as<kType>(values, i * stride + column + v * kLanes);
    };
    product_rows<kColumns, true>(rows, p, kPositions, b, count, acc + column, d);
  }
  for (; column < d; column += kLanes) {
    const auto b = [&](int i, int) __attribute__((always_inline)) {
      return load_as<kType>(values, i * stride + column);
    };
    product_rows<1, true>(rows, p, kPositions, b, count, acc + column, d);
  }
}

// Transposed keys, scores, padded values and accumulators (where the head size is no multiple of
// the vectors, or the cache is quantized), and what byte products need.
std::int64_t attend_scratch(int rows, int d, int values_d) {
  const std::int64_t padded = cache_padded(values_d);
  std::int64_t floats = std::int64_t{kPositions} * d + std::int64_t{rows} * kPositions;
  floats += (kPositions + rows) * padded;
#if defined(LOWBIT_ATTEND_INT8)
  floats += Int8Work::floats(rows, d);
#endif
  return floats;
}

// The additive mask of one row and position.
LOWBIT_INLINE float mask_value(MaskKind kind, const void* mask, std::int64_t p) {
  switch (kind) {
    case MaskKind::kBool:
      return static_cast<const std::uint8_t*>(mask)[p] != 0 ? 0.0f : -INFINITY;
    case MaskKind::kFloat32:
      return static_cast<const float*>(mask)[p];
    case MaskKind::kFloat16:
      return load_float(mask, DType::kFloat16, p);
    case MaskKind::kBFloat16:
      return load_float(mask, DType::kBFloat16, p);
    default:
      return 0.0f;
  }
}

void attend(const AttendRows& args) {
  const int rows = args.rows, d = args.d, values_d = args.values_d;
  const bool cached = args.format != CacheFormat::kFloat;
  // Quantized channels are stored up to a multiple of 16, whatever the vectors.
  const std::int64_t padded = cached ? cache_padded(values_d) : round_to_lanes(values_d);
  const bool pad = padded != values_d;
  float* transposed = args.scratch;
  float* scores = transposed + std::int64_t{kPositions} * d;
  float* padded_values = scores + std::int64_t{rows} * kPositions;
  float* padded_acc = padded_values + kPositions * padded;
  float* acc = pad ? padded_acc : args.acc;
#if defined(LOWBIT_ATTEND_INT8)
  const bool bytewise = args.format == CacheFormat::kInt8;
  const Int8Work work(rows, d, padded_acc + rows * padded);
  if (bytewise) prepare_queries(args.q, rows, work);
#else
  constexpr bool bytewise = false;
#endif
  for (std::int64_t i = 0; i < rows * padded; ++i) acc[i] = 0;
  for (int r = 0; r < rows; ++r) {
    args.max[r] = -INFINITY;
    args.sum[r] = 0;
  }
  const std::int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const std::int64_t block_bytes = cache_block_bytes(d);
  for (std::int64_t first = args.begin; first < args.end; first += kPositions) {
    const int count =
        static_cast<int>(args.end - first < kPositions ? args.end - first : kPositions);
    const std::byte* key_block =
        static_cast<const std::byte*>(args.keys) + first / kPositions * block_bytes;
    const std::byte* value_block =
        static_cast<const std::byte*>(args.values) + first / kPositions * block_bytes;
    const char* values = static_cast<const char*>(args.values) + first * args.value_stride * bytes;
    if (cached) {
      prefetch_rows(value_block, 0, block_bytes, 1);
    } else {
      prefetch_rows(values, args.value_stride * bytes, values_d * bytes, count);
    }
#if defined(LOWBIT_ATTEND_INT8)
    if (bytewise) score_keys(rows, key_block, work, scores);
#endif
    if (args.format == CacheFormat::kFloat) {
      with_dtype(args.dtype, [&](auto type) {
        const int own = d - args.tail_d;
        transpose_keys<type()>(args.keys, args.key_stride, first, count, own, transposed);
        if (args.tail_d > 0) {
          transpose_keys<type()>(args.tail, args.tail_stride, first, count, args.tail_d,
                                 transposed + std::int64_t{own} * kPositions);
        }
      });
    } else if (args.format == CacheFormat::kFp8) {
      keys_to_columns<CacheFormat::kFp8>(key_block, d, transposed);
    } else if (!bytewise) {
      keys_to_columns<CacheFormat::kInt8>(key_block, d, transposed);
    }
    for (int column = 0; column < kPositions && !bytewise; column += kColumns * kLanes) {
      const auto b = [&](int i, int v) __attribute__((always_inline)) {
        return load(transposed + i * kPositions + column + v * kLanes);
      };
      product_rows<kColumns, false>(rows, args.q, d, b, d, scores + column, kPositions);
    }
    if (first + kPositions < args.end) {
      if (cached) {
        prefetch_rows(key_block + block_bytes, 0, block_bytes, 1);
      } else {
        const std::int64_t left = args.end - first - kPositions;
        prefetch_rows(
            static_cast<const char*>(args.keys) + (first + kPositions) * args.key_stride * bytes,
            args.key_stride * bytes, (d - args.tail_d) * bytes,
            static_cast<int>(left < kPositions ? left : kPositions));
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * kPositions;
      if (args.softcap > 0) {
        for (int p = 0; p < kPositions; p += kLanes) {
          store(row + p, vtanh(load(row + p) / args.softcap) * args.softcap);
        }
      }
      if (args.masks != nullptr) {
        for (int p = 0; p < count; ++p) {
          row[p] += mask_value(args.mask_kind, args.masks[r], first + p);
        }
      }
      int seen = count;
      if (args.limits != nullptr && args.limits[r] < first + count) {
        seen = args.limits[r] > first ? static_cast<int>(args.limits[r] - first) : 0;
      }
      for (int p = seen; p < kPositions; ++p) row[p] = -INFINITY;
      vf best = load(row);
      for (int p = kLanes; p < kPositions; p += kLanes) best = vmax(best, load(row + p));
      const float before = args.max[r];
      const float block_max = max_of(best);
      const float after = block_max > before ? block_max : before;
      if (after == -INFINITY) {  // nothing seen so far, and no NaN from -inf - -inf
        // A NaN score is no maximum, but must not vanish: its row becomes NaN.
        vf bad = {};
        for (int p = 0; p < kPositions; p += kLanes) {
          const vf s = load(row + p);
          bad = s == s ? bad : s;
          store(row + p, s == s ? vf{} : s);
        }
        args.sum[r] += sum_of(bad);
        continue;
      }
      vf total = {};
      for (int p = 0; p < kPositions; p += kLanes) {
        const vf e = vexp(load(row + p) - after);
        store(row + p, e);
        total = total + e;
      }
      if (after != before) {
        const float factor = before == -INFINITY ? 0.0f : std::exp(before - after);
        args.sum[r] *= factor;
        float* out = acc + r * padded;
        for (std::int64_t i = 0; i < padded; i += kLanes) store(out + i, load(out + i) * factor);
        args.max[r] = after;
      }
      args.sum[r] += sum_of(total);
    }
#if defined(LOWBIT_ATTEND_INT8)
    if (bytewise) {
      add_cached(rows, scores, value_block, count, work, acc, padded);
      continue;
    }
#endif
    if (cached) {
      args.format == CacheFormat::kInt8
          ? values_to_rows<CacheFormat::kInt8>(value_block, d, count, padded, padded_values)
          : values_to_rows<CacheFormat::kFp8>(value_block, d, count, padded, padded_values);
      add_values<DType::kFloat32>(rows, scores, padded_values, padded, count,
                                  static_cast<int>(padded), acc);
    } else if (pad) {
      for (int p = 0; p < count; ++p) {
        float* to = padded_values + p * padded;
        load_floats(values + p * args.value_stride * bytes, args.dtype, values_d, to);
        for (std::int64_t i = values_d; i < padded; ++i) to[i] = 0;
      }
      add_values<DType::kFloat32>(rows, scores, padded_values, padded, count,
                                  static_cast<int>(padded), acc);
    } else {
      with_dtype(args.dtype, [&](auto type) {
        add_values<type()>(rows, scores, values, args.value_stride, count, values_d, acc);
      });
    }
  }
  if (!cached && !pad && splits_channels(args.dtype, values_d)) {
    join_channels(rows, values_d, acc);
  }
  if (pad) {
    for (int r = 0; r < rows; ++r) {
      std::memcpy(args.acc + std::int64_t{r} * values_d, acc + r * padded,
                  static_cast<std::size_t>(values_d) * 4);
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
