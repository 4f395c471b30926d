// Up to a few dozen tokens, formats whose values are bf16 values: fp8 and bf16 itself. Weights are
// exact; activations are rounded to bf16 (one plane) or split into a bf16 and the bf16 of what it
// leaves (two planes, 16 bits). vdpbf16ps multiplies two inputs per lane.
//
// A tile (16 rows, all inputs) is read once per block of up to 8 tokens, from memory the first time
// and from L2 after that.
#include "cpu/generic/avx512_floats.h"
#include "cpu/generic/avx512_paths.h"

namespace lowbit::cpu {
namespace {

// A block of nt tokens: [planes][k_padded / kStep][nt][kStep] bf16, see Pairs.
LOWBIT_INLINE std::int64_t plane_bytes(const Activations& a, std::int64_t tokens) {
  return align64(a.k_padded * tokens * 2);
}

template <int kPlanes, int kTokens>
std::int64_t activation_bytes(const Activations& a) {
  const std::int64_t tokens = block_tokens(a.m, kTokens);
  return (a.m + tokens - 1) / tokens * kPlanes * plane_bytes(a, tokens);
}

template <int kPlanes, int kTokens, int kStep>
void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t per_block = block_tokens(a.m, kTokens);
  const std::int64_t bytes = plane_bytes(a, per_block);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / per_block;
    const std::int64_t left = a.m - block * per_block;
    const std::int64_t nt = left < per_block ? left : per_block;
    std::byte* to = a.data + block * kPlanes * bytes + (t - block * per_block) * kStep * 2;
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      __m512 x = load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k);
      unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
        const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
        alignas(32) std::uint16_t values[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(values), bits);
        for (int i = 0; i < 16; i += kStep) {
          __builtin_memcpy(to + p * bytes + (k + i) * nt * 2, &values[i], kStep * 2);
        }
        if constexpr (p + 1 < kPlanes) {
          const __m512 rounded =
              _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
          // A non-finite activation leaves nothing: its first part carries it.
          const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(rounded),
                                                      _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
          x = _mm512_maskz_sub_ps(finite, x, rounded);
        }
      });
    }
  }
}

// A quad (16 rows x 4 inputs) as two operands of vdpbf16ps, and what multiplies them.
//   fp8: bytes interleaved within 128-bit lanes. Lanes of the first hold the inputs (0, 1), (2, 3)
//        of rows 0 and 1 of every four rows, those of the second of rows 2 and 3; both meet the
//        same four activations, repeated. Separating inputs (0, 2) from (1, 3) instead, so that a
//        lane is a row, takes two shifts and two vpternlogd in place of the interleaving: 1.7
//        times slower.
//   bf16: inputs (0, 1), then (2, 3), a lane a row.
template <Format F>
struct Pairs {
  static constexpr int kStep = 4;
  static constexpr std::int64_t kBlockBytes = 512;
  Fp8Floats<F> floats;

  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, __m512i (&out)[2]) const {
    __m512i low, high;
    floats.template bytes<I>(codes, block, low, high);
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
  }
  LOWBIT_INLINE static __m512i broadcast(const std::byte* x, int) {
    long long four;
    __builtin_memcpy(&four, x, 8);
    return _mm512_set1_epi64(four);
  }
  LOWBIT_INLINE static __m512 total(__m512 first, __m512 second) {
    return _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88),
                         _mm512_shuffle_ps(first, second, 0xdd));
  }
};
template <>
struct Pairs<Format::kBf16> {
  static constexpr int kStep = 2;
  static constexpr std::int64_t kBlockBytes = 1024;

  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, __m512i (&out)[2]) const {
    out[0] = load_unit(codes + block * kBlockBytes + I * 128);
    out[1] = load_unit(codes + block * kBlockBytes + I * 128 + 64);
  }
  LOWBIT_INLINE static __m512i broadcast(const std::byte* x, int offset) {
    int two;
    __builtin_memcpy(&two, x + offset, 4);
    return _mm512_set1_epi32(two);
  }
  LOWBIT_INLINE static __m512 total(__m512 first, __m512 second) {
    return _mm512_add_ps(first, second);
  }
};

