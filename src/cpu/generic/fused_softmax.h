// The softmax of attention on AVX-512, to base 2: scores come multiplied by log2(e).
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/fused_kernels.h"
#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;

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

// 2^f for |f| <= 1/2, minimax: relative error below 2^-18 by a polynomial of degree 4, below 2^-22
// of degree 5.
template <int kDegree>
LOWBIT_INLINE __m512 exp2_fraction(__m512 f) {
  constexpr float kFour[] = {9.999992614e-1f, 6.931218146e-1f, 2.402474484e-1f, 5.591786178e-2f,
                             9.570101877e-3f};
  constexpr float kFive[] = {1.000000072e+0f, 6.931469671e-1f, 2.402211972e-1f,
                             5.550713275e-2f, 9.675541503e-3f, 1.327647196e-3f};
  static_assert(kDegree == 4 || kDegree == 5);
  __m512 p = _mm512_set1_ps(kDegree == 4 ? kFour[4] : kFive[5]);
  unroll<kDegree>([&](auto i) LOWBIT_LAMBDA {
    constexpr int kPower = kDegree - 1 - i;
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kDegree == 4 ? kFour[kPower] : kFive[kPower]));
  });
  return p;
}

// 2^x, 0 below -126, where the result would be subnormal.
template <int kDegree>
LOWBIT_INLINE __m512 exp2_of(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(x, 0);
  return _mm512_maskz_scalef_ps(normal, exp2_fraction<kDegree>(_mm512_sub_ps(x, n)), n);
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
  const __m512 large = one - two / (exp2_of<5>(power) + one);
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
template <int kCount>
void adjust_scores(const AttendRows& args, int r, std::int64_t first, std::int64_t limit,
                   float* scores) {
  const __m512 cap = _mm512_set1_ps(args.softcap * kLog2E);
  for (int p = 0; p < kCount; p += 16) {
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

// The maximum of row r before and after a span of scores, and what to subtract from them.
struct RowMaximum {
  float before, after;
  __m512 most;
};

// Takes the first `end` scores of a span of kCount that begins at position `first`, made what they
// should be.
template <int kCount>
LOWBIT_INLINE RowMaximum take_maximum(const AttendRows& args, int r, std::int64_t first, int end,
                                      float* scores) {
  std::int64_t limit = args.end;
  if (args.limits != nullptr && args.limits[r] < limit) limit = args.limits[r];
  if (args.masks != nullptr || args.softcap > 0 || limit < first + end) {
    adjust_scores<kCount>(args, r, first, limit, scores);
  }
  __m512 best = _mm512_load_ps(scores);
  for (int p = 16; p < end; p += 16) best = _mm512_max_ps(best, _mm512_load_ps(scores + p));
  const float before = args.max[r], here = _mm512_reduce_max_ps(best);
  const float after = here > before ? here : before;
  // Nothing seen so far: -inf - 0, not -inf - -inf.
  return {before, after, _mm512_set1_ps(after == -INFINITY ? 0.0f : after)};
}

}  // namespace
}  // namespace lowbit::cpu
