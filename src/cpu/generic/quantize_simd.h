// The quantizers and dequantizers, once for all instruction sets. An ISA's quantize.cpp defines
// 16-lane operations as a struct V in its anonymous namespace and then includes this file.
//
// A row tile is worked on in chunks of one group (row-scaled and 16-bit formats: 256 inputs):
//   quantize    1. extremes of each row, 16 rows at a time, reduced so that lane r is row r
//               2. scales of 16 rows at once: IEEE division, rounding to fp16
//               3. codes row by row, weights again from L1, into a staging block of bytes
//               4. staging block -> units: a transpose of 16 rows x 16 words, then shifts and ors
//   dequantize  4 and 3 backwards
// Every float operation is one that the reference does, on the same operands, so the bytes are
// equal; no operation contracts or approximates.
//
// Needs V: types F (16 floats), I (16 int32), B (64 bytes), M (16 lanes of bool), and the
// functions used below. Everything is in the anonymous namespace, so that no symbol of this file
// is shared between objects with different -m flags.

namespace lowbit::cpu {
namespace {

using F = V::F;
using I = V::I;
using B = V::B;

constexpr std::int64_t kAhead = 1024;  // bytes of a row that are prefetched ahead of its use
constexpr int kChunk = 256;            // largest group; also the step of formats without groups

// Codes of one chunk, row by row, one byte (16-bit formats: two) each.
struct Staging {
  alignas(64) unsigned char bytes[16 * kChunk * 2];
};

// Weights of one chunk as float32. Rows of a matrix often lie a multiple of 4 KiB apart, so that 16
// of them compete for the same few lines of the first-level cache and a second look at the matrix
// itself would miss it.
// Multiplying by the reciprocal and dividing only next to a tie was tried: on Zen 4 it was 0 to 20
// % slower than the divisions, which the tests for ties do not pay for.
struct Weights {
  alignas(64) float rows[16][kChunk];
};

template <DType kDType>
constexpr int kElementBytes = kDType == DType::kFloat32 ? 4 : 2;

template <DType kDType>
inline F load(const char* at) {
  if constexpr (kDType == DType::kFloat32) return V::load(reinterpret_cast<const float*>(at));
  if constexpr (kDType == DType::kFloat16) return V::load_half(at);
  if constexpr (kDType == DType::kBFloat16) return V::load_brain(at);
}

// What step 1 finds, lane r for row r.
struct Extremes {
  F magnitude;  // largest absolute value; NaN or infinity if any weight was
  F max, min;   // only those the coder needs
};

// Copies the weights to `copy` unless that is nullptr.
template <Coder kCoder, DType kDType>
inline Extremes find_extremes(const char* const (&rows)[16], std::int64_t begin, int inputs,
                              Weights* copy) {
  constexpr bool kMin = kCoder == Coder::kSymmetric || kCoder == Coder::kMinimum;
  constexpr bool kMax = kCoder == Coder::kMinimum;
  F magnitudes[16], maxima[16], minima[16];
  for (int r = 0; r < 16; ++r) {
    const char* at = rows[r] + begin * kElementBytes<kDType>;
    // 16 row streams are more than the hardware prefetchers follow. To the second level: in the
    // first they would evict each other, see Weights.
    for (int i = 0; i < inputs * kElementBytes<kDType>; i += 64) V::prefetch(at + kAhead + i);
    F w = load<kDType>(at);
    F magnitude = V::abs(w), max = w, min = w;
    if (copy != nullptr) V::store(copy->rows[r], w);
#pragma GCC unroll 4
    for (int i = 16; i < inputs; i += 16) {
      w = load<kDType>(at + i * kElementBytes<kDType>);
      if (copy != nullptr) V::store(copy->rows[r] + i, w);
      magnitude = V::max_bits(magnitude, V::abs(w));
      if constexpr (kMax) max = V::max(max, w);
      if constexpr (kMin) min = V::min(min, w);
    }
    magnitudes[r] = magnitude;
    maxima[r] = max;
    minima[r] = min;
  }
  Extremes e;
  e.magnitude = V::reduce(magnitudes, [](F a, F b) { return V::max_bits(a, b); });
  e.max = kMax ? V::reduce(maxima, [](F a, F b) { return V::max(a, b); }) : e.magnitude;
  e.min = kMin ? V::reduce(minima, [](F a, F b) { return V::min(a, b); }) : e.magnitude;
  return e;
}

// Scales of 16 rows. `divisor` is the stored scale, infinite where it is zero: then every quotient
// is zero.
struct Scales {
  alignas(64) float divisor[16];
  alignas(64) float minimum[16];
  alignas(64) std::uint16_t scale_half[16];
  alignas(64) std::uint16_t minimum_half[16];
};

// Running scale range, lane r for row r.
struct Range {
  F largest, smallest, largest_minimum, smallest_minimum, magnitude;

