// NormalFloats with all the bits of their codebooks.
//
// nf3: eight entries are one vpermps of float32, which reads three bits of each lane and ignores
// the rest; activations stay float32. nf4: sixteen entries as integers of 23 bits, round(c * (2^22
// - 1)) = 128 * word + low, by three byte tables. With q = 256 * high + rest the products are
//   word * q     vpmaddwd, at most 2^31 in a pair; summed in float32
//   low * high   vpmaddubsw, at most 2^15 in a pair; widened, integer sums
//   low * rest   its mean, 64 * sum of rest: what is left out is below 2^-24 of the largest product
#include "cpu/avx2/f32.h"
#include "cpu/generic/ymm_paths.h"
#include "cpu/generic/ymm_tiles.h"

namespace lowbit::cpu {
namespace {

constexpr int kTokens = 3;

// ---- nf4 ------------------------------------------------------------------------------------
constexpr double kSteps = 4194303.0;  // 2^22 - 1

struct Tables {
  __m256i high, middle, low;
};

LOWBIT_INLINE Tables make_tables() {
  const auto entry = [](double v) { return nearest(v * kSteps); };
  return {
      make_table<Format::kNf4>([&](double v) { return static_cast<std::uint8_t>(entry(v) >> 15); }),
      make_table<Format::kNf4>([&](double v) { return static_cast<std::uint8_t>(entry(v) >> 7); }),
      make_table<Format::kNf4>(
          [&](double v) { return static_cast<std::uint8_t>(entry(v) & 127); })};
}

template <int kCount>
void tile_nf4(const Tables& tables, const GroupWalk<false>& walk, const std::byte* tile,
              const std::byte* quads, const std::byte* meta, const Epilogue& epilogue,
              std::int64_t token, std::int64_t tile_index) {
  constexpr int kHalves = kCount == 1 ? 2 : 1;
  constexpr std::int64_t kBlock = Unpack<4>::kBlockBytes;
  __m256 total[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { total[i / 2][i % 2] = _mm256_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    const std::byte* scales = tile + walk.scales(g);
    prefetch_far(scales);
    unroll<2 / kHalves>([&](auto first) LOWBIT_LAMBDA {
      // Words: rows 0 1 | 4 5 and rows 2 3 | 6 7 of a half, two sums each. Lows: a sum per row.
      __m256 word[kCount][kHalves][2];
      __m256i low[kCount][kHalves];
      unroll<kCount * kHalves>([&](auto i) LOWBIT_LAMBDA {
        constexpr int t = i / kHalves, h = i % kHalves;
        word[t][h][0] = word[t][h][1] = _mm256_setzero_ps();
        low[t][h] = _mm256_setzero_si256();
      });
      const std::byte* x = quads;
      for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
        unroll<8>([&](auto i) LOWBIT_LAMBDA {
          if constexpr (first == 0) prefetch_quad_here<i, kBlock>(codes + b * kBlock);
          unroll<kHalves>([&](auto h) LOWBIT_LAMBDA {
            const __m256i code = Unpack<4>::quad<i>(codes, inputs, b, first + h);
            const __m256i top = _mm256_shuffle_epi8(tables.high, code);
            const __m256i middle = _mm256_shuffle_epi8(tables.middle, code);
            const __m256i bottom = _mm256_shuffle_epi8(tables.low, code);
            const __m256i words[2] = {_mm256_unpacklo_epi8(middle, top),
                                      _mm256_unpackhi_epi8(middle, top)};
            unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
              const std::byte* q = x + (i * kCount + t) * 16;
              const __m256i whole = broadcast64(q);
              unroll<2>([&](auto p) LOWBIT_LAMBDA {
                word[t][h][p] = _mm256_add_ps(
                    word[t][h][p], _mm256_cvtepi32_ps(_mm256_madd_epi16(words[p], whole)));
                settle(word[t][h][p]);
              });
              const __m256i pairs = _mm256_maddubs_epi16(bottom, broadcast32(q + 8));
              low[t][h] =
                  _mm256_add_epi32(low[t][h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
              settle(low[t][h]);
            });
          });
        });
        x += 8 * kCount * 16;
      }
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        Meta of;
        __builtin_memcpy(&of, meta + (g * kCount + t) * sizeof(Meta), sizeof(Meta));
        const __m256 mean = _mm256_set1_ps(0.5f * static_cast<float>(of.low));
        unroll<kHalves>([&](auto h) LOWBIT_LAMBDA {
          // hadd works within 128-bit lanes, as unpacking did: rows come out in order.
          const __m256 whole = _mm256_hadd_ps(word[t][h][0], word[t][h][1]);
          __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[t][h]), _mm256_set1_ps(2.0f), mean);
          value = _mm256_mul_ps(_mm256_add_ps(whole, value), _mm256_set1_ps(of.step));
          __m256& to = total[t][first + h];
          to = _mm256_fmadd_ps(value, load_halves(scales + (first + h) * 16), to);
        });
      });
    });
    quads += inputs / 4 * kCount * 16;
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

