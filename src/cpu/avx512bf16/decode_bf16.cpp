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

constexpr std::int64_t kPrefetch = 4096;  // as in avx512vnni/decode_int.cpp

// A block of nt tokens: [planes][k_padded / 2 pairs][nt][2] bf16. fp8 pairs inputs (0, 2) and (1,
// 3) of a quad, bf16 (0, 1) and (2, 3): the order in which the weights' bytes unpack.
LOWBIT_INLINE std::int64_t plane_bytes(const Activations& a, std::int64_t tokens) {
  return align64(a.k_padded * tokens * 2);
}

template <int kPlanes, int kTokens>
std::int64_t activation_bytes(const Activations& a) {
  const std::int64_t tokens = block_tokens(a.m, kTokens);
  return (a.m + tokens - 1) / tokens * kPlanes * plane_bytes(a, tokens);
}

template <int kPlanes, int kTokens, bool kQuadOrder>
void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t per_block = block_tokens(a.m, kTokens);
  const std::int64_t bytes = plane_bytes(a, per_block);
  const __m256i order =
      kQuadOrder ? _mm256_set_epi16(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0)
                 : _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / per_block;
    const std::int64_t left = a.m - block * per_block;
    const std::int64_t nt = left < per_block ? left : per_block;
    std::byte* to = a.data + block * kPlanes * bytes + (t - block * per_block) * 4;
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      __m512 x = load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k);
      unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
        const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
        alignas(32) std::uint32_t pairs[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs),
                           _mm256_permutexvar_epi16(order, bits));
        for (int i = 0; i < 8; ++i) {
          __builtin_memcpy(to + p * bytes + (k / 2 + i) * nt * 4, &pairs[i], 4);
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

template <Format F>
struct Pairs {
  Fp8Floats<F> floats;
  static constexpr bool kQuadOrder = true;
  static constexpr std::int64_t kBlockBytes = 512;
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, __m512i (&out)[2]) const {
    floats.template pairs<I>(codes, block, out[0], out[1]);
  }
};
template <>
struct Pairs<Format::kBf16> {
  static constexpr bool kQuadOrder = false;
  static constexpr std::int64_t kBlockBytes = 1024;
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, __m512i (&out)[2]) const {
    out[0] = load_unit(codes + block * kBlockBytes + I * 128);
    out[1] = load_unit(codes + block * kBlockBytes + I * 128 + 64);
  }
};

template <Format F, int kPlanes, int kCount>
void tile_bf16(const Pairs<F>& pairs, const std::byte* tile, std::int64_t k_padded,
               const std::byte* x, std::int64_t bytes, const Epilogue& epilogue, std::int64_t token,
               std::int64_t tile_index) {
  const std::byte* codes = tile + (kHasRowScale<F> ? kUnitBytes : 0);
  // One chain per plane and pair: vdpbf16ps has a latency of six cycles.
  constexpr int kChains = kCount <= 4 ? 2 : 1;
  __m512 sum[kCount][kPlanes][kChains];
  unroll<kCount * kPlanes * kChains>([&](auto i) LOWBIT_LAMBDA {
    sum[i / (kPlanes * kChains)][i / kChains % kPlanes][i % kChains] = _mm512_setzero_ps();
  });
  for (std::int64_t b = 0; b < k_padded / kInputBlock; ++b) {
    unroll<static_cast<int>(Pairs<F>::kBlockBytes / 64)>([&](auto i) LOWBIT_LAMBDA {
      _mm_prefetch(
          reinterpret_cast<const char*>(codes + b * Pairs<F>::kBlockBytes + i * 64 + kPrefetch),
          _MM_HINT_T0);
    });
    unroll<8>([&](auto i) LOWBIT_LAMBDA {
      __m512i weights[2];
      pairs.template quad<i>(codes, b, weights);
      unroll<2>([&](auto j) LOWBIT_LAMBDA {
        unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
          unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
            int word;
            __builtin_memcpy(&word, x + p * bytes + ((i * 2 + j) * kCount + t) * 4, 4);
            __m512& to = sum[t][p][j % kChains];
            to = _mm512_dpbf16_ps(to, (__m512bh)_mm512_set1_epi32(word), (__m512bh)weights[j]);
          });
        });
      });
    });
    x += 16 * kCount * 4;
  }
  const __m512 scale = row_scales<F>(tile);
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    __m512 total = _mm512_setzero_ps();
    unroll<kPlanes * kChains>([&](auto i) LOWBIT_LAMBDA {
      // The small parts first.
      total = _mm512_add_ps(total, sum[t][kPlanes - 1 - i / kChains][i % kChains]);
    });
    epilogue.store(token + t, tile_index, _mm512_mul_ps(total, scale));
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
          prepare<kPlanes, kTokens, Pairs<F>::kQuadOrder>,
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
