// Quantizing a tile of rows, each contiguous. Columns: quantize_columns.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/generic/quantize_coder.h"
#include "cpu/generic/quantize_encode.h"
#include "cpu/generic/quantize_fp8.h"
#include "cpu/generic/quantize_load.h"
#include "cpu/generic/quantize_scales.h"
#include "cpu/generic/quantize_units.h"

namespace lowbit::cpu {
namespace {

// 16-bit codes need no scale, hence no second look. Returns the largest magnitudes.
template <Coder kCoder, DType kDType>
inline F encode_wide(const Codec& codec, const char* const (&rows)[16], std::int64_t begin,
                     int inputs, std::int64_t ahead, F magnitudes, Staging* staging) {
  F all = V::set(0.0f);
  for (int r = 0; r < 16; ++r) {
    const char* at = rows[r] + begin * kElementBytes<kDType>;
    prefetch_row<kDType>(at + ahead, inputs);
#pragma GCC unroll 4
    for (int i = 0; i < inputs; i += 16) {
      const F w = load<kDType>(at + i * kElementBytes<kDType>);
      all = V::max_bits(all, V::abs(w));
      V::store_codes16(staging->bytes + 2 * (r * kChunk + i), encode<kCoder>(codec, w));
    }
  }
  return V::max_bits(magnitudes, all);
}

template <DType kDType>
void copy_short_rows(const SourceTile& source, const char* const (&rows)[16], std::int64_t begin,
                     int logical, int padded, unsigned char* out, const char* (&copies)[16]) {
  // The last weight is repeated, so that extremes are those of the logical weights.
  constexpr int kBytes = kElementBytes<kDType>;
  for (int r = 0; r < 16; ++r) {
    unsigned char* row = out + r * kChunk * kBytes;
    if (r >= source.rows) {
      copies[r] = copies[source.rows - 1];
      continue;
    }
    __builtin_memcpy(row, rows[r] + begin * kBytes, static_cast<std::size_t>(logical) * kBytes);
    for (int i = logical; i < padded; ++i) {
      __builtin_memcpy(row + i * kBytes, row + (logical - 1) * kBytes, kBytes);
    }
    copies[r] = reinterpret_cast<const char*>(row);
  }
}

template <Coder kCoder, DType kDType>
void quantize_tile_as(const SourceTile& source, const Layout& layout, const Codec& codec,
                      std::byte* packed_tile, reference::ScaleRange* out_range) {
  constexpr bool kGrouped = !kRowScale<kCoder> && !kWide<kCoder>;
  constexpr int kCodeBytes = kWide<kCoder> ? 2 : 1;
  auto* out = reinterpret_cast<unsigned char*>(packed_tile);
  const char* rows[16];
  for (int r = 0; r < 16; ++r) {
    // Rows that pad the tile repeat the last one; pad_codes overwrites what comes of it.
    const int row = r < source.rows ? r : source.rows - 1;
    rows[r] =
        static_cast<const char*>(source.data) + row * source.row_stride * kElementBytes<kDType>;
  }
  alignas(64) unsigned char copy[16 * kChunk * kElementBytes<kDType>];
  Staging staging;
  Scales scales;
  const Bounds bounds(codec);
  V::store(scales.minimum, V::set(0.0f));
  V::store(scales.inverse_rest, V::set(0.0f));
  Range range;
  range.start();

  const int step = kGrouped ? layout.group_size : kChunk;
  const auto chunk_rows = [&](std::int64_t begin, int logical, int padded,
                              const char*(&at)[16]) -> std::int64_t {
    if (logical == padded) {
      for (int r = 0; r < 16; ++r) at[r] = rows[r];
      return begin;
    }
    copy_short_rows<kDType>(source, rows, begin, logical, padded, copy, at);
    return 0;
  };
  const auto logical_inputs = [&](std::int64_t begin) {
    const std::int64_t rest = source.cols - begin;
    return static_cast<int>(rest < step ? rest : step);
  };

  // From the chunk at `begin` to what is asked for meanwhile: at the end of the rows that is the
  // start of the next tile's.
  const auto ahead = [&](std::int64_t begin) {
    constexpr std::int64_t kBytes = kElementBytes<kDType>;
    if (begin * kBytes + kAhead < source.cols * kBytes || !source.more || kRowScale<kCoder>) {
      return kAhead;
    }
    return kAhead + (16 * source.row_stride - source.cols) * kBytes;
  };

  [[maybe_unused]] Fp8Table tables[kByTable<kCoder, kDType> ? 16 : 1];
  [[maybe_unused]] bool by_table = false;
  if constexpr (kRowScale<kCoder>) {
    // The scale needs the whole row first; the second pass finds it in the second-level cache.
    constexpr bool kWords = kDType != DType::kFloat32;
    F magnitude = V::set(0.0f);
    [[maybe_unused]] WordExtremes most;
    most.start();
    for (std::int64_t begin = 0; begin < source.cols; begin += step) {
      const int logical = logical_inputs(begin);
      const int padded = (logical + 31) / 32 * 32;
      const char* at[16];
      const std::int64_t from = chunk_rows(begin, logical, padded, at);
      if constexpr (kWords) {
        most.template add<kDType>(at, from, padded, ahead(begin));
      } else {
        const Extremes e = find_extremes<kCoder, kDType>(at, from, padded, ahead(begin));
        magnitude = V::max_bits(magnitude, e.magnitude);
      }
    }
    if constexpr (kWords) magnitude = most.template magnitude<kDType>();
    choose_row_scales(codec, magnitude, source.rows, &range, &scales, out);
    if constexpr (kByTable<kCoder, kDType>) {
      by_table = !scales.divides && source.cols >= kTableInputs<kDType>;
      for (int r = 0; by_table && r < 16; ++r) {
        make_table<kCoder, kDType>(codec, bounds, scales, r, &tables[r]);
      }
    }
  }

  for (std::int64_t begin = 0; begin < source.cols; begin += step) {
    const int logical = logical_inputs(begin);
    const int padded = (logical + 31) / 32 * 32;
    const std::int64_t g = kGrouped ? begin / step : 0;
    const char* at[16];
    const std::int64_t from = chunk_rows(begin, logical, padded, at);
    if constexpr (kWide<kCoder>) {
      range.magnitude = encode_wide<kCoder, kDType>(codec, at, from, padded, ahead(begin),
                                                    range.magnitude, &staging);
      range.largest = range.magnitude;
    } else {
      if constexpr (kGrouped) {
        const Extremes e = find_extremes<kCoder, kDType>(at, from, padded, ahead(begin));
        choose_scales<kCoder>(codec, e, &range, &scales);
      }
      for (int r = 0; r < 16; ++r) {
        // This pass reads from the second level only; meanwhile the next tile's rows come there.
        if (kRowScale<kCoder> && source.more) {
          prefetch_row<kDType>(rows[r] + (begin + 16 * source.row_stride) * kElementBytes<kDType>,
                               padded);
        }
        const char* row = at[r] + from * kElementBytes<kDType>;
        unsigned char* codes = staging.bytes + r * kChunk;
        if constexpr (kByTable<kCoder, kDType>) {
          if (by_table) {
            encode_row_by_table<kCoder, kDType>(codec, bounds, row, padded, scales, tables[r], r,
                                                codes);
            continue;
          }
        }
        const auto encode_as = [&](auto divides) {
          encode_row<kCoder, kDType, divides>(codec, bounds, row, padded, scales, r, codes);
        };
        if (kRowScale<kCoder> && scales.divides) {
          encode_as(std::bool_constant<kRowScale<kCoder>>{});
        } else {
          encode_as(std::false_type{});
        }
      }
    }
    if (logical != padded || source.rows != 16) {
      pad_codes(&staging, source.rows, logical, padded, kCodeBytes, codec.padding_code);
      for (int r = source.rows; r < 16; ++r) scales.scale_half[r] = scales.minimum_half[r] = 0;
    }
    const std::int64_t offset =
        kGrouped ? layout.codes_offset(g) : (kRowScale<kCoder> ? 64 : 0) + begin * 16 * kCodeBytes;
    pack_units(staging, codec.bits, padded, out + offset);
    if constexpr (kGrouped) put_scales<kCoder>(scales, layout, g, out);
  }

  V::finish_streams();

  range.report(out_range);
}

template <Coder kCoder>
void quantize_tile_from(const SourceTile& source, const Layout& layout, const Codec& codec,
                        std::byte* packed_tile, reference::ScaleRange* range) {
  switch (source.dtype) {
    case DType::kFloat16:
      return quantize_tile_as<kCoder, DType::kFloat16>(source, layout, codec, packed_tile, range);
    case DType::kBFloat16:
      return quantize_tile_as<kCoder, DType::kBFloat16>(source, layout, codec, packed_tile, range);
    default:
      return quantize_tile_as<kCoder, DType::kFloat32>(source, layout, codec, packed_tile, range);
  }
}

void quantize_tile(const SourceTile& source, const Layout& layout, const Codec& codec,
                   std::byte* packed_tile, reference::ScaleRange* range) {
  with_coder(codec.coder, [&](auto coder) {
    quantize_tile_from<coder>(source, layout, codec, packed_tile, range);
  });
}

}  // namespace
}  // namespace lowbit::cpu