void run_nf4(const RowBlock& rows, const Activations& a, std::int64_t first_token,
             std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
             std::int64_t token_end, std::int64_t, std::byte*) {
  const Tables tables = make_tables();
  const GroupWalk<false> walk(rows.layout);
  const Epilogue epilogue{rows, static_cast<float>(128.0 / kSteps)};
  for_tiles<Quad::kBoth, kTokens, false>(
      rows, a, first_token, tile_begin, tile_end, token_begin, token_end,
      [&](auto count, const std::byte* bytes, const std::byte* quads, const std::byte* meta,
          std::int64_t token, std::int64_t tile) LOWBIT_LAMBDA {
        tile_nf4<count>(tables, walk, bytes, quads, meta, epilogue, token, tile);
      });
}

// ---- nf3 ------------------------------------------------------------------------------------
template <int kCount>
void tile_nf3(__m256 table, const GroupWalk<false>& walk, const std::byte* tile, const std::byte* x,
              const Epilogue& epilogue, std::int64_t token, std::int64_t tile_index) {
  constexpr std::int64_t kBlock = Unpack<3>::kBlockBytes;
  __m256 total[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { total[i / 2][i % 2] = _mm256_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    __m256 sum[kCount][2][2];  // [token][half][inputs 0 and 2, inputs 1 and 3]
    unroll<kCount * 4>([&](auto i)
                           LOWBIT_LAMBDA { sum[i / 4][i / 2 % 2][i % 2] = _mm256_setzero_ps(); });
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        prefetch_quad_here<i, kBlock>(codes + b * kBlock);
        // Flipped where the third bit is set, which sets it: the upper half of the table is stored
        // backwards.
        __m256i code[2];
        unroll<2>([&](auto h) LOWBIT_LAMBDA {
          code[h] = _mm256_xor_si256(Unpack<3>::low<i>(codes, b, h),
                                     plane_bits(Unpack<3>::third<i>(codes, inputs, b, h)));
        });
        unroll<4>([&](auto j) LOWBIT_LAMBDA {
          __m256 weights[2];
          unroll<2>([&](auto h) LOWBIT_LAMBDA {
            weights[h] = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(code[h], 8 * j));
          });
          unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
            const __m256 value = broadcast_f32(x + ((i * 4 + j) * kCount + t) * 4);
            unroll<2>([&](auto h) LOWBIT_LAMBDA {
              sum[t][h][j % 2] = _mm256_fmadd_ps(weights[h], value, sum[t][h][j % 2]);
              settle(sum[t][h][j % 2]);
            });
          });
        });
      });
      x += kInputBlock * kCount * 4;
    }
    const std::byte* scales = tile + walk.scales(g);
    prefetch_far(scales);
    unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA {
      constexpr int t = i / 2, h = i % 2;
      total[t][h] = _mm256_fmadd_ps(_mm256_add_ps(sum[t][h][0], sum[t][h][1]),
                                    load_halves(scales + h * 16), total[t][h]);
    });
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

void run_nf3(const RowBlock& rows, const Activations& a, std::int64_t first_token,
             std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
             std::int64_t token_end, std::int64_t, std::byte*) {
  alignas(32) float entries[8];
  const auto codebook = format_info(Format::kNf3).codebook;
  for (std::size_t i = 0; i < 8; ++i) {
    entries[i] = static_cast<float>(codebook[i < 4 ? i : 11 - i]);
  }
  const __m256 table = _mm256_load_ps(entries);
  const GroupWalk<false> walk(rows.layout);
  const Epilogue epilogue{rows, 1.0f};
  const std::int64_t per_block = tokens_per_block<kTokens, false>(a.m);
  const std::int64_t stride = align64(a.k_padded * per_block * 4);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += per_block) {
      const std::byte* x = a.data + t / per_block * stride;
      const std::int64_t nt = token_end - t < per_block ? token_end - t : per_block;
      unroll<kTokens>([&](auto i) LOWBIT_LAMBDA {
        if (nt == i + 1) {
          tile_nf3<i + 1>(table, walk, bytes, x, epilogue, first_token + t, tile);
        }
      });
    }
  }
}

constexpr Path kWide[2] = {
    {"avx2.fp32.nf3", "avx2.f32.blocks", f32_bytes<kTokens, false>, prepare_f32<kTokens, false>,
     no_scratch, run_nf3, 1, 1, false},
    {"avx2.int16x2.nf4", "avx2.int16x2", quads_bytes<Quad::kBoth, kTokens, false>,
     prepare_quads<Quad::kBoth, kTokens, false>, no_scratch, run_nf4, 1, 1, false},
};

}  // namespace

const Path* avx2::wide(Format format) {
  if (format != Format::kNf3 && format != Format::kNf4) return nullptr;
  return &kWide[format == Format::kNf4 ? 1 : 0];
}

}  // namespace lowbit::cpu
