// Rows of 16-bit weights to fp8, by a table.
//
// A row has one scale s, and the code of w / s, rounded as float32 and then to fp8, is a function
// of the weight. Twice the weight is a code one exponent higher, as long as nothing is subnormal:
// so it is enough to know the codes of one exponent's mantissas, of which bfloat16 has 128. float16
// has 1024, of which 8 neighbours have at most one step from a code to the next between them: steps
// are at least 1/16 of a mantissa apart.
//   code = entries[mantissa] + 2^M * (exponent - low)       M mantissa bits of the fp8
// What comes out as subnormal (or negative, below that), and subnormal halves, are encoded as rows
// without a table are, 64 weights at a time.
#pragma once

#include <cstdint>

#include "cpu/generic/quantize_coder.h"
#include "cpu/generic/quantize_encode.h"
#include "cpu/generic/quantize_load.h"
#include "cpu/generic/quantize_scales.h"

namespace lowbit::cpu {
namespace {

// Fewer inputs than this do not pay for a row's table.
template <DType kDType>
constexpr std::int64_t kTableInputs = kDType == DType::kBFloat16 ? 256 : 1024;

template <Coder kCoder, DType kDType>
constexpr bool kByTable = V::kByteTables&& kRowScale<kCoder>&& kDType != DType::kFloat32;

// The table of a row with a scale within bounds; of scale zero one that leaves every weight out.
template <Coder kCoder, DType kDType, class W = V>
void make_table(const Codec& codec, const Bounds& bounds, const Scales& scales, int r,
                Fp8Table* table) {
  constexpr bool kHalf = kDType == DType::kFloat16;
  constexpr int kMantissaBits = kCoder == Coder::kFp8E4M3 ? 3 : 2, kStep = 1 << kMantissaBits;
  if (scales.divisor[r] == 0) {
    __builtin_memset(table->entries, 0, sizeof(table->entries));
    table->low = 255;
    table->offset = 0;
    return;
  }
  std::uint32_t bits;
  __builtin_memcpy(&bits, &scales.divisor[r], 4);
  const int exponent = static_cast<int>(bits >> 23);  // of weights whose quotients are 1/2 to 2
  const Divisor by{V::set(scales.inverse[r]), V::set(scales.inverse_rest[r]),
                   V::set(scales.divisor[r]), V::set(0.0f)};
  // Codes of 16 weights with that exponent: their mantissas are those of `sixteen` plus one more.
  const auto codes_of = [&](int mantissa, const std::int32_t* sixteen) {
    const I weights = V::add(V::bits(V::load(reinterpret_cast<const float*>(sixteen))),
                             V::set_int((exponent << 23) + mantissa));
    return encode_weights<kCoder, false>(codec, by, V::from_bits(weights));
  };
  alignas(64) static constexpr std::int32_t kMantissas[16] = {
      0,       1 << 16, 2 << 16,  3 << 16,  4 << 16,  5 << 16,  6 << 16,  7 << 16,
      8 << 16, 9 << 16, 10 << 16, 11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16};
  alignas(64) unsigned char codes[192];
  for (int i = 0; i < 128; i += 64) {
    const auto sixteen = [&](int j) { return codes_of((i + j) << 16, kMantissas); };
    V::store_bytes(codes + i, narrow<kCoder, Order::kInputs>(codec, bounds, sixteen(0), sixteen(16),
                                                             sixteen(32), sixteen(48)));
  }
  // The highest exponent with nothing but subnormal codes, and by how much they differ there.
  const int below = codes[127] / kStep;
  const int low = exponent - (kHalf ? 127 - 15 : 0) - below;
  const int shift = -below * kStep;
  if constexpr (!kHalf) {
    for (int i = 0; i < 128; i += 64) {
      V::store_bytes(table->entries + i,
                     V::add_bytes(V::load_bytes(codes + i), V::set_bytes(shift)));
    }
    table->low = static_cast<std::uint8_t>(low);
    table->offset = 0;
  } else {
    // Eight times the code, and what makes the lowest three bits of the mantissa carry at a step.
    constexpr int kBias = 8;
    codes[128] = static_cast<unsigned char>(codes[0] + kStep);
    alignas(64) std::int32_t places[16] = {};
    int steps = 0;
    for (int i = 0; i < 128; i += 64) {
      V::store_bytes(table->entries + i,
                     V::template shift_bytes_left<3>(
                         V::add_bytes(V::load_bytes(codes + i), V::set_bytes(shift + kBias))));
      std::uint64_t differ = W::different_bytes(codes + i, codes + i + 1);
      for (; differ != 0 && steps < 16; differ &= differ - 1) {
        places[steps++] = (i + __builtin_ctzll(differ)) << 16;
      }
    }
    // How many of the 8 mantissas are behind the step, of all steps at once.
    I sum = V::set_int(0);
    for (int j = 1; j < 8; ++j) sum = V::add(sum, codes_of(j << 13, places));
    alignas(64) std::int32_t sums[16];
    V::store(reinterpret_cast<float*>(sums), V::from_bits(sum));
    for (int step = 0; step < steps; ++step) {
      const int place = places[step] >> 16;
      table->entries[place] =
          static_cast<std::uint8_t>(table->entries[place] + sums[step] - 7 * codes[place]);
    }
    table->low = static_cast<std::uint8_t>(low < 0 ? 0 : low * kStep);
    table->offset = static_cast<std::uint8_t>((low < 0 ? -low * kStep : 0) - kBias);
  }
}

// As encode_row.
template <Coder kCoder, DType kDType, class W = V>
void encode_row_by_table(const Codec& codec, const Bounds& bounds, const char* at, int inputs,
                         const Scales& scales, const Fp8Table& table, int r, unsigned char* codes) {
  constexpr int kMantissaBits = kCoder == Coder::kFp8E4M3 ? 3 : 2;
  unsigned left =
      W::template fp8_codes<kDType == DType::kFloat16, kMantissaBits>(table, at, inputs, codes);
  for (; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left) * 64;
    encode_row<kCoder, kDType, false>(codec, bounds, at + i * 2, inputs - i < 64 ? inputs - i : 64,
                                      scales, r, codes + i);
  }
}

// The largest magnitudes of 16 rows so far, words as they come.
struct WordExtremes {
  B rows[16];

  void start() {
    for (B& row : rows) row = V::zero_bytes();
  }
  template <DType kDType>
  void add(const char* const (&at)[16], std::int64_t begin, int inputs, std::int64_t ahead) {
    for (int r = 0; r < 16; ++r) {
      const char* row = at[r] + begin * 2;
      prefetch_row<kDType>(row + ahead, inputs);
      B most = rows[r];
      for (int i = 0; i < inputs; i += 32) {
        const B words = V::load_bytes(reinterpret_cast<const unsigned char*>(row + i * 2));
        most = V::max_words(most, V::and_(words, V::set_int(0x7fff7fff)));
      }
      rows[r] = most;
    }
  }
  template <DType kDType>
  F magnitude() const {
    F keys[16];
    for (int r = 0; r < 16; ++r) {
      alignas(64) unsigned char words[64];
      V::store_bytes(words, rows[r]);
      const char* at = reinterpret_cast<const char*>(words);
      keys[r] = V::max_bits(load<kDType>(at), load<kDType>(at + 32));
    }
    return V::reduce(keys, [](F a, F b) { return V::max_bits(a, b); });
  }
};

}  // namespace
}  // namespace lowbit::cpu