  void start() {
    largest = largest_minimum = magnitude = V::set(0.0f);
    smallest = smallest_minimum = V::set(__builtin_inff());
  }
  void add(F statistic) {
    largest = V::max(largest, statistic);
    smallest = V::min(smallest, V::infinite_if_zero(statistic));
  }
  void add_minimum(F minimum) {
    const F m = V::abs(minimum);
    largest_minimum = V::max(largest_minimum, m);
    smallest_minimum = V::min(smallest_minimum, V::infinite_if_zero(m));
  }
};

template <Coder kCoder>
inline void choose_scales(const Codec& codec, const Extremes& e, Range* range, Scales* scales) {
  range->magnitude = V::max_bits(range->magnitude, e.magnitude);
  F scale;
  if constexpr (kCoder == Coder::kMinimum) {
    const F statistic = V::sub(e.max, e.min);
    range->add(statistic);
    range->add_minimum(e.min);
    V::store(scales->minimum, V::round_to_half(e.min, scales->minimum_half));
    scale = V::div(statistic, V::set(codec.value_max));
  } else if constexpr (kCoder == Coder::kSymmetric) {
    range->add(e.magnitude);
    // The larger magnitude of the two ends; the lower end if they tie.
    const F negative = V::sub(V::set(0.0f), e.magnitude);
    const F m = V::select_equal(e.min, negative, e.min, e.magnitude);
    scale = V::div(m, V::set(-codec.value_max));
  } else {
    range->add(e.magnitude);
    scale = V::div(e.magnitude, V::set(codec.value_max));
  }
  V::store(scales->divisor, V::infinite_if_zero(V::round_to_half(scale, scales->scale_half)));
}

// Codes of 16 quotients (kHalf, kBrain: of 16 weights).
template <Coder kCoder>
inline I encode(const Codec& codec, F t) {
  if constexpr (kCoder == Coder::kSymmetric || kCoder == Coder::kInteger ||
                kCoder == Coder::kMinimum) {
    // Clamping first is the same as clamping the rounded value: the bounds are integers.
    const F q = V::max(V::min(t, V::set(codec.high)), V::set(codec.low));
    return V::add(V::round_to_int(q), V::set_int(codec.zero_point));
  }
  if constexpr (kCoder == Coder::kTable) return V::nearest(codec, t);
  if constexpr (kCoder == Coder::kMirrored) {
    const I code = V::nearest(codec, V::abs(t));
    const I sign = V::shift_right<28>(V::and_(V::bits(t), V::set_int(INT32_MIN)));
    return V::zero_if_zero(code, V::or_(code, sign));
  }
  if constexpr (kCoder == Coder::kFp8E4M3 || kCoder == Coder::kFp8E5M2) {
    constexpr bool kE4 = kCoder == Coder::kFp8E4M3;
    constexpr int kDrop = kE4 ? 20 : 21;  // mantissa bits of float32 that go
    constexpr int kRebias = (127 - (kE4 ? 7 : 15)) << (23 - kDrop);
    constexpr int kLargest = kE4 ? 0x7e : 0x7b;
    const F magnitude = V::abs(t);
    const I u = V::bits(magnitude);
    // Normal: round half to even by integer addition; the carry may step the exponent.
    const I odd = V::and_(V::shift_right<kDrop>(u), V::set_int(1));
    const I rounded =
        V::shift_right<kDrop>(V::add(u, V::add(odd, V::set_int((1 << (kDrop - 1)) - 1))));
    const I normal = V::min_int(V::sub_int(rounded, V::set_int(kRebias)), V::set_int(kLargest));
    // Subnormal: adding 2^23 units of the last place leaves the rounded count in the low bits.
    const F magic = V::set(kE4 ? 0x1p14f : 0x1p7f);
    const I subnormal = V::sub_int(V::bits(V::add(magnitude, magic)), V::bits(magic));
    const I code = V::select_less(magnitude, V::set(kE4 ? 0x1p-6f : 0x1p-14f), subnormal, normal);
    const I sign = V::shift_right<24>(V::and_(V::bits(t), V::set_int(INT32_MIN)));
    return V::zero_if_zero(code, V::or_(code, sign));
  }
  if constexpr (kCoder == Coder::kHalf) return V::half_bits(t);
  if constexpr (kCoder == Coder::kBrain) return V::brain_bits(t);
}

template <Coder kCoder>
constexpr bool kWide = kCoder == Coder::kHalf || kCoder == Coder::kBrain;

// Codes of one row of a chunk.
template <Coder kCoder, DType kDType>
inline void encode_row(const Codec& codec, const char* at, int inputs, float divisor, float minimum,
                       unsigned char* codes) {
  const F d = V::set(divisor);
  const F m = V::set(minimum);
  const auto sixteen = [&](int i) {
    F w = load<kDType>(at + i * kElementBytes<kDType>);
    if constexpr (kCoder == Coder::kMinimum) w = V::sub(w, m);
    return encode<kCoder>(codec, V::div(w, d));
  };
  int i = 0;
  for (; i + 64 <= inputs; i += 64) {
    V::store_codes8(codes + i, sixteen(i), sixteen(i + 16), sixteen(i + 32), sixteen(i + 48));
  }
  for (; i < inputs; i += 16) V::store_codes8(codes + i, sixteen(i));
}

// 16-bit codes need no scale, hence no second look. Returns the largest magnitudes.
template <Coder kCoder, DType kDType>
inline F encode_wide(const Codec& codec, const char* const (&rows)[16], std::int64_t begin,
                     int inputs, F magnitudes, Staging* staging) {
  F all = V::set(0.0f);
  for (int r = 0; r < 16; ++r) {
    const char* at = rows[r] + begin * kElementBytes<kDType>;
    for (int i = 0; i < inputs * kElementBytes<kDType>; i += 64) V::prefetch(at + kAhead + i);
#pragma GCC unroll 4
    for (int i = 0; i < inputs; i += 16) {
      const F w = load<kDType>(at + i * kElementBytes<kDType>);
      all = V::max_bits(all, V::abs(w));
      V::store_codes16(staging->bytes + 2 * (r * kChunk + i), encode<kCoder>(codec, w));
    }
  }
  return V::max_bits(magnitudes, all);
}

// Overwrites what padding must be: inputs from `logical` on, rows from `rows` on.
inline void pad_codes(Staging* staging, int rows, int logical, int padded, int bytes,
                      std::uint16_t code) {
  for (int r = 0; r < 16; ++r) {
    unsigned char* row = staging->bytes + r * kChunk * bytes;
    for (int i = r < rows ? logical : 0; i < padded; ++i) {
      row[i * bytes] = static_cast<unsigned char>(code);
      if (bytes == 2) row[i * bytes + 1] = static_cast<unsigned char>(code >> 8);
    }
  }
}

// Units of `inputs` inputs (a multiple of 32) from the staging block to their place.
inline void pack_units(const Staging& staging, int bits, int inputs, unsigned char* out) {
  const int row_bytes = kChunk * (bits == 16 ? 2 : 1);
  const int used = inputs * (bits == 16 ? 2 : 1);
  unsigned char* plane = out + (bits == 5 ? inputs / 8 : inputs / 16) * 64;
  for (int column = 0; column < used; column += 64) {
    B u[16];  // u[j]: word j of the 16 rows: 4 codes of 8 bits, or 2 of 16
    for (int r = 0; r < 16; ++r) u[r] = V::load_bytes(staging.bytes + r * row_bytes + column);
    V::transpose(u);
    const int units = used - column < 64 ? (used - column) / 4 : 16;
    switch (bits) {
      case 16:
      case 8:
        for (int j = 0; j < units; ++j) V::store_bytes(out + (column / 4 + j) * 64, u[j]);
        break;
      case 4:
        for (int j = 0; j < units; j += 2) {
          V::store_bytes(out + (column / 8 + j / 2) * 64,
                         V::or_bytes(u[j], V::shift_bytes_left<4>(u[j + 1])));
        }
        break;
      case 5:
        for (int j = 0; j < units; j += 2) {
          V::store_bytes(out + (column / 8 + j / 2) * 64,
                         V::or_bytes(V::and_bytes(u[j], 15),
                                     V::shift_bytes_left<4>(V::and_bytes(u[j + 1], 15))));
        }
        for (int j = 0; j < units; ++j) {
          const std::uint64_t word = V::bit_of_bytes<4>(u[j]);
          __builtin_memcpy(plane + (column / 4 + j) * 8, &word, 8);
        }
        break;
      case 3:
        for (int j = 0; j < units; j += 4) {
          const B low =
              V::or_bytes(V::and_bytes(u[j], 3), V::shift_bytes_left<2>(V::and_bytes(u[j + 1], 3)));
          const B high = V::or_bytes(V::and_bytes(u[j + 2], 3),
                                     V::shift_bytes_left<2>(V::and_bytes(u[j + 3], 3)));
          V::store_bytes(out + (column / 16 + j / 4) * 64,
                         V::or_bytes(low, V::shift_bytes_left<4>(high)));
        }
        for (int j = 0; j < units; ++j) {
          const std::uint64_t word = V::bit_of_bytes<2>(u[j]);
          __builtin_memcpy(plane + (column / 4 + j) * 8, &word, 8);
        }
        break;
    }
  }
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
  constexpr bool kRowScale = kCoder == Coder::kFp8E4M3 || kCoder == Coder::kFp8E5M2;
  constexpr bool kGrouped = !kRowScale && !kWide<kCoder>;
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
  Weights weights;
  Scales scales;
  V::store(scales.minimum, V::set(0.0f));
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

  if constexpr (kRowScale) {
    // The scale needs the whole row first; the second pass finds it in the second-level cache.
    F magnitude = V::set(0.0f);
    for (std::int64_t begin = 0; begin < source.cols; begin += step) {
      const int logical = logical_inputs(begin);
      const int padded = (logical + 31) / 32 * 32;
      const char* at[16];
      const std::int64_t from = chunk_rows(begin, logical, padded, at);
      const Extremes e = find_extremes<kCoder, kDType>(at, from, padded, nullptr);
      magnitude = V::max_bits(magnitude, e.magnitude);
    }
    range.add(magnitude);
    range.magnitude = magnitude;
    const F scale = V::div(magnitude, V::set(codec.value_max));
    V::store(scales.divisor, V::infinite_if_zero(scale));
    alignas(64) float stored[16];
    V::store(stored, scale);
    for (int r = source.rows; r < 16; ++r) stored[r] = 0;
    __builtin_memcpy(out, stored, 64);
  }

  for (std::int64_t begin = 0; begin < source.cols; begin += step) {
    const int logical = logical_inputs(begin);
    const int padded = (logical + 31) / 32 * 32;
    const std::int64_t g = kGrouped ? begin / step : 0;
    const char* at[16];
    const std::int64_t from = chunk_rows(begin, logical, padded, at);
    if constexpr (kWide<kCoder>) {
      range.magnitude =
          encode_wide<kCoder, kDType>(codec, at, from, padded, range.magnitude, &staging);
      range.largest = range.magnitude;
    } else if constexpr (kRowScale) {
      for (int r = 0; r < 16; ++r) {
        encode_row<kCoder, kDType>(codec, at[r] + from * kElementBytes<kDType>, padded,
                                   scales.divisor[r], 0.0f, staging.bytes + r * kChunk);
      }
    } else {
      const Extremes e = find_extremes<kCoder, kDType>(at, from, padded, &weights);
      choose_scales<kCoder>(codec, e, &range, &scales);
      for (int r = 0; r < 16; ++r) {
        encode_row<kCoder, DType::kFloat32>(codec, reinterpret_cast<const char*>(weights.rows[r]),
                                            padded, scales.divisor[r], scales.minimum[r],
                                            staging.bytes + r * kChunk);
      }
    }
    if (logical != padded || source.rows != 16) {
      pad_codes(&staging, source.rows, logical, padded, kCodeBytes, codec.padding_code);
      for (int r = source.rows; r < 16; ++r) scales.scale_half[r] = scales.minimum_half[r] = 0;
    }
    const std::int64_t offset =
        kGrouped ? layout.codes_offset(g) : (kRowScale ? 64 : 0) + begin * 16 * kCodeBytes;
    pack_units(staging, codec.bits, padded, out + offset);
    if constexpr (kGrouped) {
      unsigned char* block = out + layout.scales_offset(g);
      __builtin_memcpy(block, scales.scale_half, 32);
      if constexpr (kCoder == Coder::kMinimum) {
        __builtin_memcpy(block + 32, scales.minimum_half, 32);
      } else if (g % 2 == 0 && g + 1 == layout.groups) {
        __builtin_memset(block + 32, 0, 32);
      }
    }
  }

  alignas(64) float lanes[5][16];
  V::store(lanes[0], range.largest);
  V::store(lanes[1], range.smallest);
  V::store(lanes[2], range.largest_minimum);
  V::store(lanes[3], range.smallest_minimum);
  V::store(lanes[4], range.magnitude);
  // All 16: padding rows and inputs repeat real weights, and the lanes of 16-bit types are inputs.
  for (int r = 0; r < 16; ++r) {
    if (!(lanes[4][r] < __builtin_inff())) {
      out_range->finite = false;  // the other lanes may be NaN: leave them out
      return;
    }
    if (lanes[0][r] > out_range->largest) out_range->largest = lanes[0][r];
    if (lanes[1][r] < out_range->smallest) out_range->smallest = lanes[1][r];
    if (lanes[2][r] > out_range->largest_minimum) out_range->largest_minimum = lanes[2][r];
    if (lanes[3][r] < out_range->smallest_minimum) out_range->smallest_minimum = lanes[3][r];
  }
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
  switch (codec.coder) {
    case Coder::kSymmetric:
      return quantize_tile_from<Coder::kSymmetric>(source, layout, codec, packed_tile, range);
    case Coder::kInteger:
      return quantize_tile_from<Coder::kInteger>(source, layout, codec, packed_tile, range);
    case Coder::kMinimum:
      return quantize_tile_from<Coder::kMinimum>(source, layout, codec, packed_tile, range);
    case Coder::kTable:
      return quantize_tile_from<Coder::kTable>(source, layout, codec, packed_tile, range);
    case Coder::kMirrored:
      return quantize_tile_from<Coder::kMirrored>(source, layout, codec, packed_tile, range);
    case Coder::kFp8E4M3:
      return quantize_tile_from<Coder::kFp8E4M3>(source, layout, codec, packed_tile, range);
    case Coder::kFp8E5M2:
      return quantize_tile_from<Coder::kFp8E5M2>(source, layout, codec, packed_tile, range);
    case Coder::kHalf:
      return quantize_tile_from<Coder::kHalf>(source, layout, codec, packed_tile, range);
    case Coder::kBrain:
      return quantize_tile_from<Coder::kBrain>(source, layout, codec, packed_tile, range);
  }
}

// ---- back ---------------------------------------------------------------------------------------

inline void unpack_units(const unsigned char* in, int bits, int inputs, Staging* staging) {
  const int row_bytes = kChunk * (bits == 16 ? 2 : 1);
  const int used = inputs * (bits == 16 ? 2 : 1);
  const unsigned char* plane = in + (bits == 5 ? inputs / 8 : inputs / 16) * 64;
  for (int column = 0; column < used; column += 64) {
    B u[16];
    const int units = used - column < 64 ? (used - column) / 4 : 16;
    for (int j = units; j < 16; ++j) u[j] = V::zero_bytes();
    switch (bits) {
      case 16:
      case 8:
        for (int j = 0; j < units; ++j) u[j] = V::load_bytes(in + (column / 4 + j) * 64);
        break;
      case 4:
      case 5:
        for (int j = 0; j < units; j += 2) {
          const B both = V::load_bytes(in + (column / 8 + j / 2) * 64);
          u[j] = V::and_bytes(both, 15);
          u[j + 1] = V::and_bytes(V::shift_bytes_right<4>(both), 15);
        }
        break;
      case 3:
        for (int j = 0; j < units; j += 4) {
          const B four = V::load_bytes(in + (column / 16 + j / 4) * 64);
          u[j] = V::and_bytes(four, 3);
          u[j + 1] = V::and_bytes(V::shift_bytes_right<2>(four), 3);
          u[j + 2] = V::and_bytes(V::shift_bytes_right<4>(four), 3);
          u[j + 3] = V::and_bytes(V::shift_bytes_right<6>(four), 3);
        }
        break;
    }
    if (bits == 5 || bits == 3) {
      for (int j = 0; j < units; ++j) {
        std::uint64_t word;
        __builtin_memcpy(&word, plane + (column / 4 + j) * 8, 8);
        u[j] = V::or_bytes(u[j], V::bytes_of_bits(word, bits == 5 ? 16 : 4));
      }
    }
    V::transpose(u);
    for (int r = 0; r < 16; ++r) V::store_bytes(staging->bytes + r * row_bytes + column, u[r]);
  }
}

// The codes of row r alone; the words of a row are 64 bytes apart.
inline void unpack_row(const unsigned char* in, int bits, int inputs, int r, unsigned char* codes) {
  const unsigned char* at = in + 4 * r;
  const unsigned char* plane = in + (bits == 5 ? inputs / 8 : inputs / 16) * 64;
  const auto word_at = [](const unsigned char* p) {
    std::uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
  };
  // Four bits of the plane spread over four bytes.
  const auto high_bits = [&](int j) {
    const unsigned nibble = plane[j * 8 + r / 2] >> (r % 2 * 4) & 15;
    return nibble * 0x00204081u & 0x01010101u;
  };
  const auto put = [&](int j, std::uint32_t word) { __builtin_memcpy(codes + 4 * j, &word, 4); };
  switch (bits) {
    case 16:
      for (int j = 0; j < inputs / 2; ++j) put(j, word_at(at + j * 64));
      break;
    case 8:
      for (int j = 0; j < inputs / 4; ++j) put(j, word_at(at + j * 64));
      break;
    case 4:
      for (int j = 0; j < inputs / 4; j += 2) {
        const std::uint32_t word = word_at(at + j / 2 * 64);
        put(j, word & 0x0f0f0f0f);
        put(j + 1, word >> 4 & 0x0f0f0f0f);
      }
      break;
    case 5:
      for (int j = 0; j < inputs / 4; j += 2) {
        const std::uint32_t word = word_at(at + j / 2 * 64);
        put(j, (word & 0x0f0f0f0f) | high_bits(j) << 4);
        put(j + 1, (word >> 4 & 0x0f0f0f0f) | high_bits(j + 1) << 4);
      }
      break;
    case 3:
      for (int j = 0; j < inputs / 4; ++j) {
        const std::uint32_t word = word_at(at + j / 4 * 64) >> (j % 4 * 2);
        put(j, (word & 0x03030303) | high_bits(j) << 2);
      }
      break;
  }
}

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
  constexpr bool kRowScale = kCoder == Coder::kFp8E4M3 || kCoder == Coder::kFp8E5M2;
  constexpr bool kGrouped = !kRowScale && !kWide<kCoder>;
  constexpr int kCodeBytes = kWide<kCoder> ? 2 : 1;
  const auto* in = reinterpret_cast<const unsigned char*>(packed_tile);
  Staging staging;
  alignas(64) float scale[16];
  alignas(64) float minimum[16];
  V::store(scale, V::set(power));
  V::store(minimum, V::set(0.0f));
  if constexpr (kRowScale) {
    V::store(scale, V::mul(V::load(reinterpret_cast<const float*>(in)), V::set(power)));
  }
  const int step = kGrouped ? layout.group_size : kChunk;
  for (std::int64_t begin = 0; begin < target.cols; begin += step) {
    const std::int64_t rest = target.cols - begin;
    const int logical = static_cast<int>(rest < step ? rest : step);
    const int padded = (logical + 31) / 32 * 32;
    const std::int64_t g = kGrouped ? begin / step : 0;
    const unsigned char* codes =
        in + (kGrouped ? layout.codes_offset(g) : (kRowScale ? 64 : 0) + begin * 16 * kCodeBytes);
    if constexpr (kGrouped) {
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
  switch (codec.coder) {
    case Coder::kSymmetric:
      return dequantize_to<Coder::kSymmetric>(packed_tile, layout, codec, power, only, target);
    case Coder::kInteger:
      return dequantize_to<Coder::kInteger>(packed_tile, layout, codec, power, only, target);
    case Coder::kMinimum:
      return dequantize_to<Coder::kMinimum>(packed_tile, layout, codec, power, only, target);
    case Coder::kTable:
      return dequantize_to<Coder::kTable>(packed_tile, layout, codec, power, only, target);
    case Coder::kMirrored:
      return dequantize_to<Coder::kMirrored>(packed_tile, layout, codec, power, only, target);
    case Coder::kFp8E4M3:
      return dequantize_to<Coder::kFp8E4M3>(packed_tile, layout, codec, power, only, target);
    case Coder::kFp8E5M2:
      return dequantize_to<Coder::kFp8E5M2>(packed_tile, layout, codec, power, only, target);
    case Coder::kHalf:
      return dequantize_to<Coder::kHalf>(packed_tile, layout, codec, power, only, target);
    case Coder::kBrain:
      return dequantize_to<Coder::kBrain>(packed_tile, layout, codec, power, only, target);
  }
}

void dequantize_tile(const std::byte* packed_tile, const Layout& layout, const Codec& codec,
                     float power, const TargetTile& target) {
  dequantize_row(packed_tile, layout, codec, power, -1, target);
}

// ---- scanning and widening ----------------------------------------------------------------------

std::int64_t first_nonfinite(const void* data, DType dtype, std::int64_t count) {
  const auto* at = static_cast<const unsigned char*>(data);
  const int bytes = dtype == DType::kFloat32 ? 4 : 2;
  const auto bad = [&](std::int64_t i) {
    if (bytes == 4) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, at + 4 * i, 4);
      return (bits & 0x7f800000u) == 0x7f800000u;
    }
    std::uint16_t bits;
    __builtin_memcpy(&bits, at + 2 * i, 2);
    const unsigned top = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
    return (bits & top) == top;
  };
  constexpr int kBlockBytes = 1024;
  const std::int64_t block = kBlockBytes / bytes;
  std::int64_t i = 0;
  for (; i + block <= count; i += block) {
    const unsigned char* p = at + i * bytes;
    V::prefetch(reinterpret_cast<const char*>(p) + 4096);
    const bool clean = bytes == 4                 ? V::finite32(p, kBlockBytes)
                       : dtype == DType::kFloat16 ? V::finite16(p, kBlockBytes, 0x7c00)
                                                  : V::finite16(p, kBlockBytes, 0x7f80);
    if (!clean) break;
  }
  for (; i < count; ++i) {
    if (bad(i)) return i;
  }
  return -1;
}

template <DType kDType>
void widen_as(const void* data, std::int64_t count, float* out) {
  const char* at = static_cast<const char*>(data);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) V::store(out + i, load<kDType>(at + i * kElementBytes<kDType>));
  if (i < count) {
    alignas(64) char in[64] = {};
    alignas(64) float rest[16];
    const auto left = static_cast<std::size_t>(count - i);
    __builtin_memcpy(in, at + i * kElementBytes<kDType>, left * kElementBytes<kDType>);
    V::store(rest, load<kDType>(in));
    __builtin_memcpy(out + i, rest, left * 4);
  }
}

