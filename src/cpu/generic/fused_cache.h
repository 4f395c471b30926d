// Quantized keys and values (the layout: lowbit/fused.h): single heads in, blocks out as floats.
#pragma once

#include "cpu/generic/fused_product.h"

namespace lowbit::cpu {
namespace {

constexpr int kQuads = kCacheGroup / 4;

LOWBIT_INLINE vu bits_of(vf value) {
  vu bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LOWBIT_INLINE vf float_of(vu bits) {
  vf value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest integers, ties to even, of |x| < 2^22.
LOWBIT_INLINE vi round_to_int(vf x) {
  constexpr float kRound = 12582912.0f;
  return __builtin_convertvector((x + kRound) - kRound, vi);
}

// Codes of x / scale in the low bytes.
template <CacheFormat kFormat>
LOWBIT_INLINE vi encode_cached(vf quotient) {
  if constexpr (kFormat == CacheFormat::kInt8) {
    const vf high = splat(127.0f);
    vf q = quotient > high ? high : quotient;
    q = q < -high ? -high : q;
    return round_to_int(q);
  }
  // e4m3: exponent and three bits of mantissa, rounded half to even; below 2^-6 multiples of 2^-9.
  const vu bits = bits_of(quotient), magnitude = bits & 0x7fffffffu;
  const vu normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - ((127u - 7u) << 3);
  const vu largest = vu{} + 0x7eu;
  const vi subnormal = round_to_int(float_of(magnitude) * 512.0f);
  vu code = magnitude < (121u << 23) ? __builtin_convertvector(subnormal, vu)
                                     : (normal > largest ? largest : normal);
  code |= (bits >> 24) & 0x80u;
  return __builtin_convertvector(code, vi);
}

// Values of the codes in byte kByte of every lane. Keys are stored with the sign bit turned, as
// the unsigned operand of a byte product.
template <CacheFormat kFormat, bool kKeys, int kByte>
LOWBIT_INLINE vf decode_cached(vu raw) {
  constexpr int kShift = 8 * (std::endian::native == std::endian::little ? kByte : 3 - kByte);
  if constexpr (kFormat == CacheFormat::kInt8) {
    if constexpr (kKeys) raw ^= 0x80u << kShift;
    const vu top = raw << (24 - kShift);
    vi value;
    std::memcpy(&value, &top, sizeof value);
    return __builtin_convertvector(value >> 24, vf);
  }
  const vu code = raw >> kShift, magnitude = code & 0x7fu;
  const vf normal = float_of((magnitude << 20) + (120u << 23));
  const vf subnormal =
      __builtin_convertvector(__builtin_convertvector(magnitude & 7u, vi), vf) * 0x1p-9f;
  const vf value = magnitude < 8u ? subnormal : normal;
  return float_of(bits_of(value) | ((code & 0x80u) << 24));
}

template <CacheFormat kFormat>
void put_as(const float* x, int d, CachePart part, int slot, std::byte* block) {
  constexpr float kTop = kFormat == CacheFormat::kInt8 ? 127.0f : 448.0f;
  const int padded = static_cast<int>(cache_padded(d));
  std::uint16_t* scales =
      reinterpret_cast<std::uint16_t*>(block + std::int64_t{padded} * kCacheBlock);
  for (int begin = 0; begin < d; begin += kCacheGroup) {
    const int count = d - begin < kCacheGroup ? d - begin : kCacheGroup;
    float held[kCacheGroup] = {};
    std::memcpy(held, x + begin, static_cast<std::size_t>(count) * 4);
    vu largest = {};
    for (int i = 0; i < kCacheGroup; i += kLanes) {
      const vu magnitude = bits_of(load(held + i)) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    std::uint32_t top = 0;
    for (int l = 0; l < kLanes; ++l) top = largest[l] > top ? largest[l] : top;
    // The scale is rounded up to a bfloat16, so no quotient is beyond the largest code; NaN stands
    // for a head that is not finite.
    std::uint32_t scale = 0x7fc00000u;
    if (top < 0x7f800000u) scale = (float_to_bits(bits_to_float(top) / kTop) + 0xffffu) & ~0xffffu;
    const float divisor = bits_to_float(scale);
    const bool zero = !(divisor > 0);
    alignas(64) std::int32_t codes[kCacheGroup] = {};
    for (int i = 0; i < kCacheGroup && !zero; i += kLanes) {
      const vi code = encode_cached<kFormat>(load(held + i) / divisor);
      std::memcpy(codes + i, &code, sizeof code);
    }
    scales[begin / kCacheGroup * kCacheBlock + slot] = static_cast<std::uint16_t>(scale >> 16);
    const int stored = padded - begin < kCacheGroup ? padded - begin : kCacheGroup;
    if (part == CachePart::kKeys) {
      const std::int32_t turn = kFormat == CacheFormat::kInt8 ? 0x80 : 0;
      for (int i = 0; i < stored; ++i) {
        block[((begin + i) / 4 * kCacheBlock + slot) * 4 + i % 4] =
            static_cast<std::byte>(codes[i] ^ turn);
      }
    } else {
      std::byte* row = block + std::int64_t{slot / 4} * padded * 4 + slot % 4;
      for (int i = 0; i < stored; ++i) row[(begin + i) * 4] = static_cast<std::byte>(codes[i]);
    }
  }
}

void cache_put(const float* x, int d, CacheFormat format, CachePart part, int slot,
               std::byte* block) {
  if (format == CacheFormat::kInt8) return put_as<CacheFormat::kInt8>(x, d, part, slot, block);
  return put_as<CacheFormat::kFp8>(x, d, part, slot, block);
}

// The keys of a block to [d, kCacheBlock] floats. Positions that were never written give whatever.
template <CacheFormat kFormat>
void keys_to_columns(const std::byte* block, int d, float* to) {
  const std::byte* scales = block + cache_padded(d) * kCacheBlock;
  for (int quad = 0; quad * 4 < d; ++quad) {
    const int rows = d - quad * 4 < 4 ? d - quad * 4 : 4;
    for (int p = 0; p < kCacheBlock; p += kLanes) {
      vu raw;
      std::memcpy(&raw, block + (quad * kCacheBlock + p) * 4, sizeof raw);
      const vf scale = load_as<DType::kBFloat16>(scales, quad / kQuads * kCacheBlock + p);
      float* column = to + quad * 4 * kCacheBlock + p;
      store(column, decode_cached<kFormat, true, 0>(raw) * scale);
      if (rows > 1) store(column + kCacheBlock, decode_cached<kFormat, true, 1>(raw) * scale);
      if (rows > 2) store(column + 2 * kCacheBlock, decode_cached<kFormat, true, 2>(raw) * scale);
      if (rows > 3) store(column + 3 * kCacheBlock, decode_cached<kFormat, true, 3>(raw) * scale);
    }
  }
}

// The values of a block's first `count` positions, rounded up to four, to [count, padded] floats;
// padded is d rounded up to vectors.
template <CacheFormat kFormat>
void values_to_rows(const std::byte* block, int d, int count, std::int64_t padded, float* to) {
  const std::int64_t stored = cache_padded(d);
  const std::byte* scales = block + stored * kCacheBlock;
  for (int p = 0; p < count; p += 4) {
    for (int i = 0; i < padded; i += kLanes) {
      vu raw;
      std::memcpy(&raw, block + (p / 4 * stored + i) * 4, sizeof raw);
      float scale[4];
      for (int j = 0; j < 4; ++j) {
        scale[j] = load_float(scales, DType::kBFloat16, i / kCacheGroup * kCacheBlock + p + j);
      }
      float* row = to + p * padded + i;
      store(row, decode_cached<kFormat, false, 0>(raw) * scale[0]);
      store(row + padded, decode_cached<kFormat, false, 1>(raw) * scale[1]);
      store(row + 2 * padded, decode_cached<kFormat, false, 2>(raw) * scale[2]);
      store(row + 3 * padded, decode_cached<kFormat, false, 3>(raw) * scale[3]);
    }
  }
}

std::int64_t cache_get_scratch(int d) {
  return (cache_padded(d) + kLanes) * kCacheBlock;
}

void cache_get(const std::byte* block, int d, CacheFormat format, CachePart part, int count,
               float* to, float* scratch) {
  const bool int8 = format == CacheFormat::kInt8;
  if (part == CachePart::kKeys) {
    int8 ? keys_to_columns<CacheFormat::kInt8>(block, d, scratch)
         : keys_to_columns<CacheFormat::kFp8>(block, d, scratch);
    for (int p = 0; p < count; ++p) {
      for (int i = 0; i < d; ++i) to[p * d + i] = scratch[i * kCacheBlock + p];
    }
  } else {
    const std::int64_t padded = round_to_lanes(d);
    int8 ? values_to_rows<CacheFormat::kInt8>(block, d, count, padded, scratch)
         : values_to_rows<CacheFormat::kFp8>(block, d, count, padded, scratch);
    for (int p = 0; p < count; ++p) {
      std::memcpy(to + p * d, scratch + p * padded, static_cast<std::size_t>(d) * 4);
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
