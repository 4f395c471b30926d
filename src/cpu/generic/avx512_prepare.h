// Activations as the AVX-512 kernels read them: blocks of up to kTokens tokens, interleaved so that
// a kernel walks one sequential stream, whatever the number of tokens in the block.
#pragma once

#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

// ---- int8 planes ----------------------------------------------------------------------------
// A record per block of nt tokens and group:
//   scale    [nt] float32            x ~ scale * q
//   init     [nt] int32              -kZero * sum of q: takes the codes' offset out
//   init2    [nt] int32 or float32   see below
//   offset   [nt] float32            one plane: -kBias * scale
//   planes   [kPlanes][inputs / 4][nt][4] int8
// in the order chunk of K, block, group, so that a kernel that stays in a chunk walks over all
// tokens in one stream.
// One plane: q = int8, 127 * x / absmax. Two planes: q = 256 * high + low with both int8,
// |q| <= 127 * 256, so x is held to absmax * 2^-16. A group that holds a NaN or an infinity gets
// scale NaN and q = 0: its token's outputs are all NaN and nobody else's are touched.
// One plane: starts contain the bits of kBias, a float whose last place is 1, so that a sum's bits
// are the float kBias + sum (sums stay below 2^22), and one multiply-add, with scales of at most 22
// significant bits, is scale * sum, rounded once.
constexpr float kBias = 0x1.8p23f;
constexpr std::int32_t kBiasBits = 0x4b400000;

struct IntRecords {
  std::int64_t bytes;  // of a record
  std::int64_t groups, chunk_groups, blocks;

  // chunk: inputs, a multiple of the group size; 0 for all of K.
  LOWBIT_INLINE IntRecords(const Activations& a, std::int64_t planes, std::int64_t tokens,
                           std::int64_t chunk)
      : bytes((planes * a.group + 16) * tokens),
        groups(a.groups),
        chunk_groups(chunk == 0 ? a.groups : chunk / a.group),
        blocks((a.m + tokens - 1) / tokens) {}

  LOWBIT_INLINE std::int64_t all() const { return blocks * groups * bytes; }
  LOWBIT_INLINE std::int64_t at(std::int64_t block, std::int64_t g) const {
    const std::int64_t begin = g / chunk_groups * chunk_groups;
    const std::int64_t left = groups - begin;
    const std::int64_t count = left < chunk_groups ? left : chunk_groups;
    return (begin * blocks + block * count + g - begin) * bytes;
  }
};

LOWBIT_INLINE __m512i broadcast(const std::byte* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
LOWBIT_INLINE __m512 broadcast_f32(const std::byte* p) {
  float value;
  __builtin_memcpy(&value, p, 4);
  return _mm512_set1_ps(value);
}

// Arrays of a record, entry t of nt.
LOWBIT_INLINE const std::byte* scale_of(const std::byte* record, int t, int) {
  return record + 4 * t;
}
LOWBIT_INLINE const std::byte* init_of(const std::byte* record, int t, int nt) {
  return record + 4 * (nt + t);
}
LOWBIT_INLINE const std::byte* init2_of(const std::byte* record, int t, int nt) {
  return record + 4 * (2 * nt + t);
}
LOWBIT_INLINE const std::byte* offset_of(const std::byte* record, int t, int nt) {
  return record + 4 * (3 * nt + t);
}

// scale * sum, 16 rows of token t.
template <int kPlanes>
LOWBIT_INLINE __m512 scaled_sum(__m512i sum, const std::byte* record, int t, int nt) {
  const __m512 scale = broadcast_f32(scale_of(record, t, nt));
  if constexpr (kPlanes == 2) return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(sum), scale, broadcast_f32(offset_of(record, t, nt)));
}

template <int kPlanes, int kTokens>
std::int64_t int_activation_bytes(const Activations& a) {
  return IntRecords(a, kPlanes, block_tokens(a.m, kTokens), 0).all();
}

// Nearest, NaN kept.
LOWBIT_INLINE float to_22_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = (bits + 2) & ~3u;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Elements i .. i + 31 of which the first `count` exist: in order, or of bf16 the even and the odd
// ones, which takes half the instructions.
LOWBIT_INLINE void load32(const void* data, DType dtype, std::int64_t i, std::int64_t count,
                          __m512& a, __m512& b) {
  if (dtype == DType::kBFloat16) {
    const auto mask =
        static_cast<__mmask32>(mask16(count) | std::uint32_t{mask16(count - 16)} << 16);
    const __m512i both =
        _mm512_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(data) + i);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
  } else {
    a = load16(data, dtype, i, count);
    b = load16(data, dtype, i + 16, count - 16);
  }
}

