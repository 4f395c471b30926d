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

#include "cpu/fused_kernels.h"
#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

constexpr int kSpan = 128;  // positions between two looks at the maximum: scores stay in an L1
constexpr int kSpanBlocks = kSpan / kCacheBlock;
constexpr float kLog2E = 1.44269504f;

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

// Transposes 16 rows of 16 lanes.
LOWBIT_INLINE void transpose16(__m512i (&rows)[16]) {
  __m512i t[16];
  unroll<8>([&](auto i) LOWBIT_LAMBDA {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  unroll<4>([&](auto i) LOWBIT_LAMBDA {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  });
  unroll<4>([&](auto i) LOWBIT_LAMBDA {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
  });
  unroll<4>([&](auto i) LOWBIT_LAMBDA {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    rows[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    rows[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  });
}

void many_pack_keys(const HeadRows& head, std::int64_t first, int count, int d, std::byte* to) {
  const std::int64_t bytes = head.dtype == DType::kFloat32 ? 4 : 2;
  const char* from = static_cast<const char*>(head.data) + first * head.stride * bytes;
  for (int p = 0; p < kCacheBlock; p += 16) {
    for (int i = 0; i < d; i += 32) {
      __m512i rows[16];
      unroll<16>([&](auto l) LOWBIT_LAMBDA {
        rows[l] = p + l < count
                      ? bf16_row(from + (p + l) * head.stride * bytes, head.dtype, i, d - i)
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
                      ? bf16_row(from + (p + l) * head.stride * bytes, head.dtype, i, d - i)
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

// 2^x, relative error below 2^-18; 0 below -126, where the result would be subnormal.
LOWBIT_INLINE __m512 exp2_of(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(x, 0);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(9.570101877e-3f);  // minimax on [-1/2, 1/2]
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.591786178e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402474484e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931218146e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999992614e-1f));
  return _mm512_maskz_scalef_ps(normal, p, n);
}

LOWBIT_INLINE __m512 tanh_of(__m512 x) {
  // 1 - 2 / (e^2x + 1) cancels near zero: there the odd Taylor terms are exact enough.
  const __m512 x2 = _mm512_mul_ps(x, x);
  __m512 small = _mm512_fmadd_ps(x2, _mm512_set1_ps(-0.0539682540f), _mm512_set1_ps(0.133333333f));
  small = _mm512_fmadd_ps(x2, small, _mm512_set1_ps(-0.333333333f));
  small = _mm512_fmadd_ps(_mm512_mul_ps(x2, small), x, x);
  const __m512 two = _mm512_set1_ps(2.0f), one = _mm512_set1_ps(1.0f);
  // e^2x of more than 2^126 is as good as infinity.
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, two * kLog2E));
  const __m512 large = one - two / (exp2_of(power) + one);
  const __mmask16 near = _mm512_cmp_ps_mask(x2, _mm512_set1_ps(0.01f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(large, near, small);
}

// What a mask adds to the scores of positions p .. p + 15, times log2(e); the first `count` exist.
LOWBIT_INLINE __m512 mask16_of(MaskKind kind, const void* mask, std::int64_t p,
                               std::int64_t count) {
  if (kind == MaskKind::kBool) {
    const __m128i bytes =
        _mm_maskz_loadu_epi8(mask16(count), static_cast<const std::uint8_t*>(mask) + p);
    const __mmask16 hidden = _mm_cmpeq_epi8_mask(bytes, _mm_setzero_si128());
    return _mm512_maskz_mov_ps(hidden, _mm512_set1_ps(-__builtin_inff()));
  }
  const DType dtype = kind == MaskKind::kFloat32   ? DType::kFloat32
                      : kind == MaskKind::kFloat16 ? DType::kFloat16
                                                   : DType::kBFloat16;
  return _mm512_mul_ps(load16(mask, dtype, p, count), _mm512_set1_ps(kLog2E));
}

// Scores of positions `first` ... of row r that are not as they should be yet: softcap, mask, and
// positions that are not seen.
void many_adjust(const AttendRows& args, int r, std::int64_t first, std::int64_t limit,
                 float* scores) {
  const __m512 cap = _mm512_set1_ps(args.softcap * kLog2E);
  for (int p = 0; p < kSpan; p += 16) {
    __m512 s = _mm512_load_ps(scores + p);
    if (args.softcap > 0) s = _mm512_mul_ps(tanh_of(_mm512_div_ps(s, cap)), cap);
    const std::int64_t at = first + p;
    if (args.masks != nullptr) {
      s = _mm512_add_ps(s, mask16_of(args.mask_kind, args.masks[r], at, args.end - at));
    }
    s = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), mask16(limit - at), s);
    _mm512_store_ps(scores + p, s);
  }
}

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
  const typename Products::Session session;
  for (std::int64_t first = 0; first < args.end; first += kSpan) {
    const std::int64_t left = args.end - first;
    const int blocks =
        left >= kSpan ? kSpanBlocks : static_cast<int>((left + kCacheBlock - 1) / kCacheBlock);
    const std::int64_t block = first / kCacheBlock;
    Products::scores(work, keys + block * block_bytes, blocks);
    for (int r = 0; r < args.rows; ++r) {
      float* row = work.scores + r * kSpan;
      std::int64_t limit = args.end;
      if (args.limits != nullptr && args.limits[r] < limit) limit = args.limits[r];
      if (args.masks != nullptr || args.softcap > 0 || limit < first + kSpan) {
        many_adjust(args, r, first, limit, row);
      }
      __m512 best = _mm512_load_ps(row);
      for (int p = 16; p < kSpan; p += 16) best = _mm512_max_ps(best, _mm512_load_ps(row + p));
      const float before = args.max[r], here = _mm512_reduce_max_ps(best);
      const float after = here > before ? here : before;
      // Nothing seen so far: -inf - 0, not -inf - -inf.
      const __m512 most = _mm512_set1_ps(after == -INFINITY ? 0.0f : after);
      __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      std::uint16_t* weights = work.weights + r * kSpan;
      unroll<kSpan / 32>([&](auto i) LOWBIT_LAMBDA {
        const __m512 low = exp2_of(_mm512_sub_ps(_mm512_load_ps(row + 32 * i), most));
        const __m512 high = exp2_of(_mm512_sub_ps(_mm512_load_ps(row + 32 * i + 16), most));
        total[0] = _mm512_add_ps(total[0], low);
        total[1] = _mm512_add_ps(total[1], high);
        _mm512_store_si512(weights + 32 * i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      });
      if (after != before) {
        if (before != -INFINITY) {
          const __m512 factor = exp2_of(_mm512_set1_ps(before - after));
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
