// AVX2 linear kernels: every format, any number of tokens.
//
// Grouped formats: activations as int16 (|q| <= 127 * 256, so to absmax * 2^-16 as on the other
// levels), weights as bytes widened to 16 bits, vpmaddwd: exact integer sums per group whatever the
// precision asked for. The NormalFloats are one plane of table bytes in int8, else three planes of
// 24 bits in all, combined in float32 per group.
// Float formats: multiply-add in float32 on exact weights.
//
// A tile is 16 rows: two vectors of 8. Inputs of a quad lie in a row's four bytes; taking the even
// and the odd bytes gives 16-bit pairs (0, 2) and (1, 3), and the activations are stored that way.
// Up to four tokens use what was unpacked for them; more go over the tile again, from L1 or L2.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/generic/convert.h"
#include "cpu/linear_driver.h"
#include "cpu/linear_kernels.h"

#define LOWBIT_INLINE [[gnu::always_inline]] inline
#define LOWBIT_LAMBDA __attribute__((always_inline))

namespace lowbit::cpu {
namespace {

// As in generic/avx512.h: constant indices keep accumulators in registers.
template <class F, int... I>
LOWBIT_INLINE void unroll_sequence(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
LOWBIT_INLINE void unroll(F&& f) {
  unroll_sequence(f, std::make_integer_sequence<int, N>{});
}

constexpr std::int64_t kPrefetch = 4096;  // bytes ahead, as measured for avx512vnni
constexpr int kTokens = 4;

LOWBIT_INLINE __m256i load32(const std::byte* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

// ---- activations: int16 ---------------------------------------------------------------------
// Per token: [k_padded] int16 in quad order, [groups] step float32, [groups] sum of q int32.
struct IntRow {
  std::int64_t step_at, sum_at, stride;
  explicit IntRow(const Activations& a)
      : step_at(a.k_padded * 2),
        sum_at(step_at + a.groups * 4),
        stride((sum_at + a.groups * 4 + 63) / 64 * 64) {}
};

std::int64_t int_activation_bytes(const Activations& a) {
  return a.m * IntRow(a).stride;
}

void prepare_int(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  constexpr float kLevels = 127.0f * 256.0f;
  constexpr float kTiny = 0x1p-100f;  // such groups count as zero; 1 / step would overflow
  const IntRow sizes(a);
  constexpr int kOrder[4] = {0, 2, 1, 3};
  for (std::int64_t t = begin; t < end; ++t) {
    std::byte* row = a.data + t * sizes.stride;
    std::int16_t* q = reinterpret_cast<std::int16_t*>(row);
    float* steps = reinterpret_cast<float*>(row + sizes.step_at);
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(row + sizes.sum_at);
    for (std::int64_t g = 0; g < a.groups; ++g) {
      const std::int64_t k0 = g * a.group;
      const std::int64_t k1 = k0 + a.group < a.k_padded ? k0 + a.group : a.k_padded;
      alignas(32) float x[256];
      std::uint32_t top = 0;
      for (std::int64_t k = k0; k < k1; ++k) {
        x[k - k0] = k < a.k ? load_float(tokens.x, tokens.dtype, t * tokens.stride + k) : 0.0f;
      }
      for (std::int64_t i = 0; i < k1 - k0; ++i) {
        const std::uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
      }
      const float absmax = bits_to_float(top);
      const bool finite = top < 0x7f800000u;
      const bool zero = !finite || absmax < kTiny;
      const float inverse = zero ? 0.0f : kLevels / absmax;
      steps[g] = finite ? (zero ? 0.0f : absmax / kLevels) : __builtin_nanf("");
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < k1 - k0; i += 8) {
        alignas(32) std::int32_t value[8];
        const __m256 scaled = _mm256_mul_ps(_mm256_load_ps(x + i), _mm256_set1_ps(inverse));
        _mm256_store_si256(reinterpret_cast<__m256i*>(value),
                           zero ? _mm256_setzero_si256() : _mm256_cvtps_epi32(scaled));
        for (int j = 0; j < 8; ++j) {
          q[k0 + i + j] = static_cast<std::int16_t>(value[j / 4 * 4 + kOrder[j % 4]]);
          sum += value[j];
        }
      }
      sums[g] = sum;
    }
  }
}

// ---- codes to bytes -------------------------------------------------------------------------
// Rows 8h .. 8h + 7 of quad I of a block of 32 inputs: one code per byte.
template <int kBits>
struct Unpack;

LOWBIT_INLINE __m256i plane_bits(const std::byte* word) {
  // Byte j of the result: bit j of the word, as 0x00 or 0xff.
  std::int32_t bits;
  __builtin_memcpy(&bits, word, 4);
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(bits), _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2,
                                                2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m256i mask = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
}

template <>
struct Unpack<4> {
  static constexpr std::int64_t kBlockBytes = 256;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t, std::int64_t b, int h) {
    const __m256i unit = load32(codes + b * kBlockBytes + I / 2 * 64 + h * 32);
    return _mm256_and_si256(I % 2 == 0 ? unit : _mm256_srli_epi16(unit, 4), _mm256_set1_epi8(15));
  }
};
template <>
struct Unpack<5> {
  static constexpr std::int64_t kBlockBytes = 320;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t inputs, std::int64_t b,
                                    int h) {
    const __m256i fifth = plane_bits(codes + inputs * 8 + (b * 8 + I) * 8 + h * 4);
    return _mm256_or_si256(Unpack<4>::quad<I>(codes, inputs, b, h),
                           _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
  }
};
template <>
struct Unpack<3> {
  static constexpr std::int64_t kBlockBytes = 192;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t inputs, std::int64_t b,
                                    int h) {
    const __m256i unit = load32(codes + b * 128 + I / 4 * 64 + h * 32);
    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(unit, I % 4 * 2), _mm256_set1_epi8(3));
    const __m256i third = plane_bits(codes + inputs * 4 + (b * 8 + I) * 8 + h * 4);
    return _mm256_or_si256(low, _mm256_and_si256(third, _mm256_set1_epi8(4)));
  }
};
template <>
struct Unpack<8> {
  static constexpr std::int64_t kBlockBytes = 512;
  template <int I>
  LOWBIT_INLINE static __m256i quad(const std::byte* codes, std::int64_t, std::int64_t b, int h) {
    return load32(codes + b * kBlockBytes + I * 64 + h * 32);
  }
};

