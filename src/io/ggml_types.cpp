// ggml's types: one row each, and what their blocks mean. Products and sums are float32 in the
// order in which ggml computes them, so that values are equal to its own.
#include <algorithm>
#include <array>
#include <bit>
#include <string>
#include <vector>

#include "format/floats.h"
#include "io/ggml_blocks.h"
#include "io/ggml_grids.h"
#include "lowbit/error.h"
#include "reference/reference.h"

namespace lowbit {
namespace ggml {
namespace {

float half_at(const Byte* at) {
  return half_to_float(load16(at));
}

// ---- blocks of 32 ------------------------------------------------------------------------------

void q4_0(const Byte* b, float* y) {
  Byte codes[32];
  read_nibbles(b + 2, 16, codes);
  for (int i = 0; i < 32; ++i) y[i] = half_at(b) * static_cast<float>(codes[i] - 8);
}

void q4_1(const Byte* b, float* y) {
  Byte codes[32];
  read_nibbles(b + 4, 16, codes);
  for (int i = 0; i < 32; ++i) y[i] = half_at(b) * static_cast<float>(codes[i]) + half_at(b + 2);
}

// Nibbles behind a word of their fifth bits.
void read_fives(const Byte* at, Byte* codes) {
  read_nibbles(at + 4, 16, codes);
  const std::uint32_t high = load32(at);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<Byte>(codes[i] | (high >> i & 1) << 4);
}

void q5_0(const Byte* b, float* y) {
  Byte codes[32];
  read_fives(b + 2, codes);
  for (int i = 0; i < 32; ++i) y[i] = half_at(b) * static_cast<float>(codes[i] - 16);
}

void q5_1(const Byte* b, float* y) {
  Byte codes[32];
  read_fives(b + 4, codes);
  for (int i = 0; i < 32; ++i) y[i] = half_at(b) * static_cast<float>(codes[i]) + half_at(b + 2);
}

void q8_0(const Byte* b, float* y) {
  for (int i = 0; i < 32; ++i) y[i] = half_at(b) * static_cast<std::int8_t>(b[2 + i]);
}

constexpr std::int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};

void iq4_nl(const Byte* b, float* y) {
  Byte codes[32];
  read_nibbles(b + 2, 16, codes);
  for (int i = 0; i < 32; ++i) y[i] = half_at(b) * kIq4[codes[i]];
}

void mxfp4(const Byte* b, float* y) {
  // Twice E2M1 times half a power of two, which reaches further down than the power itself.
  constexpr float values[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.f, -1, -2, -3, -4, -6, -8, -12};
  const float scale = std::bit_cast<float>(b[0] < 2 ? 0x00200000u << b[0]
                                                    : static_cast<std::uint32_t>(b[0] - 1) << 23);
  Byte codes[32];
  read_nibbles(b + 1, 16, codes);
  for (int i = 0; i < 32; ++i) y[i] = scale * values[codes[i]];
}

// ---- super-blocks of 256 with scales of their own ----------------------------------------------

void q2_k(const Byte* b, float* y) {
  const Byte *scales = b, *codes = b + 16;
  const float d = half_at(b + 80), m = half_at(b + 82);
  for (int i = 0; i < 256; ++i) {
    const Byte scale = scales[i / 16];
    const int code = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    y[i] = d * static_cast<float>(scale & 15) * static_cast<float>(code) -
           m * static_cast<float>(scale >> 4);
  }
}

void q3_k(const Byte* b, float* y) {
  const Byte *high = b, *codes = b + 32, *scales = b + 96;
  const float d = half_at(b + 108);
  float ds[16];
  for (int s = 0; s < 16; ++s) {
    const int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
    ds[s] = d * static_cast<float>((low | (scales[8 + s % 4] >> (s / 4 * 2) & 3) << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    int code = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    if ((high[i % 32] >> (i / 32) & 1) == 0) code -= 4;
    y[i] = ds[i / 16] * static_cast<float>(code);
  }
}

// The 6-bit scales and minima of the eight groups of Q4_K and Q5_K.
struct Sixes {
  float scales[8], minima[8];
  explicit Sixes(const Byte* block) {
    const float d = half_at(block), m = half_at(block + 2);
    const Byte* q = block + 4;
    for (int j = 0; j < 4; ++j) {
      scales[j] = d * static_cast<float>(q[j] & 63);
      minima[j] = m * static_cast<float>(q[j + 4] & 63);
      scales[j + 4] = d * static_cast<float>((q[j + 8] & 15) | (q[j] >> 6) << 4);
      minima[j + 4] = m * static_cast<float>(q[j + 8] >> 4 | (q[j + 4] >> 6) << 4);
    }
  }
};

void q4_k(const Byte* b, float* y) {
  const Sixes sixes(b);
  for (int i = 0; i < 256; ++i) {
    const int g = i / 32;
    const int code = b[16 + i / 64 * 32 + i % 32] >> (g % 2 * 4) & 15;
    y[i] = sixes.scales[g] * static_cast<float>(code) - sixes.minima[g];
  }
}

void q5_k(const Byte* b, float* y) {
  const Sixes sixes(b);
  const Byte *high = b + 16, *codes = b + 48;
  for (int i = 0; i < 256; ++i) {
    const int g = i / 32;
    const int code = (codes[i / 64 * 32 + i % 32] >> (g % 2 * 4) & 15) | (high[i % 32] >> g & 1)
                                                                             << 4;
    y[i] = sixes.scales[g] * static_cast<float>(code) - sixes.minima[g];
  }
}

void q6_k(const Byte* b, float* y) {
  const Byte *low = b, *high = b + 128, *scales = b + 192;
  const float d = half_at(b + 208);
  for (int i = 0; i < 256; ++i) {
    const int part = i % 128 / 32;  // four runs of 32 share the bytes of one half
    const int four = low[i / 128 * 64 + part % 2 * 32 + i % 32] >> (part / 2 * 4) & 15;
    const int two = high[i / 128 * 32 + i % 32] >> (part * 2) & 3;
    y[i] =
        d * static_cast<std::int8_t>(scales[i / 16]) * static_cast<float>((four | two << 4) - 32);
  }
}

void q8_k(const Byte* b, float* y) {
  const auto d = std::bit_cast<float>(load32(b));
  for (int i = 0; i < 256; ++i) y[i] = d * static_cast<std::int8_t>(b[4 + i]);
}

void iq4_xs(const Byte* b, float* y) {
  const std::uint16_t high = load16(b + 2);
  for (int g = 0; g < 8; ++g) {
    const int scale = (b[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> (2 * g) & 3) << 4;
    const float ds = half_at(b) * static_cast<float>(scale - 32);
    Byte codes[32];
    read_nibbles(b + 8 + 16 * g, 16, codes);
    for (int i = 0; i < 32; ++i) y[32 * g + i] = ds * kIq4[codes[i]];
  }
}

// ---- code tables -------------------------------------------------------------------------------

constexpr float kGrid2[4] = {8, 25, 43, 0};  // the last digit does not occur
constexpr float kGrid3[8] = {4, 12, 20, 28, 36, 44, 52, 62};

// The eight signs that seven bits stand for: the eighth makes their number even.
unsigned even_signs(std::uint32_t seven) {
  seven &= 127;
  return seven | (static_cast<unsigned>(std::popcount(seven)) & 1u) << 7;
}

// Eight elements of a table in base 4.
void put_eight(float scale, std::uint16_t entry, unsigned signs, float* y) {
  for (int j = 0; j < 8; ++j) {
    y[j] = scale * kGrid2[entry >> (2 * j) & 3] * ((signs >> j & 1) != 0 ? -1.0f : 1.0f);
  }
}

void iq2_xxs(const Byte* b, float* y) {
  for (int g = 0; g < 8; ++g) {
    const Byte* at = b + 2 + 8 * g;
    const std::uint32_t word = load32(at + 4);
    const float scale = half_at(b) * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
    for (int l = 0; l < 4; ++l) {
      put_eight(scale, kGridIq2Xxs[at[l]], even_signs(word >> (7 * l)), y + 32 * g + 8 * l);
    }
  }
}

// The scale of a run of 16 whose 4 bits are in a nibble.
float nibble_scale(float d, const Byte* scales, int run) {
  return d * (0.5f + static_cast<float>(scales[run / 2] >> (run % 2 * 4) & 15)) * 0.25f;
}

void iq2_xs(const Byte* b, float* y) {
  for (int e = 0; e < 32; ++e) {
    const std::uint16_t code = load16(b + 2 + 2 * e);
    put_eight(nibble_scale(half_at(b), b + 66, e / 2), kGridIq2Xs[code & 511],
              even_signs(code >> 9), y + 8 * e);
  }
}

void iq2_s(const Byte* b, float* y) {
  for (int e = 0; e < 32; ++e) {
    const int code = b[2 + e] | (b[66 + e / 4] >> (e % 4 * 2) & 3) << 8;
    put_eight(nibble_scale(half_at(b), b + 74, e / 2), kGridIq2S[code], b[34 + e], y + 8 * e);
  }
}

void iq3_xxs(const Byte* b, float* y) {
  for (int g = 0; g < 8; ++g) {
    const std::uint32_t word = load32(b + 66 + 4 * g);
    const float scale = half_at(b) * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
    for (int i = 0; i < 32; ++i) {
      const std::uint16_t entry = kGridIq3Xxs[b[2 + 8 * g + i / 4]];
      const bool negative = (even_signs(word >> (i / 8 * 7)) >> (i % 8) & 1) != 0;
      y[32 * g + i] = scale * kGrid3[entry >> (i % 4 * 3) & 7] * (negative ? -1.0f : 1.0f);
    }
  }
}

void iq3_s(const Byte* b, float* y) {
  const Byte *codes = b + 2, *high = b + 66, *signs = b + 74, *scales = b + 106;
  for (int e = 0; e < 64; ++e) {
    const int g = e / 8;
    const float scale =
        half_at(b) * static_cast<float>(1 + 2 * (scales[g / 2] >> (g % 2 * 4) & 15));
    const std::uint16_t entry = kGridIq3S[codes[e] | (high[g] >> (e % 8) & 1) << 8];
    for (int j = 0; j < 4; ++j) {
      const bool negative = (signs[e / 2] >> (e % 2 * 4 + j) & 1) != 0;
      y[4 * e + j] =
          scale * static_cast<float>(1 + 2 * (entry >> (3 * j) & 7)) * (negative ? -1.0f : 1.0f);
    }
  }
}

void put_ternary(float scale, std::uint16_t entry, bool negative, float* y) {
  const float delta = negative ? -0.125f : 0.125f;
  for (int j = 0; j < 8; ++j) {
    y[j] = scale * (static_cast<float>((entry >> (2 * j) & 3) - 1) + delta);
  }
}

void iq1_s(const Byte* b, float* y) {
  for (int e = 0; e < 32; ++e) {
    const std::uint16_t word = load16(b + 34 + e / 4 * 2);
    const float scale = half_at(b) * static_cast<float>(2 * (word >> 12 & 7) + 1);
    const int code = b[2 + e] | (word >> (e % 4 * 3) & 7) << 8;
    put_ternary(scale, kGridIq1S[code], (word & 0x8000) != 0, y + 8 * e);
  }
}

void iq1_m(const Byte* b, float* y) {
  const Byte *codes = b, *high = b + 32, *scales = b + 48;
  std::uint16_t half = 0;  // the scale of all is in the top bits of the four words of scales
  for (int w = 0; w < 4; ++w) half |= static_cast<std::uint16_t>(scales[2 * w + 1] >> 4 << (4 * w));
  for (int e = 0; e < 32; ++e) {
    const int run = e / 2;  // of 16 elements
    const int three = load16(scales + run / 4 * 2) >> (run % 4 * 3) & 7;
    const float scale = half_to_float(half) * static_cast<float>(2 * three + 1);
    const int nibble = high[e / 2] >> (e % 2 * 4) & 15;
    put_ternary(scale, kGridIq1S[codes[e] | (nibble & 7) << 8], (nibble & 8) != 0, y + 8 * e);
  }
}

void tq1_0(const Byte* b, float* y) {
  Byte codes[256];
  read_tq1_codes(b, codes);
  for (int i = 0; i < 256; ++i) y[i] = half_at(b + 52) * static_cast<float>(codes[i] - 1);
}

void tq2_0(const Byte* b, float* y) {
  Byte codes[256];
  read_tq2_codes(b, codes);
  for (int i = 0; i < 256; ++i) y[i] = half_at(b + 64) * static_cast<float>(codes[i] - 1);
}

// ---- plain elements ----------------------------------------------------------------------------

void f32(const Byte* b, float* y) {
  *y = std::bit_cast<float>(load32(b));
}
void f16(const Byte* b, float* y) {
  *y = half_at(b);
}
void bf16(const Byte* b, float* y) {
  *y = bfloat16_to_float(load16(b));
}
void f64(const Byte* b, float* y) {
  const std::uint64_t bits = load32(b) | static_cast<std::uint64_t>(load32(b + 4)) << 32;
  *y = static_cast<float>(std::bit_cast<double>(bits));
}

using Unpack = void (*)(const Byte* block, float* values);
struct Row {
  GgmlTypeInfo info;
  Unpack unpack;  // nullptr: no values
};

constexpr std::optional<Format> kNo = std::nullopt;
constexpr Row row(std::uint32_t number, std::string_view name, int elems, int bytes, Unpack unpack,
                  std::optional<Format> exact = kNo, int group = 0) {
  return {{number, name, elems, bytes, unpack != nullptr, exact, group}, unpack};
}

constexpr std::array kTypes = {
    row(0, "F32", 1, 4, f32),
    row(1, "F16", 1, 2, f16, Format::kFp16),
    row(2, "Q4_0", 32, 18, q4_0, Format::kSymInt4, 32),
    row(3, "Q4_1", 32, 20, q4_1, Format::kAsymInt4, 32),
    row(6, "Q5_0", 32, 22, q5_0, Format::kSymInt5, 32),
    row(7, "Q5_1", 32, 24, q5_1, Format::kAsymInt5, 32),
    row(8, "Q8_0", 32, 34, q8_0, Format::kSymInt8, 32),
    row(10, "Q2_K", 256, 84, q2_k),
    row(11, "Q3_K", 256, 110, q3_k),
    row(12, "Q4_K", 256, 144, q4_k),
    row(13, "Q5_K", 256, 176, q5_k),
    row(14, "Q6_K", 256, 210, q6_k),
    row(15, "Q8_K", 256, 292, q8_k),
    row(16, "IQ2_XXS", 256, 66, iq2_xxs),
    row(17, "IQ2_XS", 256, 74, iq2_xs),
    row(18, "IQ3_XXS", 256, 98, iq3_xxs),
    row(19, "IQ1_S", 256, 50, iq1_s),
    row(20, "IQ4_NL", 32, 18, iq4_nl),
    row(21, "IQ3_S", 256, 110, iq3_s),
    row(22, "IQ2_S", 256, 82, iq2_s),
    row(23, "IQ4_XS", 256, 136, iq4_xs),
    row(24, "I8", 1, 1, nullptr),
    row(25, "I16", 1, 2, nullptr),
    row(26, "I32", 1, 4, nullptr),
    row(27, "I64", 1, 8, nullptr),
    row(28, "F64", 1, 8, f64),
    row(29, "IQ1_M", 256, 56, iq1_m),
    row(30, "BF16", 1, 2, bf16, Format::kBf16),
    row(34, "TQ1_0", 256, 54, tq1_0, Format::kSymInt4, 256),
    row(35, "TQ2_0", 256, 66, tq2_0, Format::kSymInt4, 256),
    row(39, "MXFP4", 32, 17, mxfp4, Format::kFp4, 32),
};
constexpr std::size_t kCount = kTypes.size();

const Row* find_row(std::uint32_t number) {
  const auto found = std::find_if(kTypes.begin(), kTypes.end(),
                                  [number](const Row& row) { return row.info.number == number; });
  return found == kTypes.end() ? nullptr : &*found;
}

[[noreturn]] void fail(const char* who, const std::string& text) {
  throw Error(ErrorCode::kValue, std::string(who) + ": " + text);
}

}  // namespace

void read_tq1_codes(const Byte* block, Byte* codes) {
  // Digits of base 3, the highest first, as the fraction byte / 256.
  static constexpr int powers[5] = {1, 3, 9, 27, 81};
  const auto digit = [](Byte byte, int n) {
    return static_cast<Byte>(static_cast<Byte>(byte * powers[n]) * 3 >> 8);
  };
  for (int i = 0; i < 160; ++i) codes[i] = digit(block[i % 32], i / 32);
  for (int i = 0; i < 80; ++i) codes[160 + i] = digit(block[32 + i % 16], i / 16);
  for (int i = 0; i < 16; ++i) codes[240 + i] = digit(block[48 + i % 4], i / 4);
}

void read_tq2_codes(const Byte* block, Byte* codes) {
  for (int i = 0; i < 256; ++i) codes[i] = block[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
}

void check_matrix(const char* who, const GgmlMatrix& matrix, std::span<const std::int64_t> rows) {
  const GgmlTypeInfo& type = ggml_type_info(matrix.type);
  constexpr std::int64_t most = std::int64_t{1} << 56;
  if (matrix.n < 0 || matrix.k < 0 || matrix.k % type.block_elems != 0 ||
      (matrix.k > 0 && matrix.n > most / matrix.k)) {
    fail(who, "a matrix of " + std::to_string(matrix.n) + " rows of " + std::to_string(matrix.k) +
                  " elements cannot be made of " + std::string(type.name) + " blocks of " +
                  std::to_string(type.block_elems));
  }
  const std::int64_t bytes = matrix.n * (matrix.k / type.block_elems) * type.block_bytes;
  if (matrix.blocks.size() != static_cast<std::size_t>(bytes)) {
    fail(who, std::to_string(matrix.n) + " rows of " + std::to_string(matrix.k) + " elements are " +
                  std::to_string(bytes) + " bytes of " + std::string(type.name) + ", got " +
                  std::to_string(matrix.blocks.size()));
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || rows[i] >= matrix.n) {
      fail(who, "expected rows from 0 to " + std::to_string(matrix.n - 1) + ", got " +
                    std::to_string(rows[i]) + " at position " + std::to_string(i));
    }
  }
}

}  // namespace ggml

std::span<const GgmlTypeInfo> ggml_types() {
  static constexpr auto infos = [] {
    std::array<GgmlTypeInfo, ggml::kCount> all{};
    for (std::size_t i = 0; i < ggml::kCount; ++i) all[i] = ggml::kTypes[i].info;
    return all;
  }();
  return infos;
}

const GgmlTypeInfo* find_ggml_type(std::uint32_t number) {
  const ggml::Row* row = ggml::find_row(number);
  return row == nullptr ? nullptr : &row->info;
}

const GgmlTypeInfo& ggml_type_info(std::uint32_t number) {
  if (const GgmlTypeInfo* info = find_ggml_type(number)) return *info;
  throw Error(ErrorCode::kValue, "ggml type " + std::to_string(number) +
                                     " is not known; was it written by a newer llama.cpp?");
}

void ggml_dequantize(const GgmlMatrix& matrix, std::span<const std::int64_t> rows,
                     const MutableMatrixView& out, const Threads& threads) {
  ggml::check_matrix("ggml_dequantize", matrix, rows);
  const ggml::Row& row = *ggml::find_row(matrix.type);
  const std::int64_t count = rows.empty() ? matrix.n : static_cast<std::int64_t>(rows.size());
  if (row.unpack == nullptr) {
    ggml::fail("ggml_dequantize", std::string(row.info.name) + " holds no weights");
  }
  if (out.rows != count || out.cols != matrix.k) {
    ggml::fail("ggml_dequantize", "expected an output of " + std::to_string(count) + " x " +
                                      std::to_string(matrix.k) + ", got " +
                                      std::to_string(out.rows) + " x " + std::to_string(out.cols));
  }
  static_cast<void>(dtype_bytes(out.dtype));  // throws for a dtype that is not float
  const std::int64_t blocks = matrix.k / row.info.block_elems;
  const bool direct = out.dtype == DType::kFloat32 && out.col_stride == 1;
  threads.run(count, [&](std::int64_t i) {
    const std::int64_t from = rows.empty() ? i : rows[static_cast<std::size_t>(i)];
    const ggml::Byte* block =
        ggml::bytes_of(matrix.blocks.data()) + from * blocks * row.info.block_bytes;
    std::vector<float> own(direct ? 0 : static_cast<std::size_t>(matrix.k));
    float* values = direct ? static_cast<float*>(out.data) + i * out.row_stride : own.data();
    for (std::int64_t b = 0; b < blocks; ++b) {
      row.unpack(block + b * row.info.block_bytes, values + b * row.info.block_elems);
    }
    if (direct) return;
    for (std::int64_t k = 0; k < matrix.k; ++k) {
      reference::set_element(out, i, k, own[static_cast<std::size_t>(k)]);
    }
  });
}

}  // namespace lowbit
