// Attention of many query rows over keys and values in bfloat16, for the levels that multiply pairs
// of them. Keys and values of a head are rounded and put into the order of the products once per
// call; a task takes some dozens of rows through all positions:
//   1. scores of kSpan positions: q K^T, sums in float32
//   2. the running softmax, exponentials to base 2; weights rounded to bfloat16
//   3. acc += weights V, sums in float32
// Blocks of kCacheBlock positions, D channels (the head size rounded up to 32):
//   keys     D / 2 pairs of channels    x 64 positions x 2 channels     two bytes each
//   values   32 pairs of positions      x D channels   x 2 positions    two bytes each
// Steps 1 and 3 belong to the including file's Products; the bound is in docs/numerics.md.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/generic/fused_softmax.h"

namespace lowbit::cpu {
namespace {

constexpr int kSpan = 128;  // positions between two looks at the maximum: scores stay in an L1
constexpr int kSpanBlocks = kSpan / kCacheBlock;

LOWBIT_INLINE std::int64_t many_padded(std::int64_t d) {
  return (d + 31) / 32 * 32;
}

// Of the keys or the values of one block.
LOWBIT_INLINE std::int64_t many_block_bytes(std::int64_t d) {
  return kCacheBlock * many_padded(d) * 2;
}

std::int64_t many_packed_bytes(std::int64_t positions, int d) {
  return (positions + kCacheBlock - 1) / kCacheBlock * many_block_bytes(d);
}

// Channels i .. i + 31 of a row as bfloat16, of which the first `count` exist.
LOWBIT_INLINE __m512i bf16_row(const void* data, DType dtype, std::int64_t i, std::int64_t count) {
  if (dtype == DType::kBFloat16) {
    const __mmask32 mask =
        count >= 32 ? 0xffffffffu : static_cast<__mmask32>((1u << (count > 0 ? count : 0)) - 1);
    return _mm512_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(data) + i);
  }
  const __m512 low = load16(data, dtype, i, count), high = load16(data, dtype, i + 16, count - 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

void many_pack_keys(const HeadRows& head, std::int64_t first, int count, int d, std::byte* to) {
  const int held = head.channels;
  const std::int64_t bytes = head.dtype == DType::kFloat32 ? 4 : 2;
  const char* from = static_cast<const char*>(head.data) + first * head.stride * bytes;
  for (int p = 0; p < kCacheBlock; p += 16) {
    for (int i = 0; i < d; i += 32) {
      __m512i rows[16];
      unroll<16>([&](auto l) LOWBIT_LAMBDA {
        rows[l] = p + l < count
                      ? bf16_row(from + (p + l) * head.stride * bytes, head.dtype, i, held - i)
                      : _mm512_setzero_si512();
      });
      transpose16(rows);
      unroll<16>([&](auto l) LOWBIT_LAMBDA {
        _mm512_store_si512(to + ((i / 2 + l) * kCacheBlock + p) * 4, rows[l]);
      });
    }
  }
}

void many_pack_values(const HeadRows& head, std::int64_t first, int count, int d, std::byte* to) {
  const int held = head.channels;
  const std::int64_t bytes = head.dtype == DType::kFloat32 ? 4 : 2;
  const std::int64_t padded = many_padded(d);
  const char* from = static_cast<const char*>(head.data) + first * head.stride * bytes;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int p = 0; p < kCacheBlock; p += 2) {
    for (int i = 0; i < d; i += 32) {
      __m512i rows[2];
      for (int l = 0; l < 2; ++l) {
        rows[l] = p + l < count
                      ? bf16_row(from + (p + l) * head.stride * bytes, head.dtype, i, held - i)
                      : _mm512_setzero_si512();
      }
      std::byte* at = to + (p / 2 * padded + i) * 4;
      _mm512_store_si512(at, _mm512_permutex2var_epi16(rows[0], low, rows[1]));
      _mm512_store_si512(at + 64, _mm512_permutex2var_epi16(rows[0], high, rows[1]));
    }
  }
}

void many_pack(const HeadRows& keys, const HeadRows& values, std::int64_t positions, int d,
               std::int64_t block, std::byte* packed_keys, std::byte* packed_values) {
  const std::int64_t first = block * kCacheBlock, left = positions - first;
  const int count = static_cast<int>(left < kCacheBlock ? left : kCacheBlock);
  many_pack_keys(keys, first, count, d, packed_keys + block * many_block_bytes(d));
  many_pack_values(values, first, count, d, packed_values + block * many_block_bytes(d));
}

// The working memory of one task.
struct ManyWork {
  int rows;                // computed: a multiple of what the products take together
  int padded;              // channels
  float* scores;           // [rows][kSpan]
  float* acc;              // [rows][padded]
  std::uint16_t* query;    // [rows][padded] bfloat16, times log2(e)
  std::uint16_t* weights;  // [rows][kSpan] bfloat16