// kWeightPlanes: 0 = the code itself, 1 = one table of bytes, 3 = three.
// kZero: the byte (of the highest plane) that is taken out as "zero * sum of q".
template <Format F, int kWeightPlanes>
struct Facts {
  static constexpr int kBits = F == Format::kSymInt5 || F == Format::kAsymInt5 ? 5
                               : F == Format::kSymInt8                         ? 8
                               : F == Format::kNf3                             ? 3
                                                                               : 4;
  static constexpr bool kMinimum = F == Format::kAsymInt4 || F == Format::kAsymInt5;
  static constexpr int kZero = kWeightPlanes > 0       ? 128
                               : F == Format::kSymInt4 ? 8
                               : F == Format::kSymInt5 ? 16
                               : F == Format::kSymInt8 ? 128
                                                       : 0;
  static constexpr int kPlanes = kWeightPlanes == 3 ? 3 : 1;
  // Tokens that share unpacked weights: bounded by 16 registers.
  static constexpr int kCount = kPlanes == 3 ? 1 : kTokens;
};

struct Tables {
  __m256i plane[3];
  float value_scale;
};

template <Format F, int kWeightPlanes>
LOWBIT_INLINE Tables make_tables() {
  Tables tables{};
  tables.value_scale = 1.0f;
  if constexpr (kWeightPlanes > 0) {
    const auto codebook = format_info(F).codebook;
    const double scale = kWeightPlanes == 3  ? 1.0 / 8388607.0  // 2^23 - 1
                         : F == Format::kFp4 ? 0.5
                                             : 1.0 / 127;
    alignas(32) std::uint8_t bytes[3][32];
    for (int i = 0; i < 32; ++i) {
      const double v = codebook[static_cast<std::size_t>(i) % codebook.size()] / scale;
      const int rounded = static_cast<int>(v < 0 ? v - 0.5 : v + 0.5);
      if constexpr (kWeightPlanes == 3) {
        const int wide = rounded + (128 << 16);
        bytes[0][i] = static_cast<std::uint8_t>(wide >> 16);
        bytes[1][i] = static_cast<std::uint8_t>(wide >> 8);
        bytes[2][i] = static_cast<std::uint8_t>(wide);
      } else {
        bytes[0][i] = static_cast<std::uint8_t>(rounded + 128);
        bytes[1][i] = bytes[2][i] = 0;
      }
    }
    for (int p = 0; p < 3; ++p) {
      tables.plane[p] = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes[p]));
    }
    tables.value_scale = static_cast<float>(kWeightPlanes == 3 ? 65536.0 * scale : scale);
  }
  return tables;
}

