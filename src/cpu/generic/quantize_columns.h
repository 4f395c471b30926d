// Quantizing rows that lie side by side (a transposed view): the 16 rows of a tile are 16
// neighbours in memory, one lane each, for every input. That is the order of packed words, so
// nothing is transposed or summed across lanes. Included by quantize_simd.h.
//
// A strip is up to kStripLines cache lines of every column, 16 (float32) or 32 rows each, and a
// chunk those of one group (formats without groups: kColumnStep or kRowScaleStep inputs). Columns
// are often a multiple of 4 KiB apart, so that few of them fit the same cache together: a chunk is
// copied to contiguous memory, which finds the extremes as well, and encoded from there. Three
// chunks are on their way at a time, so that memory is never idle: between the tiles of one that is
// encoded the columns of a later one are copied, between its units the lines of the next one are
// fetched. The order of chunks:
//   most formats            all strips of a group, then the next group: each column is a stream
//                           that hardware prefetchers follow. Copied one chunk ahead
//   one scale for each row  all chunks of a strip, then the next strip. Copied a strip ahead, whose
//                           extremes are known then
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/generic/quantize_coder.h"
#include "cpu/generic/quantize_encode.h"
#include "cpu/generic/quantize_fp8.h"
#include "cpu/generic/quantize_load.h"
#include "cpu/generic/quantize_scales.h"
#include "cpu/generic/quantize_units.h"

namespace lowbit::cpu {
namespace {

constexpr int kStripLines = 4;
constexpr int kColumnStep = 64;
constexpr int kRowScaleStep = 32;
// A strip is narrower where its copy would not stay in the second-level cache.
constexpr std::int64_t kCopiedBytes = 1 << 20;

// How a call walks over its source.
struct ColumnPlan {
  int lines;            // of a strip
  int step;             // inputs of a chunk
  std::int64_t chunks;  // of a strip
  std::int64_t strips;
  std::int64_t lag;  // chunks from copying to encoding

  ColumnPlan(const SourceColumns& source, const Layout& layout) {
    const FormatInfo& info = format_info(layout.format);
    const bool row_scale = info.scale_kind == ScaleKind::kRow;
    step = info.grouped() ? layout.group_size : row_scale ? kRowScaleStep : kColumnStep;
    chunks = (source.cols + step - 1) / step;
    lines = kStripLines;
    while (row_scale && lines > 1 && chunks * step * lines * 64 > kCopiedBytes) lines /= 2;
    strips = (source.rows + rows(source) - 1) / rows(source);
    lag = row_scale ? chunks : 1;
  }
  std::int64_t rows(const SourceColumns& source) const {  // of a strip
    return lines * (source.dtype == DType::kFloat32 ? 16 : 32);
  }
  std::int64_t copy_bytes() const { return std::int64_t{step} * lines * 64; }
};

// Extremes of a line's rows while a chunk (strip) is copied, as bits: of 16 floats or 32 words.
template <Coder kCoder, DType kDType>
struct LineExtremes {
  static constexpr bool kWords = kDType != DType::kFloat32;
  static constexpr bool kSigned = kCoder == Coder::kSymmetric;
  static constexpr bool kBoth = kCoder == Coder::kMinimum;

  // The key as in find_extremes, or (kBoth) the largest and the smallest, of floats with the key of
  // magnitudes besides. kBoth of words: signed integers in the order of the floats, of which NaN
  // and infinities are the ends.
  static constexpr int kCount = kBoth ? (kWords ? 2 : 3) : 1;
  static constexpr int kKey = kCount - 1;
  B held[kCount];