void widen(const void* data, DType dtype, std::int64_t count, float* out) {
  if (dtype == DType::kFloat16) return widen_as<DType::kFloat16>(data, count, out);
  if (dtype == DType::kBFloat16) return widen_as<DType::kBFloat16>(data, count, out);
  return widen_as<DType::kFloat32>(data, count, out);
}

template <DType kDType>
void widen_columns_as(const void* data, std::int64_t col_stride, std::int64_t cols, float* out,
                      std::int64_t out_stride) {
  const char* at = static_cast<const char*>(data);
  for (std::int64_t i = 0; i < cols; i += 16) {
    B u[16];
    for (int j = 0; j < 16; ++j) {
      u[j] = V::zero_bytes();
      if (i + j < cols) {
        u[j] = V::as_bytes(load<kDType>(at + (i + j) * col_stride * kElementBytes<kDType>));
      }
    }
    V::transpose(u);
    for (int r = 0; r < 16; ++r) {
      auto* row = reinterpret_cast<unsigned char*>(out + r * out_stride + i);
      if (i + 16 <= cols) {
        V::store_bytes(row, u[r]);
      } else {
        alignas(64) unsigned char rest[64];
        V::store_bytes(rest, u[r]);
        __builtin_memcpy(row, rest, static_cast<std::size_t>(cols - i) * 4);
      }
    }
  }
}

void widen_columns(const void* data, DType dtype, std::int64_t col_stride, std::int64_t cols,
                   float* out, std::int64_t out_stride) {
  if (dtype == DType::kFloat16) {
    return widen_columns_as<DType::kFloat16>(data, col_stride, cols, out, out_stride);
  }
  if (dtype == DType::kBFloat16) {
    return widen_columns_as<DType::kBFloat16>(data, col_stride, cols, out, out_stride);
  }
  return widen_columns_as<DType::kFloat32>(data, col_stride, cols, out, out_stride);
}

const QuantizeKernels kKernels = {
    V::kName, quantize_tile, dequantize_tile, dequantize_row, first_nonfinite, widen_columns, widen,
};

}  // namespace
}  // namespace lowbit::cpu