struct Sink {
  const RowBlock& rows;
  float factor;

  // Sixteen sums of one token: rarely executed, so plain code.
  void store(std::int64_t token, std::int64_t tile, const __m256 (&sum)[2]) const {
    alignas(32) float values[16];
    _mm256_store_ps(values, sum[0]);
    _mm256_store_ps(values + 8, sum[1]);
    const std::int64_t row = tile * kTileRows;
    for (int r = 0; r < kTileRows && row + r < rows.layout.n; ++r) {
      float value = values[r] * factor;
      if (rows.exponent != 0) value = __builtin_ldexpf(value, rows.exponent);
      if (rows.bias != nullptr) value += load_float(rows.bias, rows.bias_dtype, row + r);
      store_float(rows.out, rows.out_dtype, token * rows.out_stride + row + r, value);
    }
  }
};

LOWBIT_INLINE __m256 load_halves(const std::byte* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

template <Format F, int kWeightPlanes, int kCount>
void tile_int(const Tables& tables, const Layout& layout, const std::byte* tile, const std::byte* x,
              const IntRow& sizes, const Sink& sink, std::int64_t token, std::int64_t tile_index) {
  using Is = Facts<F, kWeightPlanes>;
  using Codes = Unpack<Is::kBits>;
  __m256 total[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { total[i / 2][i % 2] = _mm256_setzero_ps(); });
  std::int64_t k0 = 0;
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    const std::int64_t inputs = layout.group_inputs(g);
    const std::byte* codes = tile + layout.codes_offset(g);
    const std::byte* scales = tile + layout.scales_offset(g);
    __m256i sum[kCount][2][Is::kPlanes];
    unroll<kCount * 2 * Is::kPlanes>([&](auto i) LOWBIT_LAMBDA {
      sum[i / (2 * Is::kPlanes)][i / Is::kPlanes % 2][i % Is::kPlanes] = _mm256_setzero_si256();
    });
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      unroll<static_cast<int>(Codes::kBlockBytes / 64)>([&](auto i) LOWBIT_LAMBDA {
        _mm_prefetch(
            reinterpret_cast<const char*>(codes + b * Codes::kBlockBytes + i * 64 + kPrefetch),
            _MM_HINT_T0);
      });
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        unroll<2>([&](auto h) LOWBIT_LAMBDA {
          const __m256i code = Codes::template quad<i>(codes, inputs, b, h);
          unroll<Is::kPlanes>([&](auto p) LOWBIT_LAMBDA {
            const __m256i bytes =
                kWeightPlanes == 0 ? code : _mm256_shuffle_epi8(tables.plane[p], code);
            const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
            const __m256i odd = _mm256_srli_epi16(bytes, 8);
            unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
              int pairs[2];
              __builtin_memcpy(pairs, x + t * sizes.stride + (k0 + b * 32 + i * 4) * 2, 8);
              __m256i& to = sum[t][h][p];
              to = _mm256_add_epi32(to, _mm256_madd_epi16(even, _mm256_set1_epi32(pairs[0])));
              to = _mm256_add_epi32(to, _mm256_madd_epi16(odd, _mm256_set1_epi32(pairs[1])));
            });
          });
        });
      });
    }
    unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
      float step;
      std::int32_t q_sum;
      __builtin_memcpy(&step, x + t * sizes.stride + sizes.step_at + g * 4, 4);
      __builtin_memcpy(&q_sum, x + t * sizes.stride + sizes.sum_at + g * 4, 4);
      // Wraps like the vectors do; the difference fits.
      const __m256i zero = _mm256_set1_epi32(static_cast<int>(
          static_cast<std::uint32_t>(Is::kZero) * static_cast<std::uint32_t>(q_sum)));
      unroll<2>([&](auto h) LOWBIT_LAMBDA {
        __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t][h][0], zero));
        if constexpr (Is::kPlanes == 3) {
          value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][h][1]), _mm256_set1_ps(0x1p-8f), value);
          value =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][h][2]), _mm256_set1_ps(0x1p-16f), value);
        }
        value = _mm256_mul_ps(value, _mm256_set1_ps(step));
        total[t][h] = _mm256_fmadd_ps(value, load_halves(scales + h * 16), total[t][h]);
        if constexpr (Is::kMinimum) {
          total[t][h] =
              _mm256_fmadd_ps(load_halves(scales + 32 + h * 16),
                              _mm256_set1_ps(step * static_cast<float>(q_sum)), total[t][h]);
        }
      });
    });
    k0 += inputs;
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA { sink.store(token + t, tile_index, total[t]); });
}