  void start() {
    held[kKey] = V::zero_bytes();
    if constexpr (kBoth) {
      held[0] =
          kWords ? V::set_int(static_cast<int>(0x80008000u)) : V::bits(V::set(-__builtin_inff()));
      held[1] = kWords ? V::set_int(0x7fff7fff) : V::bits(V::set(__builtin_inff()));
    }
  }
  [[gnu::always_inline]] static void add(B (&held)[kCount], B v) {
    if constexpr (kWords && kBoth) {
      const B ordered = V::flip_negative_words(v);
      held[0] = V::max_signed_words(held[0], ordered);
      held[1] = V::min_signed_words(held[1], ordered);
    } else if constexpr (kWords) {
      held[kKey] = V::max_words(
          held[kKey], kSigned ? V::rotate_words_left1(v) : V::and_(v, V::set_int(0x7fff7fff)));
    } else {
      held[kKey] = V::max_unsigned(
          held[kKey], kSigned ? V::rotate_left1(v) : V::and_(v, V::set_int(0x7fffffff)));
      if constexpr (kBoth) {
        held[0] = V::bits(V::max(V::from_bits(held[0]), V::from_bits(v)));
        held[1] = V::bits(V::min(V::from_bits(held[1]), V::from_bits(v)));
      }
    }
  }
  // Of the first or second 16 rows.
  Extremes of(int half) const {
    const auto floats = [half](B v) {
      alignas(64) unsigned char words[64];
      V::store_bytes(words, v);
      return load<kDType>(reinterpret_cast<const char*>(words) + half * 32);
    };
    Extremes e;
    if constexpr (kBoth) {
      e.max = floats(kWords ? V::flip_negative_words(held[0]) : held[0]);
      e.min = floats(kWords ? V::flip_negative_words(held[1]) : held[1]);
    }
    if constexpr (kBoth && kWords) {
      e.magnitude = V::max_bits(V::abs(e.max), V::abs(e.min));
    } else if constexpr (kSigned) {
      e.furthest =
          floats(kWords ? V::rotate_words_right1(held[kKey]) : V::rotate_right1(held[kKey]));
      e.magnitude = V::abs(e.furthest);
    } else {
      e.magnitude = floats(held[kKey]);
    }
    return e;
  }
};

template <Coder kCoder, DType kDType>
class ColumnQuantizer {
 public:
  ColumnQuantizer(const SourceColumns& source, const Layout& layout, const Codec& codec,
                  std::byte* packed, std::byte* workspace)
      : source_(source),
        layout_(layout),
        codec_(codec),
        bounds_(codec),
        plan_(source, layout),
        column_bytes_(source.col_stride * kBytes),
        packed_(reinterpret_cast<unsigned char*>(packed)),
        copies_(reinterpret_cast<unsigned char*>(workspace)) {
    range_.start();
    V::store(scales_[0].minimum, V::set(0.0f));
    for (Scales& scales : scales_) scales = scales_[0];
  }

  void run(reference::ScaleRange* out_range) {
    const std::int64_t total = plan_.strips * plan_.chunks;
    Place to_copy = start();
    fetched_ = start();
    advance(&fetched_);
    for (std::int64_t i = 0; i < plan_.lag; ++i) {
      copy(to_copy, 0, 1);
      advance(&to_copy);
      advance(&fetched_);
    }
    Place at = start();
    for (std::int64_t i = 0; i < total; ++i) {
      const bool more = i + plan_.lag < total;
      fetch_from_start();
      for (int tile = 0; tile < at.tiles; ++tile) {
        if (more) copy(to_copy, tile, at.tiles);
        encode(at, tile);
      }
      advance(&at);
      if (more) advance(&to_copy);
      if (i + plan_.lag + 1 < total) advance(&fetched_);
    }
    V::finish_streams();
    range_.report(out_range);
  }

 private:
  static constexpr int kBytes = kElementBytes<kDType>;
  static constexpr int kLineRows = 64 / kBytes;
  static constexpr int kLineTiles = kLineRows / 16;
  using Most = LineExtremes<kCoder, kDType>;

  // A chunk of a strip.
  struct Place {
    std::int64_t strip, chunk;
    int rows, tiles, lines;  // of the strip
    int logical, padded;     // inputs of the chunk
    int slot;                // which copy
  };

