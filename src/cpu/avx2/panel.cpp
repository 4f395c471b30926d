// Many tokens in float32: weights are expanded once per pass over the tokens.
//
// Four row tiles and a chunk of inputs become float32 ([tile][input][16 rows], 64 KiB in L2), and
// blocks of six tokens, whose activations stay in L1, are multiplied by one tile after the other:
// 6 x 2 sums, two weight vectors, a broadcast in 16 registers. Every chunk's sums start at zero and
// are added to those of the chunks before, in scratch.
#include "cpu/avx2/f32.h"
#include "cpu/generic/ymm_paths.h"

namespace lowbit::cpu {
namespace {

constexpr int kTokens = 6;
constexpr int kTiles = 4;
constexpr std::int64_t kChunk = 256;  // inputs
constexpr std::int64_t kTileBytes = kChunk * kTileRows * 4;

template <Format F>
inline constexpr bool kRowScale = F == Format::kFp8E4M3 || F == Format::kFp8E5M2;

// The NormalFloats, scales included.
template <Format F>
struct Expand {
  GroupWalk<false> walk;
  __m256 table[2];  // of eight entries each

  LOWBIT_INLINE explicit Expand(const Layout& layout) : walk(layout) {
    const auto codebook = format_info(F).codebook;
    table[0] = _mm256_loadu_ps(codebook.data());
    table[1] = _mm256_loadu_ps(codebook.data() + codebook.size() - 8);
  }
  // Inputs from k0 to k1 of a tile.
  void operator()(const std::byte* tile, std::int64_t k0, std::int64_t k1, float* to) const {
    using Codes = Unpack<Grouped<F>::kBits>;
    std::int64_t k = k0;
    while (k < k1) {
      const std::int64_t g = k / walk.group, start = g * walk.group, inputs = walk.inputs(g);
      const std::byte* codes = tile + walk.codes(g);
      const std::byte* scales = tile + walk.scales(g);
      const __m256 scale[2] = {load_halves(scales), load_halves(scales + 16)};
      const std::int64_t stop = start + inputs < k1 ? start + inputs : k1;
      for (std::int64_t b = (k - start) / kInputBlock; b < (stop - start) / kInputBlock; ++b) {
        unroll<8>([&](auto i) LOWBIT_LAMBDA {
          unroll<2>([&](auto h) LOWBIT_LAMBDA {
            const __m256i code = Codes::template quad<i>(codes, inputs, b, h);
            unroll<4>([&](auto j) LOWBIT_LAMBDA {
              const __m256i entry = _mm256_srli_epi32(code, 8 * j);
              __m256 value = _mm256_permutevar8x32_ps(table[0], entry);
              if constexpr (F == Format::kNf4) {
                const __m256 upper = _mm256_permutevar8x32_ps(table[1], entry);
                value = _mm256_blendv_ps(value, upper,
                                         _mm256_castsi256_ps(_mm256_slli_epi32(entry, 28)));
              }
              _mm256_store_ps(to + (i * 4 + j) * 16 + h * 8, _mm256_mul_ps(value, scale[h]));
            });
          });
        });
        to += kInputBlock * 16;
      }
      k = stop;
    }
  }
};

template <Format F>
struct ExpandFloats {
  LOWBIT_INLINE explicit ExpandFloats(const Layout&) {}
  void operator()(const std::byte* tile, std::int64_t k0, std::int64_t k1, float* to) const {
    const std::byte* codes = tile + (kRowScale<F> ? kUnitBytes : 0);
    for (std::int64_t quad = k0 / 4; quad < k1 / 4; ++quad) {
      unroll<2>([&](auto p) LOWBIT_LAMBDA {
        // Halves come in pairs: neighbours, but of fp8 every other input.
        constexpr int kFirst = kRowScale<F> ? p : 2 * p, kSecond = kFirst + (kRowScale<F> ? 2 : 1);
        __m256i halves[2][2];
        if constexpr (F != Format::kBf16) quad_halves<F>(codes, quad, halves);
        unroll<2>([&](auto h) LOWBIT_LAMBDA {
          __m256 first, second;
          if constexpr (F == Format::kBf16) {
            const __m256i unit = load32(codes + quad * 128 + p * 64 + h * 32);
            first = bf16_low(unit);
            second = bf16_high(unit);
          } else {
            const __m256i low = _mm256_and_si256(halves[p][h], _mm256_set1_epi32(0xffff));
            const __m256i high = _mm256_srli_epi32(halves[p][h], 16);
            const auto widen = [](__m256i v) LOWBIT_LAMBDA {
              return _mm256_cvtph_ps(
                  _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
            };
            first = widen(low);
            second = widen(high);
          }
          _mm256_store_ps(to + kFirst * 16 + h * 8, first);
          _mm256_store_ps(to + kSecond * 16 + h * 8, second);
        });
      });
      to += 4 * 16;
    }
  }
};

template <int kCount>
void multiply(const float* panel, std::int64_t inputs, const std::byte* x, float* sums,
              bool first) {
  __m256 sum[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { sum[i / 2][i % 2] = _mm256_setzero_ps(); });
  for (std::int64_t k = 0; k < inputs; k += 4) {
    unroll<4>([&](auto j) LOWBIT_LAMBDA {
      const __m256 w0 = _mm256_load_ps(panel + j * 16), w1 = _mm256_load_ps(panel + j * 16 + 8);
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        const __m256 value = broadcast_f32(x + (j * kCount + t) * 4);
        sum[t][0] = _mm256_fmadd_ps(value, w0, sum[t][0]);
        sum[t][1] = _mm256_fmadd_ps(value, w1, sum[t][1]);
        settle(sum[t][0]);
        settle(sum[t][1]);
      });
    });
    panel += 4 * 16;
    x += 4 * kCount * 4;
  }
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA {
    float* kept = sums + i / 2 * kTiles * 16 + i % 2 * 8;
    __m256 value = sum[i / 2][i % 2];
    if (!first) value = _mm256_add_ps(value, _mm256_load_ps(kept));
    _mm256_store_ps(kept, value);
  });
}