std::int64_t no_scratch(const RowBlock&, const Activations&) {
  return 0;
}

template <Format F, int kWeightPlanes>
void run_int(const RowBlock& rows, const Activations& a, std::int64_t first_token,
             std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
             std::int64_t token_end, std::int64_t, std::byte*) {
  constexpr int kCount = Facts<F, kWeightPlanes>::kCount;
  const Tables tables = make_tables<F, kWeightPlanes>();
  const IntRow sizes(a);
  const Sink sink{rows, tables.value_scale};
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += kCount) {
      const std::byte* x = a.data + t * sizes.stride;
      const std::int64_t left = token_end - t;
      unroll<kCount>([&](auto i) LOWBIT_LAMBDA {
        if (left == i + 1 || (i + 1 == kCount && left > kCount)) {
          tile_int<F, kWeightPlanes, i + 1>(tables, rows.layout, bytes, x, sizes, sink,
                                            first_token + t, tile);
        }
      });
    }
  }
}

// ---- float formats --------------------------------------------------------------------------
// Activations: [m][k_padded] float32; fp8 in quad order 0 2 1 3.
std::int64_t float_activation_bytes(const Activations& a) {
  return a.m * a.k_padded * 4;
}

template <bool kQuadOrder>
void prepare_float(const Tokens& tokens, const Activations& a, std::int64_t begin,
                   std::int64_t end) {
  constexpr int kOrder[4] = {0, 2, 1, 3};
  for (std::int64_t t = begin; t < end; ++t) {
    float* to = reinterpret_cast<float*>(a.data) + t * a.k_padded;
    for (std::int64_t k = 0; k < a.k_padded; ++k) {
      const std::int64_t from = kQuadOrder ? k / 4 * 4 + kOrder[k % 4] : k;
      to[k] = from < a.k ? load_float(tokens.x, tokens.dtype, t * tokens.stride + from) : 0.0f;
    }
  }
}

