// Dequantizing a tile, or one row of it: steps 4 and 3 of quantize_simd.h backwards.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/generic/quantize_coder.h"
#include "cpu/generic/quantize_load.h"
#include "cpu/generic/quantize_units.h"

namespace lowbit::cpu {
namespace {

template <Coder kCoder>
inline F decode(const Codec& codec, I code, F table) {
  if constexpr (kCoder == Coder::kSymmetric || kCoder == Coder::kInteger ||
                kCoder == Coder::kMinimum) {
    return V::to_float(V::sub_int(code, V::set_int(codec.zero_point)));
  }
  if constexpr (kCoder == Coder::kTable || kCoder == Coder::kMirrored) {
    return V::look_up(codec.values, table, code);
  }
  if constexpr (kCoder == Coder::kFp8E4M3) {
    // As a half the exponent is 8 too small, subnormals included.
    const I low = V::and_(code, V::set_int(0x7f));
    const I sign = V::and_(code, V::set_int(0x80));
    const F value = V::half_to_float(V::or_(V::shift_left<8>(sign), V::shift_left<7>(low)));
    return V::nan_if_equal(low, V::set_int(0x7f), V::mul(value, V::set(256.0f)));
  }
  if constexpr (kCoder == Coder::kFp8E5M2) return V::half_to_float(V::shift_left<8>(code));
  if constexpr (kCoder == Coder::kHalf) return V::half_to_float(code);
  if constexpr (kCoder == Coder::kBrain) return V::from_bits(V::shift_left<16>(code));
}

template <Coder kCoder, DType kDType>
inline void decode_row(const Codec& codec, const unsigned char* codes, int logical, float scale,
                       float minimum, char* out) {
  const F s = V::set(scale);
  const F m = V::set(minimum);
  const F table = V::load(codec.values);
  const auto sixteen = [&](int i, char* at) {
    F w = decode<kCoder>(
        codec, kWide<kCoder> ? V::load_codes16(codes + 2 * i) : V::load_codes8(codes + i), table);
    w = V::mul(w, s);
    if constexpr (kCoder == Coder::kMinimum) w = V::add(w, m);
    if constexpr (kDType == DType::kFloat32) V::store(reinterpret_cast<float*>(at), w);
    if constexpr (kDType == DType::kFloat16) V::store_codes16(at, V::half_bits(w));
    if constexpr (kDType == DType::kBFloat16) V::store_codes16(at, V::brain_bits_or_nan(w));
  };
  int i = 0;
  for (; i + 16 <= logical; i += 16) sixteen(i, out + i * kElementBytes<kDType>);
  if (i < logical) {
    alignas(64) char rest[64];
    sixteen(i, rest);
    __builtin_memcpy(out + i * kElementBytes<kDType>, rest,
                     static_cast<std::size_t>(logical - i) * kElementBytes<kDType>);
  }
}

// Row r alone into the target's first row, or all rows if r < 0.
template <Coder kCoder, DType kDType>
void dequantize_as(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                   float power, int only, const TargetTile& target) {
  constexpr int kCodeBytes = kWide<kCoder> ? 2 : 1;
  const auto* in = reinterpret_cast<const unsigned char*>(packed_tile);
  Staging staging;
  alignas(64) float scale[16];
  alignas(64) float minimum[16];
  V::store(scale, V::set(power));
  V::store(minimum, V::set(0.0f));
  if constexpr (kRowScale<kCoder>) {
    V::store(scale, V::mul(V::load(reinterpret_cast<const float*>(in)), V::set(power)));
  }
  const int step = kGroupScale<kCoder> ? layout.group_size : kChunk;
  for (std::int64_t begin = 0; begin < target.cols; begin += step) {
    const std::int64_t rest = target.cols - begin;
    const int logical = static_cast<int>(rest < step ? rest : step);
    const int padded = (logical + 31) / 32 * 32;
    const std::int64_t g = kGroupScale<kCoder> ? begin / step : 0;
    const unsigned char* codes =
        in + (kGroupScale<kCoder> ? layout.codes_offset(g)
                                  : (kRowScale<kCoder> ? 64 : 0) + begin * 16 * kCodeBytes);
    if constexpr (kGroupScale<kCoder>) {
      const unsigned char* block = in + layout.scales_offset(g);
      V::store(scale, V::mul(V::load_half(block), V::set(power)));
      if constexpr (kCoder == Coder::kMinimum) {
        V::store(minimum, V::mul(V::load_half(block + 32), V::set(power)));
      }
    }
    char* out = static_cast<char*>(target.data) + begin * kElementBytes<kDType>;
    if (only >= 0) {
      unpack_row(codes, codec.bits, padded, only, staging.bytes);
      decode_row<kCoder, kDType>(codec, staging.bytes, logical, scale[only], minimum[only], out);
      continue;
    }
    unpack_units(codes, codec.bits, padded, &staging);
    for (int r = 0; r < target.rows; ++r) {
      decode_row<kCoder, kDType>(codec, staging.bytes + r * kChunk * kCodeBytes, logical, scale[r],
                                 minimum[r], out + r * target.row_stride * kElementBytes<kDType>);
    }
  }
}

template <Coder kCoder>
void dequantize_to(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                   float power, int only, const TargetTile& target) {
  switch (target.dtype) {
    case DType::kFloat16:
      return dequantize_as<kCoder, DType::kFloat16>(packed_tile, layout, codec, power, only,
                                                    target);
    case DType::kBFloat16:
      return dequantize_as<kCoder, DType::kBFloat16>(packed_tile, layout, codec, power, only,
                                                     target);
    default:
      return dequantize_as<kCoder, DType::kFloat32>(packed_tile, layout, codec, power, only,
                                                    target);
  }
}

void dequantize_row(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                    float power, int only, const TargetTile& target) {
  with_coder(codec.coder, [&](auto coder) {
    dequantize_to<coder>(packed_tile, layout, codec, power, only, target);
  });
}

void dequantize_tile(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                     float power, const TargetTile& target) {
  dequantize_row(packed_tile, layout, codec, power, -1, target);
}

}  // namespace
}  // namespace lowbit::cpu