  static std::int64_t floats(std::int64_t rows, std::int64_t d) {
    return rows * (kSpan + many_padded(d) + many_padded(d) / 2 + kSpan / 2) + 16;
  }

  ManyWork(int count, int d, float* scratch)
      : rows(count), padded(static_cast<int>(many_padded(d))) {
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    scores = scratch + (64 - address % 64) % 64 / 4;
    acc = scores + rows * kSpan;
    query = reinterpret_cast<std::uint16_t*>(acc + rows * padded);
    weights = query + rows * padded;
  }
};

template <class Products>
void many_attend(const AttendRows& args) {
  const int d = args.d;
  const ManyWork work((args.rows + Products::kRows - 1) / Products::kRows * Products::kRows, d,
                      args.scratch);
  for (int r = 0; r < work.rows; ++r) {
    for (int i = 0; i < work.padded; i += 32) {
      __m512i bits = _mm512_setzero_si512();
      if (r < args.rows) {
        const float* q = args.q + std::int64_t{r} * d;
        const __m512 log2e = _mm512_set1_ps(kLog2E);
        const __m512 low = _mm512_mul_ps(load16(q, DType::kFloat32, i, d - i), log2e);
        const __m512 high = _mm512_mul_ps(load16(q, DType::kFloat32, i + 16, d - i - 16), log2e);
        bits = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      }
      _mm512_store_si512(work.query + r * work.padded + i, bits);
    }
  }
  std::memset(work.acc, 0, sizeof(float) * static_cast<std::size_t>(work.rows * work.padded));
  std::memset(work.weights, 0, 2 * static_cast<std::size_t>(work.rows * kSpan));
  for (int r = 0; r < args.rows; ++r) {
    args.max[r] = -INFINITY;
    args.sum[r] = 0;
  }
  const std::byte* keys = static_cast<const std::byte*>(args.keys);
  const std::byte* values = static_cast<const std::byte*>(args.values);
  const std::int64_t block_bytes = many_block_bytes(d);
  [[maybe_unused]] const typename Products::Session session;
  for (std::int64_t first = 0; first < args.end; first += kSpan) {
    const std::int64_t left = args.end - first;
    const int blocks =
        left >= kSpan ? kSpanBlocks : static_cast<int>((left + kCacheBlock - 1) / kCacheBlock);
    const std::int64_t block = first / kCacheBlock;
    Products::scores(work, keys + block * block_bytes, blocks);
    for (int r = 0; r < args.rows; ++r) {
      float* row = work.scores + r * kSpan;
      const auto [before, after, most] = take_maximum<kSpan>(args, r, first, kSpan, row);
      __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      std::uint16_t* weights = work.weights + r * kSpan;
      unroll<kSpan / 32>([&](auto i) LOWBIT_LAMBDA {
        const __m512 low = exp2_of<4>(_mm512_sub_ps(_mm512_load_ps(row + 32 * i), most));
        const __m512 high = exp2_of<4>(_mm512_sub_ps(_mm512_load_ps(row + 32 * i + 16), most));
        total[0] = _mm512_add_ps(total[0], low);
        total[1] = _mm512_add_ps(total[1], high);
        _mm512_store_si512(weights + 32 * i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      });
      if (after != before) {
        if (before != -INFINITY) {
          const __m512 factor = exp2_of<4>(_mm512_set1_ps(before - after));
          args.sum[r] *= _mm512_cvtss_f32(factor);
          for (int i = 0; i < work.padded; i += 16) {
            float* at = work.acc + r * work.padded + i;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
          }
        }
        args.max[r] = after;
      }
      args.sum[r] += _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
    }
    Products::values(work, values + block * block_bytes, blocks);
  }
  for (int r = 0; r < args.rows; ++r) {
    args.max[r] /= kLog2E;
    std::memcpy(args.acc + std::int64_t{r} * d, work.acc + r * work.padded,
                sizeof(float) * static_cast<std::size_t>(d));
  }
}

template <class Products>
std::int64_t many_scratch(int d) {
  return ManyWork::floats(Products::kTaskRows, d);
}

template <class Products>
constexpr ManyRows many_rows(const char* name) {
  return {name,      Products::kTaskRows,    many_packed_bytes,
          many_pack, many_scratch<Products>, many_attend<Products>};
}

}  // namespace
}  // namespace lowbit::cpu