  Place start() const {
    Place place{0, 0, 0, 0, 0, 0, 0, 0};
    enter_strip(&place);
    enter_chunk(&place);
    return place;
  }
  void enter_strip(Place* place) const {
    const std::int64_t rows = plan_.rows(source_), left = source_.rows - place->strip * rows;
    place->rows = static_cast<int>(left < rows ? left : rows);
    place->tiles = (place->rows + 15) / 16;
    place->lines = (place->rows + kLineRows - 1) / kLineRows;
  }
  void enter_chunk(Place* place) const {
    const std::int64_t left = source_.cols - place->chunk * plan_.step;
    place->logical = static_cast<int>(left < plan_.step ? left : plan_.step);
    place->padded = (place->logical + 31) / 32 * 32;
  }
  void advance(Place* place) const {
    place->slot = place->slot < plan_.lag ? place->slot + 1 : 0;
    if (kRowScale<kCoder>) {
      if (++place->chunk == plan_.chunks) {
        place->chunk = 0;
        ++place->strip;
      }
    } else if (++place->strip == plan_.strips) {
      place->strip = 0;
      ++place->chunk;
    }
    enter_strip(place);
    enter_chunk(place);
  }

  const char* address(std::int64_t strip, std::int64_t col) const {
    return static_cast<const char*>(source_.data) + strip * plan_.lines * 64 + col * column_bytes_;
  }
  unsigned char* copy_of(const Place& place) const {
    return copies_ + place.slot * plan_.copy_bytes();
  }
  // Extremes of formats with a scale per row belong to a strip, of which two are on their way.
  Most* most_of(const Place& place) {
    return most_[(kRowScale<kCoder> ? place.strip : place.slot) % 2];
  }

  void fetch_from_start() {
    fetched_at_ = address(fetched_.strip, fetched_.chunk * plan_.step);
    fetched_line_ = fetched_input_ = 0;
  }
  // Fetches lines of a chunk to the second level: as many as hold what is encoded meanwhile.
  template <int kLines>
  [[gnu::always_inline]] void fetch() {
    for (int i = 0; i < kLines; ++i) {
      V::prefetch(fetched_at_ + fetched_line_ * 64);
      if (++fetched_line_ < fetched_.lines) continue;
      fetched_line_ = 0;
      if (++fetched_input_ < fetched_.logical) fetched_at_ += column_bytes_;
    }
  }

  // Part `part` of `parts` of a chunk's columns.
  [[gnu::noinline]] void copy(const Place& place, int part, int parts) {
    const int begin = place.logical * part / parts, end = place.logical * (part + 1) / parts;
    const std::int64_t first = place.chunk * plan_.step;
    const int line_bytes = plan_.step * 64;
    unsigned char* to = copy_of(place);
    Most* most = most_of(place);
    if (part == 0 && (!kRowScale<kCoder> || place.chunk == 0)) {
      for (int line = 0; line < place.lines; ++line) most[line].start();
    }
    const char* from = address(place.strip, first);
    const int whole = place.rows / kLineRows;
    // A few lines at a time, as many as registers hold the extremes of.
    const auto copy_lines = [&](auto lines, int line) {
      B extremes[lines][Most::kCount];
      for (int l = 0; l < lines; ++l) {
        for (int i = 0; i < Most::kCount; ++i) extremes[l][i] = most[line + l].held[i];
      }
      const char* at = from + begin * column_bytes_ + line * 64;
      unsigned char* copied = to + line * line_bytes + begin * 64;
      for (int i = begin; i < end; ++i) {
        for (int l = 0; l < lines; ++l) {
          const B v = V::load_bytes(reinterpret_cast<const unsigned char*>(at) + l * 64);
          V::store_bytes(copied + l * line_bytes, v);
          Most::add(extremes[l], v);
        }
        at += column_bytes_;
        copied += 64;
      }
      for (int l = 0; l < lines; ++l) {
        for (int i = 0; i < Most::kCount; ++i) most[line + l].held[i] = extremes[l][i];
      }
    };
    constexpr int kTogether = Most::kCount == 1 ? V::kLinesTogether : V::kLinesTogether / 2;
    int line = 0;
    for (; line + kTogether <= whole; line += kTogether) {
      copy_lines(std::integral_constant<int, kTogether>{}, line);
    }
    for (; line < whole; ++line) copy_lines(std::integral_constant<int, 1>{}, line);
    if (whole < place.lines) {
      // Rows that pad the line repeat the last one; what comes of them is overwritten.
      const int rows = place.rows - whole * kLineRows;
      for (int i = begin; i < end; ++i) {
        unsigned char* padded = to + whole * line_bytes + i * 64;
        __builtin_memcpy(padded, from + i * column_bytes_ + whole * 64,
                         static_cast<std::size_t>(rows) * kBytes);
        for (int r = rows; r < kLineRows; ++r) {
          __builtin_memcpy(padded + r * kBytes, padded + (rows - 1) * kBytes, kBytes);
        }
        Most::add(most[whole].held, V::load_bytes(padded));
      }
    }
    if (part + 1 == parts) {
      const std::size_t rest = static_cast<std::size_t>(place.padded - place.logical) * 64;
      for (int line = 0; line < place.lines; ++line) {
        __builtin_memset(to + line * line_bytes + place.logical * 64, 0, rest);
      }
    }
  }

