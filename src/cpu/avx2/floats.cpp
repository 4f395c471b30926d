// Float formats: multiply-add in float32 on exact weights.
//
// A tile is 16 rows: two vectors of 8. Up to three tokens use what was converted for them; more go
// over the tile again, from L1 or L2.
#include "cpu/avx2/f32.h"
#include "cpu/generic/ymm_paths.h"

namespace lowbit::cpu {
namespace {

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

template <Format F, int kCount>
void tile_float(const std::byte* tile, const float* x, std::int64_t k_padded,
                const Epilogue& epilogue, std::int64_t token, std::int64_t tile_index) {
  constexpr bool kRowScale = F == Format::kFp8E4M3 || F == Format::kFp8E5M2;
  constexpr int kQuadBytes = kRowScale ? 64 : 128;
  const std::byte* codes = tile + (kRowScale ? kUnitBytes : 0);
  // bf16: [half of the rows][even, odd input]. Halves: [quarter of the rows], lanes (row, input of
  // the pair), summed in pairs at the end.
  __m256 sum[kCount][4];
  unroll<kCount * 4>([&](auto i) LOWBIT_LAMBDA { sum[i / 4][i % 4] = _mm256_setzero_ps(); });
  for (std::int64_t quad = 0; quad < k_padded / 4; ++quad) {
    unroll<kQuadBytes / 64>(
        [&](auto i) LOWBIT_LAMBDA { prefetch_ahead(codes + quad * kQuadBytes + i * 64); });
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
    epilogue.store(token + t, tile_index, rows);
  });
}

template <Format F>
void run_float(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
               std::int64_t token_end, std::int64_t, std::byte*) {
  const Epilogue epilogue{rows, F == Format::kFp8E4M3 ? 256.0f : 1.0f};
  constexpr int kCount = 3;  // 12 sums of 16 registers
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += kCount) {
      const float* x = reinterpret_cast<const float*>(a.data) + t * a.k_padded;
      const std::int64_t left = token_end - t;
      unroll<kCount>([&](auto i) LOWBIT_LAMBDA {
        if (left == i + 1 || (i + 1 == kCount && left > kCount)) {
          tile_float<F, i + 1>(bytes, x, a.k_padded, epilogue, first_token + t, tile);
        }
      });
    }
  }
}

template <Format F>
constexpr Path float_path(const char* name) {
  constexpr bool kQuad = F == Format::kFp8E4M3 || F == Format::kFp8E5M2;
  return {name,
          kQuad ? "avx2.f32.quad" : "avx2.f32",
          float_activation_bytes,
          prepare_float<kQuad>,
          no_scratch,
          run_float<F>,
          1,
          3,
          false};
}

constexpr Path kFloats[4] = {
    float_path<Format::kFp8E4M3>("avx2.fp32.fp8_e4m3"),
    float_path<Format::kFp8E5M2>("avx2.fp32.fp8_e5m2"),
    float_path<Format::kFp16>("avx2.fp32.fp16"),
    float_path<Format::kBf16>("avx2.fp32.bf16"),
};

}  // namespace

const Path* avx2::floats(Format format) {
  const int i = static_cast<int>(format) - static_cast<int>(Format::kFp8E4M3);
  if (i < 0 || i > 3) return nullptr;
  return &kFloats[i];
}

}  // namespace lowbit::cpu
