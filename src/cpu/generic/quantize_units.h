// Step 4 of quantize_simd.h: codes of 16 rows to the units of a packed tile, and back.
#pragma once

#include <cstdint>

#include "cpu/generic/quantize_load.h"

namespace lowbit::cpu {
namespace {

constexpr int kChunk = 256;  // largest group; also the step of formats without groups

// Codes of one chunk, row by row, one byte (16-bit formats: two) each.
struct Staging {
  alignas(64) unsigned char bytes[16 * kChunk * 2];
};

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

// Units out of words: word j of 16 rows is 4 codes of 8 bits or 2 of 16, a row's in 32 bits.
template <int kBits>
struct Units {
  static constexpr int kBytes = kBits == 16 ? 2 : 1;  // of a code in a word
  static constexpr int kLowBits = kBits == 5   ? 4
                                  : kBits == 3 ? 2
                                               : kBits;           // beside the plane of single bits
  static constexpr int kShared = kBits == 16 ? 1 : 8 / kLowBits;  // words that share a unit

  static std::int64_t plane_at(int inputs) { return inputs / 4 / kShared * 64; }

  // Words j to j + kShared - 1. kPast: past the caches.
  template <bool kPast>
  [[gnu::always_inline]] static void put(const B* u, int j, unsigned char* out,
                                         unsigned char* plane) {
    [[maybe_unused]] constexpr char kMask = static_cast<char>((1 << kLowBits % 8) - 1);
    B unit = u[0];
    if constexpr (kShared == 2) {
      const B low = kBits == 4 ? u[0] : V::and_bytes(u[0], kMask);
      const B high = kBits == 4 ? u[1] : V::and_bytes(u[1], kMask);
      unit = V::or_bytes(low, V::template shift_bytes_left<4>(high));
    }
    if constexpr (kShared == 4) {
      const auto two = [&](int k) {
        return V::or_bytes(V::and_bytes(u[k], kMask),
                           V::template shift_bytes_left<2>(V::and_bytes(u[k + 1], kMask)));
      };
      unit = V::or_bytes(two(0), V::template shift_bytes_left<4>(two(2)));
    }
    unsigned char* to = out + j / kShared * 64;
    if constexpr (kPast) {
      V::stream_bytes(to, unit);
    } else {
      V::store_bytes(to, unit);
    }
    if constexpr (kBits == 5 || kBits == 3) {
      for (int k = 0; k < kShared; ++k) {
        const std::uint64_t word = V::template bit_of_bytes<kLowBits>(u[k]);
        __builtin_memcpy(plane + (j + k) * 8, &word, 8);
      }
    }
  }
};

// Units of `inputs` inputs (a multiple of 32) from the staging block to their place.
template <int kBits>
inline void pack_units(const Staging& staging, int inputs, unsigned char* out) {
  using Is = Units<kBits>;
  // Reading the lines that codes of 8 and 16 bits replace would take as long as reading the
  // weights.
  constexpr bool kPast = kBits >= 8;
  const int used = inputs * Is::kBytes;
  unsigned char* plane = out + Is::plane_at(inputs);
  for (int column = 0; column < used; column += 64) {
    B u[16];
    for (int r = 0; r < 16; ++r) {
      u[r] = V::load_bytes(staging.bytes + r * kChunk * Is::kBytes + column);
    }
    V::transpose(u);
    // Apart, so that indices are constants and u stays in registers.
    if (used - column >= 64) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; j += Is::kShared)
        Is::template put<kPast>(u + j, column / 4 + j, out, plane);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j += Is::kShared)
        Is::template put<kPast>(u + j, column / 4 + j, out, plane);
    }
  }
}

inline void pack_units(const Staging& staging, int bits, int inputs, unsigned char* out) {
  if (bits == 3) return pack_units<3>(staging, inputs, out);
  if (bits == 4) return pack_units<4>(staging, inputs, out);
  if (bits == 5) return pack_units<5>(staging, inputs, out);
  if (bits == 8) return pack_units<8>(staging, inputs, out);
  return pack_units<16>(staging, inputs, out);
}

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

}  // namespace
}  // namespace lowbit::cpu