std::int64_t panel_scratch(const RowBlock&, const Activations& a) {
  return kTiles * (kTileBytes + (a.m + kTokens) * kTileRows * 4);
}

template <Format F, class E>
void run_panel(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
               std::int64_t token_end, std::int64_t, std::byte* scratch) {
  const Layout& layout = rows.layout;
  const E expand(layout);
  const Epilogue epilogue{rows, F == Format::kFp8E4M3 ? 256.0f : 1.0f};
  float* panel = reinterpret_cast<float*>(scratch);
  float* sums = reinterpret_cast<float*>(scratch + kTiles * kTileBytes);  // [token][tile][16]
  const std::int64_t stride = align64(a.k_padded * kTokens * 4);
  // At least two chunks: chains of multiply-adds are no longer than half of the inputs.
  const std::int64_t half = (layout.k_padded / 2 + kInputBlock - 1) / kInputBlock * kInputBlock;
  const std::int64_t chunk = half < kChunk ? half : kChunk;
  for (std::int64_t tile = tile_begin; tile < tile_end; tile += kTiles) {
    const std::int64_t tiles = tile_end - tile < kTiles ? tile_end - tile : kTiles;
    const std::byte* bytes = rows.packed + tile * layout.tile_bytes;
    for (std::int64_t k0 = 0; k0 < layout.k_padded; k0 += chunk) {
      const std::int64_t k1 = k0 + chunk < layout.k_padded ? k0 + chunk : layout.k_padded;
      for (std::int64_t i = 0; i < tiles; ++i) {
        expand(bytes + i * layout.tile_bytes, k0, k1, panel + i * kChunk * 16);
      }
      for (std::int64_t t = token_begin; t < token_end; t += kTokens) {
        const std::int64_t count = token_end - t < kTokens ? token_end - t : kTokens;
        const std::byte* x = a.data + t / kTokens * stride + k0 * count * 4;
        unroll<kTokens>([&](auto c) LOWBIT_LAMBDA {
          if (count != c + 1) return;
          for (std::int64_t i = 0; i < tiles; ++i) {
            multiply<c + 1>(panel + i * kChunk * 16, k1 - k0, x,
                            sums + ((t - token_begin) * kTiles + i) * 16, k0 == 0);
          }
        });
      }
    }
    for (std::int64_t i = 0; i < tiles; ++i) {
      const auto* scales = reinterpret_cast<const float*>(bytes + i * layout.tile_bytes);
      for (std::int64_t t = token_begin; t < token_end; ++t) {
        const float* from = sums + ((t - token_begin) * kTiles + i) * 16;
        __m256 sum[2] = {_mm256_load_ps(from), _mm256_load_ps(from + 8)};
        if constexpr (kRowScale<F>) {
          sum[0] = _mm256_mul_ps(sum[0], _mm256_load_ps(scales));
          sum[1] = _mm256_mul_ps(sum[1], _mm256_load_ps(scales + 8));
        }
        epilogue.store(first_token + t, tile + i, sum);
      }
    }
  }
}

template <Format F, class E>
constexpr Path panel_path(const char* name) {
  return {name,
          "avx2.f32.t6",
          f32_bytes<kTokens, true>,
          prepare_f32<kTokens, true>,
          panel_scratch,
          run_panel<F, E>,
          kTiles,
          kTokens,
          true};
}

constexpr Path kPanels[kFormatCount] = {
    {},
    {},
    {},
    {},
    {},
    panel_path<Format::kNf3, Expand<Format::kNf3>>("avx2.fp32.panel.nf3"),
    panel_path<Format::kNf4, Expand<Format::kNf4>>("avx2.fp32.panel.nf4"),
    {},
    panel_path<Format::kFp8E4M3, ExpandFloats<Format::kFp8E4M3>>("avx2.fp32.panel.fp8_e4m3"),
    panel_path<Format::kFp8E5M2, ExpandFloats<Format::kFp8E5M2>>("avx2.fp32.panel.fp8_e5m2"),
    panel_path<Format::kFp16, ExpandFloats<Format::kFp16>>("avx2.fp32.panel.fp16"),
    panel_path<Format::kBf16, ExpandFloats<Format::kBf16>>("avx2.fp32.panel.bf16"),
};

}  // namespace

const Path* avx2::panel(Format format) {
  const Path& path = kPanels[static_cast<int>(format)];
  return path.run == nullptr ? nullptr : &path;
}

}  // namespace lowbit::cpu