LOWBIT_INLINE __m256 bf16_low(__m256i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}
LOWBIT_INLINE __m256 bf16_high(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Four inputs of 16 rows as halves: vector [pair][half of the rows], each lane the two inputs of
// one row. e4m3 moved into fp16's fields is worth 2^-8 of itself, its subnormals included.
template <Format F>
LOWBIT_INLINE void quad_halves(const std::byte* codes, std::int64_t quad, __m256i (&out)[2][2]) {
  unroll<2>([&](auto h) LOWBIT_LAMBDA {
    if constexpr (F == Format::kFp16) {
      out[0][h] = load32(codes + quad * 128 + h * 32);
      out[1][h] = load32(codes + quad * 128 + 64 + h * 32);
    } else {
      const __m256i code = load32(codes + quad * 64 + h * 32);
      const __m256i even = _mm256_slli_epi16(code, 8);
      const __m256i odd = _mm256_and_si256(code, _mm256_set1_epi16(static_cast<short>(0xff00)));
      unroll<2>([&](auto p) LOWBIT_LAMBDA {
        const __m256i top = p == 0 ? even : odd;
        if constexpr (F == Format::kFp8E5M2) {
          out[p][h] = top;
        } else {
          const __m256i sign = _mm256_set1_epi16(static_cast<short>(0x8000));
          out[p][h] = _mm256_or_si256(_mm256_and_si256(top, sign),
                                      _mm256_srli_epi16(_mm256_andnot_si256(sign, top), 1));
        }
      });
    }
  });
}

template <Format F, int kCount>
void tile_float(const Layout& layout, const std::byte* tile, const float* x, std::int64_t k_padded,
                const Sink& sink, std::int64_t token, std::int64_t tile_index) {
  constexpr bool kRowScale = F == Format::kFp8E4M3 || F == Format::kFp8E5M2;
  constexpr int kQuadBytes = kRowScale ? 64 : 128;
  const std::byte* codes = tile + (kRowScale ? kUnitBytes : 0);
  // bf16: [half of the rows][even, odd input]. Halves: [quarter of the rows], lanes (row, input of
  // the pair), summed in pairs at the end.
  __m256 sum[kCount][4];
  unroll<kCount * 4>([&](auto i) LOWBIT_LAMBDA { sum[i / 4][i % 4] = _mm256_setzero_ps(); });
  for (std::int64_t quad = 0; quad < k_padded / 4; ++quad) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + quad * kQuadBytes + kPrefetch), _MM_HINT_T0);
    if constexpr (kQuadBytes == 128) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + quad * kQuadBytes + 64 + kPrefetch),
                   _MM_HINT_T0);
    }
    if constexpr (F == Format::kBf16) {
      unroll<2>([&](auto p) LOWBIT_LAMBDA {
        unroll<2>([&](auto h) LOWBIT_LAMBDA {
          const __m256i unit = load32(codes + quad * 128 + p * 64 + h * 32);
          const __m256 low = bf16_low(unit), high = bf16_high(unit);
          unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
            const float* at = x + t * k_padded + quad * 4 + p * 2;
            sum[t][2 * h] = _mm256_fmadd_ps(low, _mm256_broadcast_ss(at), sum[t][2 * h]);
            sum[t][2 * h + 1] =
                _mm256_fmadd_ps(high, _mm256_broadcast_ss(at + 1), sum[t][2 * h + 1]);
          });
        });
      });
    } else {
      __m256i halves[2][2];
      quad_halves<F>(codes, quad, halves);
      unroll<2>([&](auto p) LOWBIT_LAMBDA {
        unroll<4>([&](auto s) LOWBIT_LAMBDA {
          const __m128i part = s % 2 == 0 ? _mm256_castsi256_si128(halves[p][s / 2])
                                          : _mm256_extracti128_si256(halves[p][s / 2], 1);
          const __m256 weights = _mm256_cvtph_ps(part);
          unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
            const double* pair =
                reinterpret_cast<const double*>(x + t * k_padded + quad * 4 + p * 2);
            const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(pair));
            sum[t][s] = _mm256_fmadd_ps(weights, both, sum[t][s]);
          });
        });
      });
    }
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    __m256 rows[2];
    if constexpr (F == Format::kBf16) {
      rows[0] = _mm256_add_ps(sum[t][0], sum[t][1]);
      rows[1] = _mm256_add_ps(sum[t][2], sum[t][3]);
    } else {
      unroll<2>([&](auto h) LOWBIT_LAMBDA {
        // hadd works within 128-bit lanes: rows 0 1 4 5 | 2 3 6 7, put in order by quarters.
        const __m256 pairs = _mm256_hadd_ps(sum[t][2 * h], sum[t][2 * h + 1]);
        rows[h] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
        if constexpr (kRowScale) {
          rows[h] =
              _mm256_mul_ps(rows[h], _mm256_load_ps(reinterpret_cast<const float*>(tile + h * 32)));
        }
      });
    }
    sink.store(token + t, tile_index, rows);
  });
  (void)layout;
}

