// Attention of many query rows over keys and values in bfloat16, for the levels that multiply pairs
// of them. Keys and values of a head are rounded and put into the order of the products once per
// call; then kRows rows at a time, a lane for each, go through all positions:
//   1. scores [kSpan][kRows] = K Q^T, sums in float32
//   2. the running softmax, exponentials to base 2; weights rounded to bfloat16
//   3. acc [D][kRows] += V^T weights, sums in float32
// With a row in every lane the softmax has no sums or maxima across lanes. D channels: the head
// size rounded up to 32. Both products are of one form, left sides in panels of 32 along the sum:
//   keys     blocks of 64 positions: D / 32 panels of 64 positions x 32 channels
//   values   panels of 32 positions: D channels x 32 positions
//   query    D / 2 pairs of channels       x kRows x 2
//   weights  kSpan / 2 pairs of positions  x kRows x 2
// Steps 1 and 3 are the including file's Products; the bound is in docs/numerics.md.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/generic/fused_softmax.h"

namespace lowbit::cpu {
namespace {

constexpr int kSpan = kCacheBlock;  // positions between two looks at the maximum
constexpr int kPanel = 32;          // along the sum

LOWBIT_INLINE std::int64_t many_padded(std::int64_t d) {
  return (d + kPanel - 1) / kPanel * kPanel;
}

// Of the keys or the values of one block.
LOWBIT_INLINE std::int64_t many_block_elements(std::int64_t d) {
  return kCacheBlock * many_padded(d);
}

std::int64_t many_packed_bytes(std::int64_t positions, int d) {
  return (positions + kCacheBlock - 1) / kCacheBlock * many_block_elements(d) * 2;
}

// Rows of one head from a position on; what lies behind the last, or beyond the head, is zero.
struct Bf16Rows {
  const char* data;
  DType dtype;
  std::int64_t stride;  // bytes
  int count, channels;

  Bf16Rows(const HeadRows& head, std::int64_t first, int rows)
      : dtype(head.dtype), count(rows), channels(head.channels) {
    const std::int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    stride = head.stride * bytes;
    data = static_cast<const char*>(head.data) + first * stride;
  }

  // Channels i .. i + 31 of a row.
  LOWBIT_INLINE __m512i load(int row, int i) const {
    if (row >= count) return _mm512_setzero_si512();
    const char* from = data + row * stride;
    const int left = channels - i;
    if (dtype == DType::kBFloat16) {
      const __mmask32 mask =
          left >= 32 ? 0xffffffffu : static_cast<__mmask32>((1u << (left > 0 ? left : 0)) - 1);
      return _mm512_maskz_loadu_epi16(mask, reinterpret_cast<const std::uint16_t*>(from) + i);
    }
    const __m512 low = load16(from, dtype, i, left), high = load16(from, dtype, i + 16, left - 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};

void many_pack_keys(const Bf16Rows& rows, int d, std::uint16_t* to) {
  for (int i = 0; i < d; i += kPanel) {
    for (int p = 0; p < kCacheBlock; ++p, to += kPanel) _mm512_store_si512(to, rows.load(p, i));
  }
}

void many_pack_values(const Bf16Rows& rows, int d, std::uint16_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int p = 0; p < kCacheBlock; p += kPanel) {
    for (int i = 0; i < d; i += 32, to += 32 * kPanel) {
      // Of 16 channels each: pairs of positions, then a row for every channel.
      __m512i first[16], second[16];
      unroll<16>([&](auto pair) LOWBIT_LAMBDA {
        const __m512i even = rows.load(p + 2 * pair, i), odd = rows.load(p + 2 * pair + 1, i);
        first[pair] = _mm512_permutex2var_epi16(even, low, odd);
        second[pair] = _mm512_permutex2var_epi16(even, high, odd);
      });
      transpose16(first);
      transpose16(second);
      unroll<16>([&](auto c) LOWBIT_LAMBDA {
        _mm512_store_si512(to + c * kPanel, first[c]);
        _mm512_store_si512(to + (16 + c) * kPanel, second[c]);
      });
    }
  }
}

void many_pack(const HeadRows& keys, const HeadRows& values, std::int64_t positions, int d,
               std::int64_t block, std::byte* packed_keys, std::byte* packed_values) {
  const std::int64_t first = block * kCacheBlock, left = positions - first;
  const int count = static_cast<int>(left < kCacheBlock ? left : kCacheBlock);
  const int padded = static_cast<int>(many_padded(d));
  const std::int64_t at = block * many_block_elements(d);
  many_pack_keys({keys, first, count}, padded, reinterpret_cast<std::uint16_t*>(packed_keys) + at);
  many_pack_values({values, first, count}, padded,
                   reinterpret_cast<std::uint16_t*>(packed_values) + at);
}

// The working memory of kRows rows.
template <int kRows>
struct ManyWork {
  int padded;              // channels
  float* scores;           // [kSpan][kRows]
  float* acc;              // [padded][kRows]
  std::uint16_t* query;    // [padded / 2][kRows][2] bfloat16, times log2(e)
  std::uint16_t* weights;  // [kSpan / 2][kRows][2] bfloat16
  // Of every row: the largest score so far, what weights are relative to, and their sum.
  float *largest, *reference, *sum;

