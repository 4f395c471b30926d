// Quantizers and dequantizers in AVX-512: the 16-lane operations of generic/quantize_simd.h.
#include "cpu/quantize_kernels.h"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lowbit::cpu {
namespace {

struct V {
  static constexpr const char* kName = "avx512";
  using F = __m512;
  using I = __m512i;
  using B = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_half(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static F load_brain(const void* p) {
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static constexpr bool kByteTables = true;
  static constexpr int kLinesTogether = 4;
  static constexpr Order kBrainOrder = Order::kEvenOdd;
  static void load_two_brain(const void* p, F& even, F& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, set_int(static_cast<int>(0xffff0000u))));
  }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  // GCC takes a function that only prefetches for one without effects, and its calls away.
  [[gnu::always_inline]] static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

  static F set(float v) { return _mm512_set1_ps(v); }
  static I set_int(int v) { return _mm512_set1_epi32(v); }
  static F abs(F v) { return _mm512_abs_ps(v); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // Of magnitudes, NaN and infinity included: their bits are ordered as integers.
  static F max_bits(F a, F b) { return from_bits(_mm512_max_epu32(bits(a), bits(b))); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F negated_multiply_add(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  static I bits(F v) { return _mm512_castps_si512(v); }
  static F from_bits(I v) { return _mm512_castsi512_ps(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I min_int(I a, I b) { return _mm512_min_epi32(a, b); }
  static I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
  static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  static I rotate_left1(I v) { return _mm512_rol_epi32(v, 1); }
  static I rotate_right1(I v) { return _mm512_ror_epi32(v, 1); }
  static I max_words(I a, I b) { return _mm512_max_epu16(a, b); }
  static I max_signed_words(I a, I b) { return _mm512_max_epi16(a, b); }
  static I min_signed_words(I a, I b) { return _mm512_min_epi16(a, b); }
  static I rotate_words_left1(I v) { return or_(_mm512_add_epi16(v, v), _mm512_srli_epi16(v, 15)); }
  static I rotate_words_right1(I v) {
    return or_(_mm512_slli_epi16(v, 15), _mm512_srli_epi16(v, 1));
  }
  static I flip_negative_words(I v) {
    return _mm512_ternarylogic_epi32(v, _mm512_srai_epi16(v, 15), set_int(0x7fff7fff), 0x78);
  }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  // The lowest seven bits of `low` under the sign of `t`.
  static I with_sign(I low, F t) {
    return _mm512_ternarylogic_epi32(set_int(0x7f), low, _mm512_srli_epi32(bits(t), 24), 0xca);
  }
  template <int kBits>
  static I shift_right(I v) {
    return _mm512_srli_epi32(v, kBits);
  }
  template <int kBits>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, kBits);
  }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I round_to_int(F v) { return _mm512_cvtps_epi32(v); }  // nearest, ties to even

  static I floor_to_int(F v) {
    return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static I ceil_to_int(F v) {
    return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }

  static F infinite_if_zero(F v) {
    const __mmask16 zero = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(v, zero, set(__builtin_inff()));
  }
  static I zero_if_zero(I test, I v) {
    return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(test, test), v);
  }
  static F nan_if_equal(I a, I b, F v) {
    return _mm512_mask_mov_ps(v, _mm512_cmpeq_epi32_mask(a, b), set(__builtin_nanf("")));
  }

  static __m256i to_half(F v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Stores the halves, minus zero as zero, and returns them widened.
  static F round_to_half(F v, std::uint16_t* halves) {
    const __m256i half = to_half(v);
    const __mmask16 value = _mm256_test_epi16_mask(half, _mm256_set1_epi16(0x7fff));
    const __m256i clean = _mm256_maskz_mov_epi16(value, half);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), clean);
    return _mm512_cvtph_ps(clean);
  }
  static F half_to_float(I halves) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves)); }
  static I half_bits(F v) { return _mm512_cvtepu16_epi32(to_half(v)); }
  static I brain_bits(F v) {
    const I u = bits(v);
    const I odd = and_(shift_right<16>(u), set_int(1));
    return shift_right<16>(add(u, add(odd, set_int(0x7fff))));
  }
  static I brain_bits_or_nan(F v) {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(brain_bits(v), nan, set_int(0x7fff));
  }