template <Format F>
void run_float(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
               std::int64_t token_end, std::int64_t, std::byte*) {
  const Sink sink{rows, F == Format::kFp8E4M3 ? 256.0f : 1.0f};
  constexpr int kCount = 3;  // 12 sums of 16 registers
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += kCount) {
      const float* x = reinterpret_cast<const float*>(a.data) + t * a.k_padded;
      const std::int64_t left = token_end - t;
      unroll<kCount>([&](auto i) LOWBIT_LAMBDA {
        if (left == i + 1 || (i + 1 == kCount && left > kCount)) {
          tile_float<F, i + 1>(rows.layout, bytes, x, a.k_padded, sink, first_token + t, tile);
        }
      });
    }
  }
}

// ---- paths ----------------------------------------------------------------------------------
// Panels in the driver's sense (dynamic shares of the rows) only in that tiles are used by many
// tokens; a decode call takes static shares.
template <Format F, int kWeightPlanes>
constexpr Path int_path(const char* name, bool many) {
  return {name,        "avx2.int16", int_activation_bytes,
          prepare_int, no_scratch,   run_int<F, kWeightPlanes>,
          1,           kTokens,      many};
}

template <Format F>
constexpr Path float_path(const char* name, bool many) {
  constexpr bool kQuad = F == Format::kFp8E4M3 || F == Format::kFp8E5M2;
  return {name,
          kQuad ? "avx2.f32.quad" : "avx2.f32",
          float_activation_bytes,
          prepare_float<kQuad>,
          no_scratch,
          run_float<F>,
          1,
          3,
          many};
}

template <bool kMany>
constexpr Path kInt16[kFormatCount] = {
    int_path<Format::kSymInt4, 0>("avx2.int16.sym_int4", kMany),
    int_path<Format::kAsymInt4, 0>("avx2.int16.asym_int4", kMany),
    int_path<Format::kSymInt5, 0>("avx2.int16.sym_int5", kMany),
    int_path<Format::kAsymInt5, 0>("avx2.int16.asym_int5", kMany),
    int_path<Format::kSymInt8, 0>("avx2.int16.sym_int8", kMany),
    int_path<Format::kNf3, 1>("avx2.int16.nf3", kMany),
    int_path<Format::kNf4, 1>("avx2.int16.nf4", kMany),
    int_path<Format::kFp4, 1>("avx2.int16.fp4", kMany),
    float_path<Format::kFp8E4M3>("avx2.fp32.fp8_e4m3", kMany),
    float_path<Format::kFp8E5M2>("avx2.fp32.fp8_e5m2", kMany),
    float_path<Format::kFp16>("avx2.fp32.fp16", kMany),
    float_path<Format::kBf16>("avx2.fp32.bf16", kMany),
};

template <bool kMany>
constexpr Path kWide[2] = {
    int_path<Format::kNf3, 3>("avx2.int16x3.nf3", kMany),
    int_path<Format::kNf4, 3>("avx2.int16x3.nf4", kMany),
};

}  // namespace

const Path* select_linear_avx2(const Layout& layout, Precision precision, std::int64_t m) {
  const Format format = layout.format;
  const bool many = m > 16;
  // Rounded codebooks only where int8 was asked for (or chosen by auto).
  if ((format == Format::kNf3 || format == Format::kNf4) &&
      resolve_precision(format, precision, m) != Precision::kInt8) {
    const int i = format == Format::kNf4 ? 1 : 0;
    return many ? &kWide<true>[i] : &kWide<false>[i];
  }
  const int i = static_cast<int>(format);
  return many ? &kInt16<true>[i] : &kInt16<false>[i];
}

}  // namespace lowbit::cpu
