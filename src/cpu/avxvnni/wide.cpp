// NormalFloats as the sum of two bytes (normal_float_pair.h) times both planes of the activations.
#include "cpu/generic/normal_float_pair.h"
#include "cpu/generic/ymm_dot.h"
#include "cpu/generic/ymm_paths.h"
#include "cpu/generic/ymm_tiles.h"

namespace lowbit::cpu {
namespace {

constexpr int kWideTokens = 2;  // 8 sums, 2 operands, 2 tables, 2 broadcasts

template <Format F, int kCount>
void tile_pair(const __m256i (&tables)[2], const GroupWalk<false>& walk, const std::byte* tile,
               const std::byte* quads, const std::byte* meta, const Epilogue& epilogue,
               std::int64_t token, std::int64_t tile_index) {
  using Codes = Unpack<Grouped<F>::kBits>;
  using Pair = NormalFloatPair<F>;
  constexpr int kChains = kCount == 1 ? 2 : 1;
  __m256 total[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { total[i / 2][i % 2] = _mm256_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    const std::byte* scales = tile + walk.scales(g);
    prefetch_far(scales);
    unroll<2>([&](auto h) LOWBIT_LAMBDA {
      __m256i sum[kCount][2][2][kChains];  // [token][byte of the weight][plane][chain]
      unroll<kCount * 4 * kChains>([&](auto i) LOWBIT_LAMBDA {
        constexpr int kOf = i / kChains;
        sum[kOf / 4][kOf / 2 % 2][kOf % 2][i % kChains] = _mm256_setzero_si256();
      });
      const std::byte* x = quads;
      for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
        unroll<8>([&](auto i) LOWBIT_LAMBDA {
          if constexpr (h == 0) {
            prefetch_quad_here<i, Codes::kBlockBytes>(codes + b * Codes::kBlockBytes);
          }
          const __m256i code = Codes::template quad<i>(codes, inputs, b, h);
          const __m256i weights[2] = {_mm256_shuffle_epi8(tables[0], code),
                                      _mm256_shuffle_epi8(tables[1], code)};
          unroll<kCount * 4>([&](auto j) LOWBIT_LAMBDA {
            constexpr int t = j / 4, w = j / 2 % 2, p = j % 2;
            __m256i& to = sum[t][w][p][i % kChains];
            to = LOWBIT_DOT(to, weights[w], broadcast32(x + (i * kCount + t) * 8 + p * 4));
          });
        });
        x += 8 * kCount * 8;
      }
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        Meta of;
        __builtin_memcpy(&of, meta + (g * kCount + t) * sizeof(Meta), sizeof(Meta));
        const __m256i zero =
            _mm256_set1_epi32(static_cast<int>(static_cast<std::uint32_t>(kPairZero) *
                                               static_cast<std::uint32_t>(256 * of.high + of.low)));
        __m256 part[2];
        unroll<2>([&](auto w) LOWBIT_LAMBDA {
          unroll<2 * (kChains - 1)>([&](auto p) LOWBIT_LAMBDA {
            sum[t][w][p][0] = _mm256_add_epi32(sum[t][w][p][0], sum[t][w][p][kChains - 1]);
          });
          const __m256i both =
              _mm256_add_epi32(sum[t][w][1][0], _mm256_slli_epi32(sum[t][w][0][0], 8));
          part[w] = _mm256_cvtepi32_ps(_mm256_sub_epi32(both, zero));
        });
        __m256 value = _mm256_mul_ps(part[1], _mm256_set1_ps(Pair::kSecond));
        value = _mm256_fmadd_ps(part[0], _mm256_set1_ps(Pair::kFirst), value);
        value = _mm256_mul_ps(value, _mm256_set1_ps(of.step));
        total[t][h] = _mm256_fmadd_ps(value, load_halves(scales + h * 16), total[t][h]);
      });
    });
    quads += inputs / 4 * kCount * 8;
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

template <Format F>
void run_wide(const RowBlock& rows, const Activations& a, std::int64_t first_token,
              std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
              std::int64_t token_end, std::int64_t, std::byte*) {
  const GroupWalk<false> walk(rows.layout);
  const auto for_all = [&](auto&& one) LOWBIT_LAMBDA {
    for_tiles<Quad::kPlanes, kWideTokens, false>(rows, a, first_token, tile_begin, tile_end,
                                                 token_begin, token_end, one);
  };
  // Repeated in both halves, and nf3's again within them.
  const auto table = [](const auto& of) LOWBIT_LAMBDA {
    alignas(32) std::uint8_t bytes[32];
    for (std::size_t i = 0; i < 32; ++i) {
      bytes[i] = static_cast<std::uint8_t>(of[i % std::size(of)] + kPairZero);
    }
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
  };
  using Pair = NormalFloatPair<F>;
  const __m256i tables[2] = {table(Pair::first), table(Pair::second)};
  const Epilogue epilogue{rows, 1.0f};
  for_tiles<Quad::kPlanes, kWideTokens, false>(
      rows, a, first_token, tile_begin, tile_end, token_begin, token_end,
      [&](auto count, const std::byte* bytes, const std::byte* quads, const std::byte* meta,
          std::int64_t token, std::int64_t tile) LOWBIT_LAMBDA {
        tile_pair<F, count>(tables, walk, bytes, quads, meta, epilogue, token, tile);
      });
}

template <Format F>
constexpr Path wide_path(const char* name) {
  return {name,
          "avxvnni.int8x2.to2",
          quads_bytes<Quad::kPlanes, kWideTokens, false>,
          prepare_quads<Quad::kPlanes, kWideTokens, false>,
          no_scratch,
          run_wide<F>,
          1,
          1,
          false};
}

constexpr Path kWide[2] = {
    wide_path<Format::kNf3>("avxvnni.int8x2.nf3"),
    wide_path<Format::kNf4>("avxvnni.int8x2.nf4"),
};

}  // namespace

const Path* avxvnni::wide(Format format) {
  if (format != Format::kNf3 && format != Format::kNf4) return nullptr;
  return &kWide[format == Format::kNf4 ? 1 : 0];
}

}  // namespace lowbit::cpu