  // Narrowing straight to memory is microcoded on Zen 4 and took half of all time; the empty
  // statement keeps the compiler from merging narrowing and store.
  static void store_codes16(void* p, I codes) {
    __m256i words = _mm512_cvtepi32_epi16(codes);
    __asm__("" : "+v"(words));
    _mm256_storeu_si256(static_cast<__m256i*>(p), words);
  }
  // 64 codes at once: after two packings every 128-bit lane holds four codes of each vector.
  template <Order kOrder>
  static B in_order(B v) {
    if constexpr (kOrder == Order::kEvenOdd) {
      const __m512i order = _mm512_set_epi64(
          0x3f3b3e3a3d393c38, 0x2f2b2e2a2d292c28, 0x1f1b1e1a1d191c18, 0x0f0b0e0a0d090c08,
          0x3733363235313430, 0x2723262225212420, 0x1713161215111410, 0x0703060205010400);
      return _mm512_permutexvar_epi8(order, v);
    }
    if constexpr (kOrder == Order::kLanes) {
      return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(
                                        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, v);
  }
  template <Order kOrder>
  static B narrow(I a, I b, I c, I d) {
    return in_order<kOrder>(
        _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d)));
  }
  template <Order kOrder>
  static B narrow_signed(I a, I b, I c, I d) {
    return in_order<kOrder>(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
  }
  static B set_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static B min_signed(B a, B b) { return _mm512_min_epi8(a, b); }
  static B max_signed(B a, B b) { return _mm512_max_epi8(a, b); }
  static B add_bytes(B a, B b) { return _mm512_add_epi8(a, b); }
  // Entry i of the first table belongs to i, of the second to i - 64.
  static B e2m1_codes(B steps) {
    alignas(64) static constexpr auto kCodes = [] {
      struct {
        std::uint8_t codes[128];
      } table{};
      for (int i = 0; i < 128; ++i) {
        const int at = i < 64 ? i : 128 - i;
        const int code =
            (at >= 3) + (at >= 6) + (at >= 11) + (at >= 14) + (at >= 21) + (at >= 28) + (at >= 41);
        table.codes[i] = static_cast<std::uint8_t>(i < 64 || code == 0 ? code : code + 8);
      }
      return table;
    }();
    const B inside = min_signed(max_signed(steps, set_bytes(-63)), set_bytes(63));
    return _mm512_permutex2var_epi8(_mm512_load_si512(kCodes.codes), inside,
                                    _mm512_load_si512(kCodes.codes + 64));
  }
  static B zero_where(B v, int value) {
    return _mm512_maskz_mov_epi8(
        _mm512_cmpneq_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(value))), v);
  }
  static I load_codes8(const void* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static I load_codes16(const void* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }

  static F look_up(const float*, F table, I code) { return _mm512_permutexvar_ps(code, table); }

  // The bin of 32 by truncation, plus 32 above the bin's only threshold. A scale that was rounded
  // as a subnormal half can leave quotients outside the codebook; no threshold is as far as 1 -
  // 2^-10, and from there on the position could round to a bin that does not exist.
  static I nearest(const Codec& codec, F t) {
    constexpr int kSmallerMagnitude = 2;  // sign of the first operand
    t = _mm512_range_ps(t, set(0x1.ff8p-1f), kSmallerMagnitude);
    const I bin = _mm512_cvttps_epi32(multiply_add(t, set(codec.bin_mul), set(codec.bin_add)));
    const F threshold = _mm512_permutex2var_ps(_mm512_load_ps(codec.bin_threshold), bin,
                                               _mm512_load_ps(codec.bin_threshold + 16));
    const __mmask16 above = _mm512_cmp_ps_mask(t, threshold, _CMP_GE_OQ);
    return _mm512_mask_add_epi32(bin, above, bin, set_int(32));
  }
  static B table_codes(const Codec& codec, B places) {
    return _mm512_permutexvar_epi8(places, _mm512_load_si512(codec.place_code));
  }

  // Lane r of the result is op over the lanes of v[r].
  template <typename Op>
  static F reduce(const F (&v)[16], Op op) {
    F pairs[8], quads[4];
    for (int i = 0; i < 8; ++i) {
      pairs[i] = op(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                    _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]);
      const __m512d b = _mm512_castps_pd(pairs[2 * i + 1]);
      quads[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const F low = op(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                     _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    const F high = op(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                      _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return op(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }

  static B load_bytes(const unsigned char* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(unsigned char* p, B v) { _mm512_storeu_si512(p, v); }
  // To an address that is a multiple of 64, not by way of the caches.
  static void stream_bytes(unsigned char* p, B v) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v);
  }
  static void finish_streams() { _mm_sfence(); }
  static B interleave_low16(B a, B b) { return _mm512_unpacklo_epi16(a, b); }
  static B interleave_high16(B a, B b) { return _mm512_unpackhi_epi16(a, b); }
  static B zero_bytes() { return _mm512_setzero_si512(); }
  static B as_bytes(F v) { return _mm512_castps_si512(v); }
  static B or_bytes(B a, B b) { return _mm512_or_si512(a, b); }
  static B and_bytes(B a, char mask) { return _mm512_and_si512(a, _mm512_set1_epi8(mask)); }
  // Bits that cross into the neighbouring byte are masked by the caller.
  template <int kBits>
  static B shift_bytes_left(B v) {
    return _mm512_slli_epi16(v, kBits);
  }
  template <int kBits>
  static B shift_bytes_right(B v) {
    return _mm512_srli_epi16(v, kBits);
  }
  template <int kBit>
  static std::uint64_t bit_of_bytes(B v) {
    return _mm512_test_epi8_mask(v, _mm512_set1_epi8(1 << kBit));
  }
  static B bytes_of_bits(std::uint64_t bits, char value) {
    return _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(value));
  }

  // 16 x 16 words.
  static void transpose(B (&v)[16]) {
    B t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    // v[4 i + j]: words j, j+4, j+8, j+12 of rows 4 i to 4 i + 3, one per 128-bit lane.
    for (int i = 0; i < 4; ++i) {
      v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      const B a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);  // words j, j+8
      const B b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);  // words j+4, j+12
      const B c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
      const B d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
      t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
      t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
      t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
      t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
  }

  static std::uint64_t different_bytes(const unsigned char* a, const unsigned char* b) {
    return _mm512_cmpneq_epi8_mask(load_bytes(a), load_bytes(b));
  }

  // Codes of a row's weights by its table (generic/quantize_fp8.h), 64 at a time; bit i of the
  // result: those from 64 i on are not all what they should be.
  template <bool kHalf, int kMantissaBits>
  static unsigned fp8_codes(const Fp8Table& table, const char* at, int inputs,
                            unsigned char* codes) {
    constexpr int kEither = 0xec;  // (a & mask) | b
    const auto words = [](int value) { return _mm512_set1_epi16(static_cast<short>(value)); };
    const B low_bytes = words(0x00ff), high_bytes = words(static_cast<short>(0xff00));
    const B entries = load_bytes(table.entries), more_entries = load_bytes(table.entries + 64);
    const B low = set_bytes(table.low), offset = set_bytes(table.offset);
    // Byte 2 i is of word i of the first 32, byte 2 i + 1 of word i of the others.
    alignas(64) static constexpr auto kOrder = [] {
      struct {
        std::uint8_t of[64];
      } order{};
      for (int i = 0; i < 64; ++i) order.of[i] = static_cast<std::uint8_t>(i % 32 * 2 + i / 32);
      return order;
    }();
    const B order = load_bytes(kOrder.of);
    unsigned left = 0;
    for (int i = 0; i < inputs; i += 64) {
      const B a = _mm512_loadu_si512(at + 2 * i);
      const B b = i + 64 <= inputs ? _mm512_loadu_si512(at + 2 * i + 64) : a;
      const B lower = _mm512_ternarylogic_epi32(a, _mm512_slli_epi16(b, 8), low_bytes, kEither);
      const B upper = _mm512_ternarylogic_epi32(b, _mm512_srli_epi16(a, 8), high_bytes, kEither);
      B code;
      __mmask64 unsure = 0;
      if constexpr (kHalf) {
        const B place = _mm512_ternarylogic_epi32(_mm512_slli_epi16(b, 5),
                                                  _mm512_srli_epi16(_mm512_slli_epi16(a, 5), 8),
                                                  high_bytes, kEither);
        const B entry = _mm512_permutex2var_epi8(entries, place, more_entries);
        const B sum = _mm512_add_epi8(entry, and_bytes(lower, 7));
        const B exponent = kMantissaBits == 3
                               ? and_bytes(_mm512_add_epi8(upper, upper), static_cast<char>(0xf8))
                               : and_bytes(upper, 0x7c);
        code = _mm512_add_epi8(_mm512_add_epi8(_mm512_subs_epu8(exponent, low), offset),
                               and_bytes(_mm512_srli_epi16(sum, 3), 31));
        unsure = _mm512_testn_epi8_mask(exponent, exponent);
      } else {
        const B exponent =
            _mm512_ternarylogic_epi32(_mm512_srli_epi16(lower, 7), _mm512_add_epi8(upper, upper),
                                      _mm512_set1_epi8(1), kEither);
        code = _mm512_add_epi8(_mm512_slli_epi16(_mm512_subs_epu8(exponent, low), kMantissaBits),
                               _mm512_permutex2var_epi8(entries, lower, more_entries));
      }
      const B least = _mm512_set1_epi8(1 << kMantissaBits);
      left |= unsigned{(_mm512_cmplt_epi8_mask(code, least) | unsure) != 0} << i / 64;
      constexpr int kSignOfFirst = 0xe4;  // mask ? a : b
      code = _mm512_ternarylogic_epi32(upper, code, set_bytes(0x80), kSignOfFirst);
      store_bytes(codes + i, _mm512_permutexvar_epi8(order, code));
    }
    return left;
  }

  static bool finite32(const unsigned char* p, int bytes) {
    I most = _mm512_setzero_si512();
    for (int i = 0; i < bytes; i += 64) {
      most = _mm512_max_epu32(most, and_(load_bytes(p + i), set_int(0x7fffffff)));
    }
    return _mm512_cmpge_epu32_mask(most, set_int(0x7f800000)) == 0;
  }
  static bool finite16(const unsigned char* p, int bytes, int top) {
    I most = _mm512_setzero_si512();
    for (int i = 0; i < bytes; i += 64) {
      most = _mm512_max_epu16(most, and_(load_bytes(p + i), set_int(0x7fff7fff)));
    }
    return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(static_cast<short>(top))) == 0;
  }
};

}  // namespace
}  // namespace lowbit::cpu

#include "cpu/generic/quantize_simd.h"

namespace lowbit::cpu {

const QuantizeKernels& quantize_kernels_avx512() {
  return kKernels;
}

}  // namespace lowbit::cpu