// Where the bytes of 64 inputs are after load32 and two packings: a 128-bit lane holds four of each
// vector.
LOWBIT_INLINE __m512i packed_order(DType dtype) {
  return dtype == DType::kBFloat16
             ? _mm512_set_epi64(0x3f3b3e3a3d393c38, 0x2f2b2e2a2d292c28, 0x1f1b1e1a1d191c18,
                                0x0f0b0e0a0d090c08, 0x3733363235313430, 0x2723262225212420,
                                0x1713161215111410, 0x0703060205010400)
             : _mm512_set_epi64(0x3f3e3d3c2f2e2d2c, 0x1f1e1d1c0f0e0d0c, 0x3b3a39382b2a2928,
                                0x1b1a19180b0a0908, 0x3736353427262524, 0x1716151407060504,
                                0x3332313023222120, 0x1312111003020100);
}

// What a group of one token became.
template <int kPlanes>
struct Quantized {
  float step;
  std::int32_t sums[kPlanes];  // of the bytes of a plane
  LOWBIT_INLINE std::int32_t sum() const {
    return kPlanes == 1 ? sums[0] : 256 * sums[0] + sums[kPlanes - 1];
  }
};

// Quantizes `inputs` activations from element `from` on, of which `left` exist. put(plane, k,
// bytes, whole) gets the bytes of inputs k .. k + 63 (not whole: k + 31).
template <int kPlanes, class Put>
LOWBIT_INLINE Quantized<kPlanes> quantize_group(const Tokens& tokens, std::int64_t from,
                                                std::int64_t left, std::int64_t inputs,
                                                __m512i order, Put&& put) {
  constexpr float kLevels = kPlanes == 1 ? 127.0f : 127.0f * 256.0f;
  // Below this the reciprocal of the step would overflow; such a group counts as zero.
  constexpr float kTiny = 0x1p-100f;
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  const __m512i ones = _mm512_set1_epi8(1);
  alignas(64) float held[256];  // the largest group
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < inputs; k += 32) {
    __m512 x, y;
    load32(tokens.x, tokens.dtype, from + k, left - k, x, y);
    _mm512_store_ps(held + k, x);
    _mm512_store_ps(held + k + 16, y);
    largest = _mm512_max_epu32(
        largest, _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(x), magnitude_bits),
                                  _mm512_and_si512(_mm512_castps_si512(y), magnitude_bits)));
  }
  const std::uint32_t top = _mm512_reduce_max_epu32(largest);
  const float absmax =
      _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(top))));
  const bool finite = top < 0x7f800000u;
  const bool zero = !finite || absmax < kTiny;
  Quantized<kPlanes> result;
  result.step = finite ? (zero ? 0.0f : absmax / kLevels) : __builtin_nanf("");
  const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : kLevels / absmax);
  const __mmask16 keep = zero ? 0 : 0xffff;
  __m512i sums[kPlanes];
  unroll<kPlanes>([&](auto plane) LOWBIT_LAMBDA { sums[plane] = _mm512_setzero_si512(); });
  for (std::int64_t k = 0; k < inputs; k += 64) {
    const bool whole = k + 64 <= inputs;
    const auto words = [&](std::int64_t at) LOWBIT_LAMBDA {
      const auto sixteen = [&](std::int64_t i) LOWBIT_LAMBDA {
        return _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(_mm512_load_ps(held + i), inverse));
      };
      return _mm512_packs_epi32(sixteen(at), sixteen(at + 16));
    };
    const __m512i first = words(k);
    const __m512i second = whole ? words(k + 32) : _mm512_setzero_si512();
    __m512i bytes[kPlanes];
    if constexpr (kPlanes == 1) {
      bytes[0] = _mm512_packs_epi16(first, second);
    } else {
      const auto high = [](__m512i q) LOWBIT_LAMBDA {
        return _mm512_srai_epi16(_mm512_add_epi16(q, _mm512_set1_epi16(128)), 8);
      };
      const __m512i high0 = high(first), high1 = high(second);
      bytes[0] = _mm512_packs_epi16(high0, high1);
      bytes[1] = _mm512_packs_epi16(_mm512_sub_epi16(first, _mm512_slli_epi16(high0, 8)),
                                    _mm512_sub_epi16(second, _mm512_slli_epi16(high1, 8)));
    }
    unroll<kPlanes>([&](auto plane) LOWBIT_LAMBDA {
      sums[plane] = _mm512_dpbusd_epi32(sums[plane], ones, bytes[plane]);
      put(plane, k, _mm512_permutexvar_epi8(order, bytes[plane]), whole);
    });
  }
  unroll<kPlanes>([&](auto plane)
                      LOWBIT_LAMBDA { result.sums[plane] = _mm512_reduce_add_epi32(sums[plane]); });
  return result;
}