  static std::int64_t floats(std::int64_t d) {
    return kRows * (kSpan + kSpan / 2 + many_padded(d) + many_padded(d) / 2 + 3) + 16;
  }

  ManyWork(int d, float* scratch) : padded(static_cast<int>(many_padded(d))) {
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    scores = scratch + (64 - address % 64) % 64 / 4;
    acc = scores + kSpan * kRows;
    query = reinterpret_cast<std::uint16_t*>(acc + padded * kRows);
    weights = query + padded * kRows;
    largest = reinterpret_cast<float*>(weights + kSpan * kRows);
    reference = largest + kRows;
    sum = reference + kRows;
  }
};

// Rows [begin, begin + count) of the queries, turned; nothing seen so far.
template <int kRows>
void many_begin(const AttendRows& args, int begin, int count, const ManyWork<kRows>& work) {
  const __m512 log2e = _mm512_set1_ps(kLog2E);
  for (int r = 0; r < kRows; r += 16) {
    for (int i = 0; i < work.padded; i += 32) {
      __m512i rows[16];
      unroll<16>([&](auto l) LOWBIT_LAMBDA {
        rows[l] = _mm512_setzero_si512();
        if (r + l < count) {
          const float* q = args.q + std::int64_t{begin + r + l} * args.d;
          const __m512 low = _mm512_mul_ps(load16(q, DType::kFloat32, i, args.d - i), log2e);
          const __m512 high =
              _mm512_mul_ps(load16(q, DType::kFloat32, i + 16, args.d - i - 16), log2e);
          rows[l] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        }
      });
      transpose16(rows);
      unroll<16>([&](auto pair) LOWBIT_LAMBDA {
        _mm512_store_si512(work.query + ((i / 2 + pair) * kRows + r) * 2, rows[pair]);
      });
    }
  }
  std::memset(work.acc, 0, sizeof(float) * static_cast<std::size_t>(work.padded * kRows));
  for (int r = 0; r < kRows; r += 16) {
    _mm512_store_ps(work.largest + r, _mm512_set1_ps(-__builtin_inff()));
    _mm512_store_ps(work.reference + r, _mm512_set1_ps(-__builtin_inff()));
    _mm512_store_ps(work.sum + r, _mm512_setzero_ps());
  }
}

// Scores of a span from `first` on as they should be: softcap, mask, positions not seen.
template <int kRows>
void many_adjust(const AttendRows& args, int begin, int count, std::int64_t first,
                 const ManyWork<kRows>& work) {
  const __m512 cap = _mm512_set1_ps(args.softcap * kLog2E);
  const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
  for (int r = 0; r < kRows; r += 16) {
    // What each row sees of the span.
    std::int32_t seen[16];
    for (int l = 0; l < 16; ++l) {
      std::int64_t limit = args.end;
      if (args.limits != nullptr && r + l < count && args.limits[begin + r + l] < limit) {
        limit = args.limits[begin + r + l];
      }
      limit -= first;
      seen[l] = limit < 0 ? 0 : limit > kSpan ? kSpan : static_cast<std::int32_t>(limit);
    }
    const __m512i ends = _mm512_loadu_si512(seen);
    for (int p = 0; p < kSpan; p += 16) {
      __m512i masks[16];
      if (args.masks != nullptr) {
        const std::int64_t at = first + p;
        unroll<16>([&](auto l) LOWBIT_LAMBDA {
          masks[l] = _mm512_setzero_si512();
          if (r + l < count) {
            masks[l] = _mm512_castps_si512(
                mask16_of(args.mask_kind, args.masks[begin + r + l], at, args.end - at));
          }
        });
        transpose16(masks);
      }
      unroll<16>([&](auto l) LOWBIT_LAMBDA {
        float* at = work.scores + (p + l) * kRows + r;
        __m512 s = _mm512_load_ps(at);
        if (args.softcap > 0) s = _mm512_mul_ps(tanh_of(_mm512_div_ps(s, cap)), cap);
        if (args.masks != nullptr) {
          s = _mm512_add_ps(s, _mm512_castsi512_ps(masks[l]));
          // As weight_of knows it.
          const __mmask16 bad = _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
          s = _mm512_mask_mov_ps(s, bad, _mm512_set1_ps(__builtin_nanf("")));
        }
        const __mmask16 visible = _mm512_cmpgt_epi32_mask(ends, _mm512_set1_epi32(p + l));
        _mm512_store_ps(at, _mm512_mask_mov_ps(hidden, visible, s));
      });
    }
  }
}

// 2^x for x <= kSlack, relative error below 2^-18; for x <= -126 subnormal, which is zero in
// bfloat16. A NaN whose low bits are zero, as products make it, stays one.
LOWBIT_INLINE __m512 weight_of(__m512 x) {
  const __m512 round = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 n = _mm512_add_ps(x, round);
  const __m512 p = exp2_fraction<4>(_mm512_sub_ps(x, _mm512_sub_ps(n, round)));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

// Weights may grow to 2^kSlack before everything is made relative to a new maximum.
constexpr float kSlack = 8;

// The scores of 16 rows from row r on become weights.
template <int kRows>
void many_softmax(int r, const ManyWork<kRows>& work) {
  const float* scores = work.scores + r;
  __m512 best[2] = {_mm512_load_ps(work.largest + r), _mm512_load_ps(scores)};
#pragma GCC unroll 8
  for (int p = 0; p < kSpan; p += 2) {
    best[0] = _mm512_max_ps(_mm512_load_ps(scores + p * kRows), best[0]);
    best[1] = _mm512_max_ps(_mm512_load_ps(scores + (p + 1) * kRows), best[1]);
  }
  const __m512 largest = _mm512_max_ps(best[1], best[0]);
  _mm512_store_ps(work.largest + r, largest);
  __m512 reference = _mm512_load_ps(work.reference + r);
  __m512 sum = _mm512_load_ps(work.sum + r);
  const __mmask16 grown =
      _mm512_cmp_ps_mask(largest, _mm512_add_ps(reference, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
  if (grown != 0) {
    const __m512 factor = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), grown,
                                             exp2_of<4>(_mm512_sub_ps(reference, largest)));
    reference = _mm512_mask_mov_ps(reference, grown, largest);
    _mm512_store_ps(work.reference + r, reference);
    sum = _mm512_mul_ps(sum, factor);
    for (int i = 0; i < work.padded; ++i) {
      float* at = work.acc + i * kRows + r;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
    }
  }
  // Nothing seen so far: -inf - 0, not -inf - -inf.
  const __mmask16 any =
      _mm512_cmp_ps_mask(reference, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
  const __m512 most = _mm512_maskz_mov_ps(any, reference);
  const __m512i in_pairs =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int p = 0; p < kSpan; p += 8) {
    unroll<4>([&](auto i) LOWBIT_LAMBDA {
      const float* at = scores + (p + 2 * i) * kRows;
      const __m512 even = weight_of(_mm512_sub_ps(_mm512_load_ps(at), most));
      const __m512 odd = weight_of(_mm512_sub_ps(_mm512_load_ps(at + kRows), most));
      total[0] = _mm512_add_ps(total[0], even);
      total[1] = _mm512_add_ps(total[1], odd);
      _mm512_store_si512(
          work.weights + ((p / 2 + i) * kRows + r) * 2,
          _mm512_permutexvar_epi16(in_pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    });
  }
  _mm512_store_ps(work.sum + r, _mm512_add_ps(sum, _mm512_add_ps(total[0], total[1])));
}

// Results of `count` rows, relative to the largest score of each.
template <int kRows>
void many_end(const AttendRows& args, int begin, int count, const ManyWork<kRows>& work) {
  for (int r = 0; r < count; r += 16) {
    const __mmask16 held = mask16(count - r);
    const __m512 largest = _mm512_load_ps(work.largest + r);
    const __m512 sum = _mm512_load_ps(work.sum + r);
    // Nothing seen: zero. What is not a number is no maximum, but in the sum.
    const __mmask16 any =
        _kor_mask16(_mm512_cmp_ps_mask(largest, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ),
                    _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q));
    const __m512 factor = exp2_of<5>(_mm512_sub_ps(_mm512_load_ps(work.reference + r), largest));
    _mm512_mask_storeu_ps(args.max + begin + r, held,
                          _mm512_div_ps(largest, _mm512_set1_ps(kLog2E)));
    _mm512_mask_storeu_ps(args.sum + begin + r, held, _mm512_maskz_mul_ps(any, sum, factor));
    for (int i = 0; i < args.d; i += 16) {
      __m512i rows[16];
      unroll<16>([&](auto c) LOWBIT_LAMBDA {
        const __m512 sums = _mm512_load_ps(work.acc + (i + c) * kRows + r);
        rows[c] = _mm512_castps_si512(_mm512_maskz_mul_ps(any, sums, factor));
      });
      transpose16(rows);
      unroll<16>([&](auto l) LOWBIT_LAMBDA {
        if (r + l < count) {
          _mm512_mask_storeu_ps(args.acc + std::int64_t{begin + r + l} * args.d + i,
                                mask16(args.d - i), _mm512_castsi512_ps(rows[l]));
        }
      });
    }
  }
}

template <class Products>
void many_attend(const AttendRows& args) {
  constexpr int kRows = Products::kRows;
  const ManyWork<kRows> work(args.d, args.scratch);
  const int padded = work.padded;
  const std::int64_t block_elements = many_block_elements(args.d);
  const auto* keys = static_cast<const std::uint16_t*>(args.keys);
  const auto* values = static_cast<const std::uint16_t*>(args.values);
  [[maybe_unused]] const typename Products::Session session;
  for (int begin = 0; begin < args.rows; begin += kRows) {
    const int count = args.rows - begin < kRows ? args.rows - begin : kRows;
    many_begin(args, begin, count, work);
    // Every row sees the positions below `sure`.
    std::int64_t sure = args.end, end = args.limits == nullptr ? args.end : 0;
    for (int r = begin; r < begin + count && args.limits != nullptr; ++r) {
      sure = args.limits[r] < sure ? args.limits[r] : sure;
      end = args.limits[r] > end ? args.limits[r] : end;
    }
    end = end < args.end ? end : args.end;
    for (std::int64_t first = 0; first < end; first += kSpan) {
      const std::int64_t at = first / kCacheBlock * block_elements;
      Products::template multiply<false>(keys + at, kSpan, padded / kPanel, work.query,
                                         work.scores);
      if (args.masks != nullptr || args.softcap > 0 || sure < first + kSpan) {
        many_adjust(args, begin, count, first, work);
      }
      for (int r = 0; r < count; r += 16) many_softmax(r, work);
      Products::template multiply<true>(values + at, padded, kSpan / kPanel, work.weights,
                                        work.acc);
    }
    many_end(args, begin, count, work);
  }
}

template <class Products>
constexpr ManyRows many_rows(const char* name) {
  return {name,
          Products::kTaskRows,
          many_packed_bytes,
          many_pack,
          [](int d) { return ManyWork<Products::kRows>::floats(d); },
          many_attend<Products>};
}

}  // namespace
}  // namespace lowbit::cpu