  void encode(const Place& place, int tile) {
    const int rows = place.rows - tile * 16 < 16 ? place.rows - tile * 16 : 16;
    const std::int64_t tile_index = place.strip * plan_.rows(source_) / 16 + tile;
    unsigned char* out = packed_ + tile_index * layout_.tile_bytes;
    Scales& scales = scales_[tile];
    if (!kRowScale<kCoder> || place.chunk == 0) {
      const Extremes e = most_of(place)[tile / kLineTiles].of(tile % kLineTiles);
      if constexpr (kGroupScale<kCoder>) choose_scales<kCoder>(codec_, e, &range_, &scales);
      if constexpr (kRowScale<kCoder>) {
        choose_row_scales(codec_, e.magnitude, rows, &range_, &scales, out);
      }
      if constexpr (kWide<kCoder>) {
        range_.magnitude = range_.largest = V::max_bits(range_.magnitude, e.magnitude);
      }
    }
    const char* from = reinterpret_cast<const char*>(copy_of(place)) +
                       tile / kLineTiles * plan_.step * 64 + tile % kLineTiles * 32;
    if constexpr (kGroupScale<kCoder>) {
      for (int r = rows; r < 16; ++r) scales.scale_half[r] = scales.minimum_half[r] = 0;
      put_scales<kCoder>(scales, layout_, place.chunk, out);
      out += layout_.codes_offset(place.chunk);
    } else {
      constexpr int kHead = kRowScale<kCoder> ? 64 : 0, kCodeBytes = kWide<kCoder> ? 2 : 1;
      out += kHead + place.chunk * plan_.step * 16 * kCodeBytes;
    }
    const auto encode_as = [&](auto divides) {
      switch (codec_.bits) {
        case 3:
          return encode_units<3, divides>(place, rows, from, scales, out);
        case 4:
          return encode_units<4, divides>(place, rows, from, scales, out);
        case 5:
          return encode_units<5, divides>(place, rows, from, scales, out);
        case 8:
          return encode_units<8, divides>(place, rows, from, scales, out);
        case 16:
          return encode_units<16, divides>(place, rows, from, scales, out);
      }
    };
    if (kRowScale<kCoder> && scales.divides) {
      encode_as(std::bool_constant<kRowScale<kCoder>>{});
    } else {
      encode_as(std::false_type{});
    }
  }