// The arrays of a record of nt tokens, entry `slot`.
template <int kPlanes, int kZero, bool kMinimum>
LOWBIT_INLINE void put_arrays(std::byte* record, std::int64_t nt, std::int64_t slot,
                              const Quantized<kPlanes>& q) {
  const auto put = [&](int array, auto value) LOWBIT_LAMBDA {
    __builtin_memcpy(record + 4 * (array * nt + slot), &value, 4);
  };
  put(0, q.step);
  put(1, (kPlanes == 1 ? kBiasBits : 0) - kZero * q.sum());
  if constexpr (kMinimum) put(2, q.step * static_cast<float>(q.sum()));
  if constexpr (kPlanes == 1) put(3, -kBias * q.step);
}

template <int kPlanes, int kTokens, int kChunk, int kZero, bool kMinimum>
void prepare_int(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t per_block = block_tokens(a.m, kTokens);
  const IntRecords records(a, kPlanes, per_block, kChunk);
  const __m512i order = packed_order(tokens.dtype);
  // What a record of nt tokens holds of token t, which is number `slot` of them.
  const auto fill = [&](std::byte* record, std::int64_t nt, std::int64_t slot, std::int64_t t,
                        std::int64_t k0, std::int64_t inputs) LOWBIT_LAMBDA {
    std::byte* planes = record + 16 * nt + 4 * slot;
    const auto put = [&](int plane, std::int64_t k, __m512i bytes, bool whole) LOWBIT_LAMBDA {
      std::byte* to = planes + (plane * a.group + k) * nt;
      if (nt == 1) {
        _mm512_mask_storeu_epi32(to, whole ? 0xffff : 0x00ff, bytes);
        return;
      }
      // By way of memory, which the compiler would spare: taking words out of a register needs
      // the pipes that everything else needs.
      struct Quads {
        alignas(64) std::uint32_t at[16];
      } quads;
      _mm512_store_si512(quads.at, bytes);
      __asm__("" : "+m"(quads));
      unroll<8>([&](auto i) LOWBIT_LAMBDA { __builtin_memcpy(to + i * nt * 4, quads.at + i, 4); });
      if (whole) {
        to += 32 * nt;
        unroll<8>([&](auto i)
                      LOWBIT_LAMBDA { __builtin_memcpy(to + i * nt * 4, quads.at + 8 + i, 4); });
      }
    };
    auto quantized =
        quantize_group<kPlanes>(tokens, t * tokens.stride + k0, a.k - k0, inputs, order, put);
    if constexpr (kPlanes == 1) quantized.step = to_22_bits(quantized.step);
    put_arrays<kPlanes, kZero, kMinimum>(record, nt, slot, quantized);
  };
  for (std::int64_t t = begin; t < end;) {
    const std::int64_t block = t / per_block, slot = t - block * per_block;
    const std::int64_t left = a.m - block * per_block;
    const std::int64_t nt = left < per_block ? left : per_block;
    const std::int64_t count = nt - slot < end - t ? nt - slot : end - t;
    for (std::int64_t c = 0; c < a.groups; c += records.chunk_groups) {
      std::byte* record = a.data + records.at(block, c);
      const std::int64_t chunk_end =
          c + records.chunk_groups < a.groups ? c + records.chunk_groups : a.groups;
      for (std::int64_t g = c; g < chunk_end; ++g, record += records.bytes) {
        const std::int64_t k0 = g * a.group;
        const std::int64_t inputs = k0 + a.group < a.k_padded ? a.group : a.k_padded - k0;
        for (std::int64_t i = 0; i < count; ++i) fill(record, nt, slot + i, t + i, k0, inputs);
      }
    }
    t += count;
  }
}

// ---- float32 --------------------------------------------------------------------------------
// Token by token: [m][k_padded].
inline std::int64_t f32_activation_bytes(const Activations& a) {
  return a.m * a.k_padded * 4;
}

inline void prepare_f32(const Tokens& tokens, const Activations& a, std::int64_t begin,
                        std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    float* to = reinterpret_cast<float*>(a.data) + t * a.k_padded;
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      _mm512_store_ps(to + k, load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k));
    }
  }
}

// Blocks of kTokens: [k_padded][nt].
template <int kTokens>
std::int64_t f32_block_bytes(const Activations& a) {
  return (a.m + kTokens - 1) / kTokens * align64(a.k_padded * kTokens * 4);
}

template <int kTokens>
void prepare_f32_blocks(const Tokens& tokens, const Activations& a, std::int64_t begin,
                        std::int64_t end) {
  const std::int64_t stride = align64(a.k_padded * kTokens * 4);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / kTokens;
    const std::int64_t nt = a.m - block * kTokens < kTokens ? a.m - block * kTokens : kTokens;
    float* to = reinterpret_cast<float*>(a.data + block * stride) + (t - block * kTokens);
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      alignas(64) float values[16];
      _mm512_store_ps(values, load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k));
      for (int i = 0; i < 16; ++i) to[(k + i) * nt] = values[i];
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
