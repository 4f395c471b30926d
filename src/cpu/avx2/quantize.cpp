// Quantizers and dequantizers in AVX2: the 16-lane operations of generic/quantize_simd.h in pairs
// of registers.
#include "cpu/quantize_kernels.h"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lowbit::cpu {
namespace {

struct V {
  static constexpr const char* kName = "avx2";
  struct F {
    __m256 a, b;  // lanes 0-7, 8-15
  };
  struct I {
    __m256i a, b;
  };
  using B = I;

  static __m256i load256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static const void* after(const void* p, int bytes) { return static_cast<const char*>(p) + bytes; }

  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F load_half(const void* p) {
    return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(after(p, 16)))};
  }
  static F load_brain(const void* p) { return from_bits(shift_left<16>(load_codes16(p))); }
  static constexpr bool kByteTables = false;
  static constexpr int kLinesTogether = 2;
  static constexpr Order kBrainOrder = Order::kInputs;
  static void load_two_brain(const void* p, F& first, F& second) {
    first = load_brain(p);
    second = load_brain(after(p, 32));
  }
  static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  // GCC takes a function that only prefetches for one without effects, and its calls away.
  [[gnu::always_inline]] static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

  static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static I set_int(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static F abs(F v) { return from_bits(and_(bits(v), set_int(0x7fffffff))); }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  // Of magnitudes, NaN and infinity included: their bits are ordered as integers.
  static F max_bits(F x, F y) {
    const I u = bits(x), v = bits(y);
    return from_bits({_mm256_max_epu32(u.a, v.a), _mm256_max_epu32(u.b, v.b)});
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F multiply_add(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F negated_multiply_add(F x, F y, F z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
  }

  static I bits(F v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
  static F from_bits(I v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
  static I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I sub_int(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static I min_int(I x, I y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
  static I max_int(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static I max_unsigned(I x, I y) {
    return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)};
  }
  static I rotate_left1(I v) { return or_(add(v, v), shift_right<31>(v)); }
  static I rotate_right1(I v) { return or_(shift_left<31>(v), shift_right<1>(v)); }
  static I max_words(I x, I y) { return {_mm256_max_epu16(x.a, y.a), _mm256_max_epu16(x.b, y.b)}; }
  static I max_signed_words(I x, I y) {
    return {_mm256_max_epi16(x.a, y.a), _mm256_max_epi16(x.b, y.b)};
  }
  static I min_signed_words(I x, I y) {
    return {_mm256_min_epi16(x.a, y.a), _mm256_min_epi16(x.b, y.b)};
  }
  static I rotate_words_left1(I v) {
    const auto turn = [](__m256i x) {
      return _mm256_or_si256(_mm256_add_epi16(x, x), _mm256_srli_epi16(x, 15));
    };
    return {turn(v.a), turn(v.b)};
  }
  static I rotate_words_right1(I v) {
    const auto turn = [](__m256i x) {
      return _mm256_or_si256(_mm256_slli_epi16(x, 15), _mm256_srli_epi16(x, 1));
    };
    return {turn(v.a), turn(v.b)};
  }
  static I flip_negative_words(I v) {
    const auto flip = [](__m256i x) {
      return _mm256_xor_si256(
          x, _mm256_and_si256(_mm256_srai_epi16(x, 15), _mm256_set1_epi16(0x7fff)));
    };
    return {flip(v.a), flip(v.b)};
  }
  // The lowest seven bits of `low` under the sign of `t`.
  static I with_sign(I low, F t) {
    return or_(and_(low, set_int(0x7f)), and_(shift_right<24>(bits(t)), set_int(0x80)));
  }
  static I and_(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I or_(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int kBits>
  static I shift_right(I v) {
    return {_mm256_srli_epi32(v.a, kBits), _mm256_srli_epi32(v.b, kBits)};
  }
  template <int kBits>
  static I shift_left(I v) {
    return {_mm256_slli_epi32(v.a, kBits), _mm256_slli_epi32(v.b, kBits)};
  }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static I floor_to_int(F v) { return round_to_int({_mm256_floor_ps(v.a), _mm256_floor_ps(v.b)}); }
  static I ceil_to_int(F v) { return round_to_int({_mm256_ceil_ps(v.a), _mm256_ceil_ps(v.b)}); }
  static I round_to_int(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }

  static F blend(F no, F yes, F mask) {
    return {_mm256_blendv_ps(no.a, yes.a, mask.a), _mm256_blendv_ps(no.b, yes.b, mask.b)};
  }
  template <int kOp>
  static F compare(F x, F y) {
    return {_mm256_cmp_ps(x.a, y.a, kOp), _mm256_cmp_ps(x.b, y.b, kOp)};
  }
  static I equal(I x, I y) { return {_mm256_cmpeq_epi32(x.a, y.a), _mm256_cmpeq_epi32(x.b, y.b)}; }
  static F infinite_if_zero(F v) {
    return blend(v, set(__builtin_inff()), compare<_CMP_EQ_OQ>(v, set(0.0f)));
  }
  static I zero_if_zero(I test, I v) {
    const I zero = equal(test, set_int(0));
    return {_mm256_andnot_si256(zero.a, v.a), _mm256_andnot_si256(zero.b, v.b)};
  }
  static F nan_if_equal(I x, I y, F v) {
    return blend(v, set(__builtin_nanf("")), from_bits(equal(x, y)));
  }

  struct Halves {
    __m128i a, b;
  };
  static Halves to_half(F v) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_cvtps_ph(v.a, kNearest), _mm256_cvtps_ph(v.b, kNearest)};
  }
  static __m128i without_minus_zero(__m128i half) {
    const __m128i zero =
        _mm_cmpeq_epi16(_mm_and_si128(half, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
    return _mm_andnot_si128(zero, half);
  }
  // Stores the halves, minus zero as zero, and returns them widened.
  static F round_to_half(F v, std::uint16_t* halves) {
    const Halves half = to_half(v);
    const __m128i a = without_minus_zero(half.a), b = without_minus_zero(half.b);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), a);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + 8), b);
    return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)};
  }
  static __m128i narrow16(__m256i v) {  // values up to 65535
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
  static F half_to_float(I halves) {
    return {_mm256_cvtph_ps(narrow16(halves.a)), _mm256_cvtph_ps(narrow16(halves.b))};
  }
  static I half_bits(F v) {
    const Halves half = to_half(v);
    return {_mm256_cvtepu16_epi32(half.a), _mm256_cvtepu16_epi32(half.b)};
  }
  static I brain_bits(F v) {
    const I u = bits(v);
    const I odd = and_(shift_right<16>(u), set_int(1));
    return shift_right<16>(add(u, add(odd, set_int(0x7fff))));
  }
  static I brain_bits_or_nan(F v) {
    return bits(
        blend(from_bits(brain_bits(v)), from_bits(set_int(0x7fff)), compare<_CMP_UNORD_Q>(v, v)));
  }

  // 64 codes at once: packing leaves four codes of each vector in every 128-bit lane.
  template <Order kOrder>
  static __m256i in_order(__m256i v) {
    if constexpr (kOrder == Order::kLanes) {
      return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    }
    return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  // Calls two(w, x, y, z) for the registers whose codes become one.
  template <Order kOrder, class Two>
  static B narrow_by(I a, I b, I c, I d, Two&& two) {
    if constexpr (kOrder == Order::kLanes) {
      return {in_order<kOrder>(two(a.a, b.a, c.a, d.a)), in_order<kOrder>(two(a.b, b.b, c.b, d.b))};
    }
    return {in_order<kOrder>(two(a.a, a.b, b.a, b.b)), in_order<kOrder>(two(c.a, c.b, d.a, d.b))};
  }
  template <Order kOrder>
  static B narrow(I a, I b, I c, I d) {
    return narrow_by<kOrder>(a, b, c, d, [](__m256i w, __m256i x, __m256i y, __m256i z) {
      return _mm256_packus_epi16(_mm256_packus_epi32(w, x), _mm256_packus_epi32(y, z));
    });
  }
  template <Order kOrder>
  static B narrow_signed(I a, I b, I c, I d) {
    return narrow_by<kOrder>(a, b, c, d, [](__m256i w, __m256i x, __m256i y, __m256i z) {
      return _mm256_packs_epi16(_mm256_packs_epi32(w, x), _mm256_packs_epi32(y, z));
    });
  }
  static B set_bytes(int value) {
    const __m256i all = _mm256_set1_epi8(static_cast<char>(value));
    return {all, all};
  }
  static B min_signed(B x, B y) { return {_mm256_min_epi8(x.a, y.a), _mm256_min_epi8(x.b, y.b)}; }
  static B max_signed(B x, B y) { return {_mm256_max_epi8(x.a, y.a), _mm256_max_epi8(x.b, y.b)}; }
  static B add_bytes(B x, B y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
  static B e2m1_codes(B steps) {
    const auto codes = [](__m256i v) {
      const __m256i magnitude = _mm256_abs_epi8(v);
      __m256i code = _mm256_setzero_si256();
      for (const char least : {3, 6, 11, 14, 21, 28, 41}) {  // constants after unrolling
        code = _mm256_sub_epi8(
            code, _mm256_cmpgt_epi8(magnitude, _mm256_set1_epi8(static_cast<char>(least - 1))));
      }
      const __m256i negative = _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), v),
                                                _mm256_cmpgt_epi8(code, _mm256_setzero_si256()));
      return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi8(8)));
    };
    const B inside = max_signed(steps, set_bytes(-127));  // whose magnitude is a byte
    return {codes(inside.a), codes(inside.b)};
  }
  static B zero_where(B v, int value) {
    const __m256i out = _mm256_set1_epi8(static_cast<char>(value));
    return {_mm256_andnot_si256(_mm256_cmpeq_epi8(v.a, out), v.a),
            _mm256_andnot_si256(_mm256_cmpeq_epi8(v.b, out), v.b)};
  }
  static void store_codes16(void* p, I codes) {
    auto* out = static_cast<__m128i*>(p);
    _mm_storeu_si128(out, narrow16(codes.a));
    _mm_storeu_si128(out + 1, narrow16(codes.b));
  }
  static I load_codes8(const void* p) {
    const __m128i codes = load128(p);
    return {_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))};
  }
  static I load_codes16(const void* p) {
    return {_mm256_cvtepu16_epi32(load128(p)), _mm256_cvtepu16_epi32(load128(after(p, 16)))};
  }

  static __m256 look_up8(F table, __m256i code) {
    const __m256 low = _mm256_permutevar8x32_ps(table.a, code);
    const __m256 high = _mm256_permutevar8x32_ps(table.b, code);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
  static F look_up(const float*, F table, I code) {
    return {look_up8(table, code.a), look_up8(table, code.b)};
  }

  // A binary search whose steps look thresholds up in one register: after step s the index has s
  // bits, and the next threshold is the one in the middle of what is left.
  static __m256i nearest8(const Codec& codec, __m256 t) {
    __m256i index = _mm256_setzero_si256();
    for (int step = codec.levels - 1; step >= 0; --step) {
      const __m256 table = _mm256_load_ps(codec.search[step]);
      const __m256 threshold = _mm256_permutevar8x32_ps(table, index);
      const __m256 above = _mm256_cmp_ps(t, threshold, _CMP_GE_OQ);
      index = _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(above));
    }
    return index;
  }
  static I nearest(const Codec& codec, F t) { return {nearest8(codec, t.a), nearest8(codec, t.b)}; }
  static B table_codes(const Codec&, B places) { return places; }  // codes already

  template <typename Op>
  static __m256 reduce8(const F* v, Op op) {
    __m256 rows[8], pairs[4], quads[2];
    for (int i = 0; i < 8; ++i) rows[i] = op(v[i].a, v[i].b);
    for (int i = 0; i < 4; ++i) {
      pairs[i] = op(_mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                    _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
      const __m256d a = _mm256_castps_pd(pairs[2 * i]);
      const __m256d b = _mm256_castps_pd(pairs[2 * i + 1]);
      quads[i] = op(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return op(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
              _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }
  // Lane r of the result is op over the lanes of v[r].
  template <typename Op>
  static F reduce(const F (&v)[16], Op op) {
    const auto half = [op](__m256 x, __m256 y) { return op(F{x, x}, F{y, y}).a; };
    return {reduce8(v, half), reduce8(v + 8, half)};
  }

  static B load_bytes(const unsigned char* p) { return {load256(p), load256(p + 32)}; }
  static void store_bytes(unsigned char* p, B v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
  }
  // To an address that is a multiple of 64, not by way of the caches.
  static void stream_bytes(unsigned char* p, B v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, v.b);
  }
  static void finish_streams() { _mm_sfence(); }
  static B interleave_low16(B x, B y) {
    return {_mm256_unpacklo_epi16(x.a, y.a), _mm256_unpacklo_epi16(x.b, y.b)};
  }
  static B interleave_high16(B x, B y) {
    return {_mm256_unpackhi_epi16(x.a, y.a), _mm256_unpackhi_epi16(x.b, y.b)};
  }
  static B zero_bytes() { return set_int(0); }
  static B as_bytes(F v) { return bits(v); }
  static B or_bytes(B x, B y) { return or_(x, y); }
  static B and_bytes(B x, char mask) {
    const __m256i m = _mm256_set1_epi8(mask);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }
  // Bits that cross into the neighbouring byte are masked by the caller.
  template <int kBits>
  static B shift_bytes_left(B v) {
    return {_mm256_slli_epi16(v.a, kBits), _mm256_slli_epi16(v.b, kBits)};
  }
  template <int kBits>
  static B shift_bytes_right(B v) {
    return {_mm256_srli_epi16(v.a, kBits), _mm256_srli_epi16(v.b, kBits)};
  }
  template <int kBit>
  static std::uint64_t bit_of_bytes(B v) {
    const B top = shift_bytes_left<7 - kBit>(v);
    const auto low = static_cast<std::uint32_t>(_mm256_movemask_epi8(top.a));
    const auto high = static_cast<std::uint32_t>(_mm256_movemask_epi8(top.b));
    return low | static_cast<std::uint64_t>(high) << 32;
  }
  static __m256i bytes_of_bits32(std::uint32_t bits, char value) {
    // Byte i gets byte i / 8 of the word, then keeps bit i % 8 of it.
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(static_cast<int>(bits)),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_and_si256(is_set, _mm256_set1_epi8(value));
  }
  static B bytes_of_bits(std::uint64_t bits, char value) {
    return {bytes_of_bits32(static_cast<std::uint32_t>(bits), value),
            bytes_of_bits32(static_cast<std::uint32_t>(bits >> 32), value)};
  }

  // 8 x 8 words.
  static void transpose8(__m256i (&v)[8]) {
    __m256i t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      v[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      v[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      v[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      v[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2x128_si256(v[j], v[4 + j], 0x20);
      t[4 + j] = _mm256_permute2x128_si256(v[j], v[4 + j], 0x31);
    }
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }
  // 16 x 16 words: the four quarters each, the off-diagonal ones swapped.
  static void transpose(B (&v)[16]) {
    __m256i q[4][8];
    for (int i = 0; i < 8; ++i) {
      q[0][i] = v[i].a;
      q[1][i] = v[i].b;
      q[2][i] = v[8 + i].a;
      q[3][i] = v[8 + i].b;
    }
    for (auto& quarter : q) transpose8(quarter);
    for (int i = 0; i < 8; ++i) {
      v[i] = {q[0][i], q[2][i]};
      v[8 + i] = {q[1][i], q[3][i]};
    }
  }

  static bool finite32(const unsigned char* p, int bytes) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < bytes; i += 32) {
      most =
          _mm256_max_epu32(most, _mm256_and_si256(load256(p + i), _mm256_set1_epi32(0x7fffffff)));
    }
    const __m256i bad = _mm256_cmpgt_epi32(most, _mm256_set1_epi32(0x7f7fffff));
    return _mm256_testz_si256(bad, bad) != 0;
  }
  static bool finite16(const unsigned char* p, int bytes, int top) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < bytes; i += 32) {
      most = _mm256_max_epu16(most, _mm256_and_si256(load256(p + i), _mm256_set1_epi16(0x7fff)));
    }
    const __m256i bad = _mm256_cmpgt_epi16(most, _mm256_set1_epi16(static_cast<short>(top - 1)));
    return _mm256_testz_si256(bad, bad) != 0;
  }
};

}  // namespace
}  // namespace lowbit::cpu

#include "cpu/generic/quantize_simd.h"

namespace lowbit::cpu {

const QuantizeKernels& quantize_kernels_avx2() {
  return kKernels;
}

}  // namespace lowbit::cpu
