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

// A chunk of a tile: its rows from their input `from` on, of the source or, where the chunk is
// short, copies that are padded.
struct RowChunk {
  std::int64_t begin, from;
  int logical, padded;  // inputs
  const char* rows[16];
};

template <Coder kCoder, DType kDType>
struct RowChunks {
  static constexpr std::int64_t kBytes = kElementBytes<kDType>;

  const SourceTile& source;
  const int step;
  const char* rows[16];
  alignas(64) unsigned char copy[16 * kChunk * kBytes];

  RowChunks(const SourceTile& tile, const Layout& layout)
      : source(tile), step(kGroupScale<kCoder> ? layout.group_size : kChunk) {
    for (int r = 0; r < 16; ++r) {
      // Rows that pad the tile repeat the last one; pad_codes overwrites what comes of it.
      const int row = r < source.rows ? r : source.rows - 1;
      rows[r] = static_cast<const char*>(source.data) + row * source.row_stride * kBytes;
    }
  }

  [[gnu::always_inline]] void take(std::int64_t begin, RowChunk* chunk) {
    const std::int64_t rest = source.cols - begin;
    chunk->begin = begin;
    chunk->logical = static_cast<int>(rest < step ? rest : step);
    chunk->padded = (chunk->logical + 31) / 32 * 32;
    if (chunk->logical == chunk->padded) {
      chunk->from = begin;
      for (int r = 0; r < 16; ++r) chunk->rows[r] = rows[r];
    } else {
      chunk->from = 0;
      copy_short_rows<kDType>(source, rows, begin, chunk->logical, chunk->padded, copy,
                              chunk->rows);
    }
  }

  // From a chunk to what is asked for meanwhile: at the end of the rows that is the start of the
  // next tile's.
  [[gnu::always_inline]] std::int64_t ahead(const RowChunk& chunk) const {
    if (chunk.begin * kBytes + kAhead < source.cols * kBytes || !source.more || kRowScale<kCoder>) {
      return kAhead;
    }
    return kAhead + (16 * source.row_stride - source.cols) * kBytes;
  }

  // The next tile's rows beside a chunk of this one's.
  [[gnu::always_inline]] void prefetch_below(const RowChunk& chunk, int r) const {
    prefetch_row<kDType>(rows[r] + (chunk.begin + 16 * source.row_stride) * kBytes, chunk.padded);
  }
};

// The largest magnitude of each row.
template <Coder kCoder, DType kDType>
[[gnu::always_inline]] inline F find_magnitudes(RowChunks<kCoder, kDType>& chunks) {
  constexpr bool kWords = kDType != DType::kFloat32;
  F magnitude = V::set(0.0f);
  [[maybe_unused]] WordExtremes most;
  most.start();
  for (std::int64_t begin = 0; begin < chunks.source.cols; begin += chunks.step) {
    RowChunk chunk;
    chunks.take(begin, &chunk);
    if constexpr (kWords) {
      most.template add<kDType>(chunk.rows, chunk.from, chunk.padded, chunks.ahead(chunk));
    } else {
      const Extremes e =
          find_extremes<kCoder, kDType>(chunk.rows, chunk.from, chunk.padded, chunks.ahead(chunk));
      magnitude = V::max_bits(magnitude, e.magnitude);
    }
  }
  if constexpr (kWords) magnitude = most.template magnitude<kDType>();
  return magnitude;
}

// Codes of row r of a chunk: by the row's table, by two multiplications, or by division.
template <Coder kCoder, DType kDType>
[[gnu::always_inline]] inline void encode_chunk_row(const Codec& codec, const Bounds& bounds,
                                                    const RowChunk& chunk, int r,
                                                    const Scales& scales, const Fp8Table* tables,
                                                    unsigned char* codes) {
  const char* row = chunk.rows[r] + chunk.from * kElementBytes<kDType>;
  if constexpr (kByTable<kCoder, kDType>) {
    if (tables != nullptr) {
      return encode_row_by_table<kCoder, kDType>(codec, bounds, row, chunk.padded, scales,
                                                 tables[r], r, codes);
    }
  }
  if constexpr (kRowScale<kCoder>) {
    if (scales.divides) {
      return encode_row<kCoder, kDType, true>(codec, bounds, row, chunk.padded, scales, r, codes);
    }
  }
  encode_row<kCoder, kDType, false>(codec, bounds, row, chunk.padded, scales, r, codes);
}

template <Coder kCoder, DType kDType>
void quantize_tile_as(const SourceTile& source, const Layout& layout, const Codec& codec,
                      std::byte* packed_tile, reference::ScaleRange* out_range) {
  constexpr int kCodeBytes = kWide<kCoder> ? 2 : 1;
  auto* out = reinterpret_cast<unsigned char*>(packed_tile);
  RowChunks<kCoder, kDType> chunks(source, layout);
  Staging staging;
  Scales scales;
  const Bounds bounds(codec);
  V::store(scales.minimum, V::set(0.0f));
  V::store(scales.inverse_rest, V::set(0.0f));
  Range range;
  range.start();

  [[maybe_unused]] Fp8Table tables[kByTable<kCoder, kDType> ? 16 : 1];
  [[maybe_unused]] bool by_table = false;
  if constexpr (kRowScale<kCoder>) {
    // The scale needs the whole row first; the second pass finds it in the second-level cache.
    choose_row_scales(codec, find_magnitudes(chunks), source.rows, &range, &scales, out);
    if constexpr (kByTable<kCoder, kDType>) {
      by_table = !scales.divides && source.cols >= kTableInputs<kDType>;
      for (int r = 0; by_table && r < 16; ++r) {
        make_table<kCoder, kDType>(codec, bounds, scales, r, &tables[r]);
      }
    }
  }

  for (std::int64_t begin = 0; begin < source.cols; begin += chunks.step) {
    RowChunk chunk;
    chunks.take(begin, &chunk);
    if constexpr (kWide<kCoder>) {
      range.magnitude = encode_wide<kCoder, kDType>(codec, chunk.rows, chunk.from, chunk.padded,
                                                    chunks.ahead(chunk), range.magnitude, &staging);
      range.largest = range.magnitude;
    } else {
      if constexpr (kGroupScale<kCoder>) {
        const Extremes e = find_extremes<kCoder, kDType>(chunk.rows, chunk.from, chunk.padded,
                                                         chunks.ahead(chunk));
        choose_scales<kCoder>(codec, e, &range, &scales);
      }
      for (int r = 0; r < 16; ++r) {
        // This pass reads from the second level only; meanwhile the next tile's rows come there.
        if (kRowScale<kCoder> && source.more) chunks.prefetch_below(chunk, r);
        encode_chunk_row<kCoder, kDType>(codec, bounds, chunk, r, scales,
                                         by_table ? tables : nullptr, staging.bytes + r * kChunk);
      }
    }
    if (chunk.logical != chunk.padded || source.rows != 16) {
      pad_codes(&staging, source.rows, chunk.logical, chunk.padded, kCodeBytes, codec.padding_code);
      for (int r = source.rows; r < 16; ++r) scales.scale_half[r] = scales.minimum_half[r] = 0;
    }
    const std::int64_t g = kGroupScale<kCoder> ? begin / chunks.step : 0;
    const std::int64_t offset = kGroupScale<kCoder>
                                    ? layout.codes_offset(g)
                                    : (kRowScale<kCoder> ? 64 : 0) + begin * 16 * kCodeBytes;
    pack_units(staging, codec.bits, chunk.padded, out + offset);
    if constexpr (kGroupScale<kCoder>) put_scales<kCoder>(scales, layout, g, out);
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