template <Format F, int kPlanes, int kCount>
void tile_bf16(const Pairs<F>& pairs, const std::byte* tile, std::int64_t k_padded,
               const std::byte* x, std::int64_t bytes, const Epilogue& epilogue, std::int64_t token,
               std::int64_t tile_index) {
  constexpr int kStep = Pairs<F>::kStep;
  const std::byte* codes = tile + (kHasRowScale<F> ? kUnitBytes : 0);
  // A chain per plane and operand, two where there are few: vdpbf16ps has a latency of six cycles.
  constexpr int kChains = kCount * kPlanes <= 2 ? 2 : 1;
  __m512 sum[kCount][kPlanes][kChains][2];
  unroll<kCount * kPlanes>([&](auto i) LOWBIT_LAMBDA {
    unroll<kChains * 2>([&](auto c) LOWBIT_LAMBDA {
      sum[i / kPlanes][i % kPlanes][c / 2][c % 2] = _mm512_setzero_ps();
    });
  });
  for (std::int64_t b = 0; b < k_padded / kInputBlock; ++b) {
    unroll<8>([&](auto i) LOWBIT_LAMBDA {
      prefetch_quad<i, Pairs<F>::kBlockBytes>(codes + b * Pairs<F>::kBlockBytes);
      __m512i weights[2];
      pairs.template quad<i>(codes, b, weights);
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
          unroll<2>([&](auto j) LOWBIT_LAMBDA {
            const std::byte* from = x + p * bytes + (i * 4 * kCount + t * kStep) * 2;
            const __m512i value = Pairs<F>::broadcast(from, j * 4 * kCount);
            __m512& to = sum[t][p][i % kChains][j];
            to = _mm512_dpbf16_ps(to, (__m512bh)value, (__m512bh)weights[j]);
          });
        });
      });
    });
    x += 64 * kCount;
  }
  const __m512 scale = row_scales<F>(tile);
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    unroll<kPlanes * kChains>([&](auto i) LOWBIT_LAMBDA {
      // The small parts first.
      unroll<2>([&](auto j) LOWBIT_LAMBDA {
        total[j] = _mm512_add_ps(total[j], sum[t][kPlanes - 1 - i / kChains][i % kChains][j]);
      });
    });
    const __m512 all = Pairs<F>::total(total[0], total[1]);
    epilogue.store(token + t, tile_index, _mm512_mul_ps(all, scale));
  });
}

std::int64_t no_scratch(const RowBlock&, const Activations&) {
  return 0;
}

template <Format F, int kPlanes, int kTokens>
void run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
         std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
         std::int64_t token_end, std::int64_t, std::byte*) {
  const Pairs<F> pairs;
  const Epilogue epilogue(rows, 1.0f);
  const std::int64_t per_block = block_tokens(a.m, kTokens);
  const std::int64_t bytes = plane_bytes(a, per_block);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* from = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += per_block) {
      const std::byte* x = a.data + t / per_block * kPlanes * bytes;
      const std::int64_t left = token_end - t;
      const std::int64_t nt = left < per_block ? left : per_block;
      unroll<kTokens>([&](auto i) LOWBIT_LAMBDA {
        if (nt == i + 1) {
          tile_bf16<F, kPlanes, i + 1>(pairs, from, a.k_padded, x, bytes, epilogue, first_token + t,
                                       tile);
        }
      });
    }
  }
}

template <Format F, int kPlanes>
constexpr Path path(const char* name, const char* activations) {
  constexpr int kTokens = kPlanes == 1 ? 8 : 4;
  return {name,
          activations,
          activation_bytes<kPlanes, kTokens>,
          prepare<kPlanes, kTokens, Pairs<F>::kStep>,
          no_scratch,
          run<F, kPlanes, kTokens>,
          1,
          1,
          false};
}

constexpr Path kPaths[3] = {
    path<Format::kFp8E4M3, 1>("avx512bf16.bf16.decode.fp8_e4m3", "avx512.bf16.t8.quad"),
    path<Format::kFp8E5M2, 1>("avx512bf16.bf16.decode.fp8_e5m2", "avx512.bf16.t8.quad"),
    path<Format::kBf16, 1>("avx512bf16.bf16.decode.bf16", "avx512.bf16.t8"),
};
constexpr Path kPaths2[2] = {
    path<Format::kFp8E4M3, 2>("avx512bf16.bf16x2.decode.fp8_e4m3", "avx512.bf16x2.t4.quad"),
    path<Format::kFp8E5M2, 2>("avx512bf16.bf16x2.decode.fp8_e5m2", "avx512.bf16x2.t4.quad"),
};

}  // namespace

namespace avx512 {

const Path* decode_bf16(Format format) {
  if (format == Format::kFp8E4M3) return &kPaths[0];
  if (format == Format::kFp8E5M2) return &kPaths[1];
  return format == Format::kBf16 ? &kPaths[2] : nullptr;
}

const Path* decode_bf16x2(Format format) {
  if (format == Format::kFp8E4M3) return &kPaths2[0];
  return format == Format::kFp8E5M2 ? &kPaths2[1] : nullptr;
}

}  // namespace avx512
}  // namespace lowbit::cpu