  template <int kBits, bool kDivides>
  [[gnu::noinline]] void encode_units(const Place& place, int rows, const char* from,
                                      const Scales& scales, unsigned char* out) {
    // Coders whose codes have that many bits.
    constexpr bool kPossible = kWide<kCoder>                                    ? kBits == 16
                               : kRowScale<kCoder> || kCoder == Coder::kInteger ? kBits == 8
                               : kCoder == Coder::kSymmetric || kCoder == Coder::kMinimum
                                   ? kBits == 4 || kBits == 5
                               : kCoder == Coder::kMirrored ? kBits == 4
                                                            : kBits == 3 || kBits == 4;
    if constexpr (kPossible) {
      using Is = Units<kBits>;
      constexpr int kWordInputs = 4 / Is::kBytes;
      const Divisor by{V::load(scales.inverse), V::load(scales.inverse_rest),
                       V::load(scales.divisor), V::load(scales.minimum)};
      const auto codes = [&](int input) {
        return encode_weights<kCoder, kDivides>(codec_, by, load<kDType>(from + input * 64));
      };
      unsigned char* plane = out + Is::plane_at(place.padded);
      const bool ragged = rows < 16 || place.logical < place.padded;
      constexpr int kInputs = kWordInputs * Is::kShared;  // of a unit
      for (int i = 0; i < place.padded; i += kInputs) {
        B u[Is::kShared];
        for (int s = 0; s < Is::kShared; ++s) {
          const int input = i + s * kWordInputs;
          if constexpr (kWide<kCoder>) {
            u[s] = V::or_(codes(input), V::template shift_left<16>(codes(input + 1)));
          } else {
            u[s] = narrow<kCoder, Order::kLanes>(codec_, bounds_, codes(input), codes(input + 1),
                                                 codes(input + 2), codes(input + 3));
          }
          if (ragged) u[s] = with_padding<Is::kBytes>(u[s], rows, place.logical - input);
        }
        // Lines of a tile's group are alone between those of others: fetched first, they would be
        // waited for.
        Is::template put<true>(u, i / kWordInputs, out, plane);
        fetch<kInputs / kLineTiles>();
      }
    }
  }

  // Overwrites what padding must be: rows from `rows` on, inputs from `inputs` on.
  template <int kCodeBytes>
  [[gnu::noinline]] B with_padding(B word, int rows, int inputs) const {
    alignas(64) unsigned char bytes[64];
    V::store_bytes(bytes, word);
    for (int r = 0; r < 16; ++r) {
      for (int i = r >= rows || inputs < 0 ? 0 : inputs; i < 4 / kCodeBytes; ++i) {
        __builtin_memcpy(bytes + r * 4 + i * kCodeBytes, &codec_.padding_code, kCodeBytes);
      }
    }
    return V::load_bytes(bytes);
  }

  const SourceColumns& source_;
  const Layout& layout_;
  const Codec& codec_;
  const Bounds bounds_;
  const ColumnPlan plan_;
  const std::int64_t column_bytes_;
  unsigned char* const packed_;
  unsigned char* const copies_;
  Place fetched_;  // the chunk whose lines are fetched, and where
  const char* fetched_at_;
  int fetched_line_, fetched_input_;
  Range range_;
  Most most_[2][kStripLines];
  Scales scales_[kStripLines * kLineTiles];
};

std::int64_t columns_workspace(const SourceColumns& source, const Layout& layout) {
  const ColumnPlan plan(source, layout);
  return (plan.lag + 1) * plan.copy_bytes();
}

template <Coder kCoder>
void quantize_columns_from(const SourceColumns& source, const Layout& layout, const Codec& codec,
                           std::byte* packed, std::byte* workspace, reference::ScaleRange* range) {
  switch (source.dtype) {
    case DType::kFloat16:
      return ColumnQuantizer<kCoder, DType::kFloat16>(source, layout, codec, packed, workspace)
          .run(range);
    case DType::kBFloat16:
      return ColumnQuantizer<kCoder, DType::kBFloat16>(source, layout, codec, packed, workspace)
          .run(range);
    default:
      return ColumnQuantizer<kCoder, DType::kFloat32>(source, layout, codec, packed, workspace)
          .run(range);
  }
}

void quantize_columns(const SourceColumns& source, const Layout& layout, const Codec& codec,
                      std::byte* packed, std::byte* workspace, reference::ScaleRange* range) {
  with_coder(codec.coder, [&](auto coder) {
    quantize_columns_from<coder>(source, layout, codec, packed, workspace, range);
  });
}

}  // namespace
}  // namespace lowbit::cpu
