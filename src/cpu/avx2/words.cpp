// Formats whose weights are whole bytes (sym_int8, NormalFloats in 1/127): activations as int16
// (|q| <= 127 * 256, so to absmax * 2^-16), weights widened to 16 bits, vpmaddwd: exact integer
// sums per group whatever the precision asked for. vpmaddubsw would overflow 16 bits.
//
// Taking the even and the odd bytes of a quad gives 16-bit pairs (0, 2) and (1, 3), and the
// activations are stored that way.
#include "cpu/generic/ymm_paths.h"
#include "cpu/generic/ymm_tiles.h"

namespace lowbit::cpu {
namespace {

constexpr int kTokens = 4;  // 8 sums, 2 operands of a half and 2 broadcasts in 16 registers

template <Format F, int kCount>
void tile_words(__m256i table, const GroupWalk<false>& walk, const std::byte* tile,
                const std::byte* quads, const std::byte* meta, const Epilogue& epilogue,
                std::int64_t token, std::int64_t tile_index) {
  using Is = Grouped<F>;
  constexpr std::int64_t kBlock = Unpack<Is::kBits>::kBlockBytes;
  __m256 total[kCount][2];
  unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { total[i / 2][i % 2] = _mm256_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    const std::byte* scales = tile + walk.scales(g);
    prefetch_far(scales);
    __m256i sum[kCount][2];
    unroll<kCount * 2>([&](auto i) LOWBIT_LAMBDA { sum[i / 2][i % 2] = _mm256_setzero_si256(); });
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      prefetch<kBlock>(codes + b * kBlock);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        unroll<2>([&](auto h) LOWBIT_LAMBDA {
          const __m256i bytes = weight_bytes<F, i>(table, codes, inputs, b, h);
          const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
          const __m256i odd = _mm256_srli_epi16(bytes, 8);
          unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
            const std::byte* q = quads + (i * kCount + t) * 8;
            __m256i& to = sum[t][h];
            to = _mm256_add_epi32(to, _mm256_madd_epi16(even, broadcast32(q)));
            to = _mm256_add_epi32(to, _mm256_madd_epi16(odd, broadcast32(q + 4)));
            settle(to);
          });
        });
      });
      quads += 8 * kCount * 8;
    }
    unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
      Meta of;
      __builtin_memcpy(&of, meta + (g * kCount + t) * sizeof(Meta), sizeof(Meta));
      // Wraps like the vectors do; the difference fits.
      const __m256i zero =
          _mm256_set1_epi32(static_cast<int>(static_cast<std::uint32_t>(Is::kZero) *
                                             static_cast<std::uint32_t>(256 * of.high + of.low)));
      unroll<2>([&](auto h) LOWBIT_LAMBDA {
        const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t][h], zero));
        const __m256 value = _mm256_mul_ps(whole, _mm256_set1_ps(of.step));
        total[t][h] = _mm256_fmadd_ps(value, load_halves(scales + h * 16), total[t][h]);
      });
    });
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

template <Format F, bool kMany>
void run_words(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
               std::int64_t token_end, std::int64_t, std::byte*) {
  const __m256i table = make_byte_table<F>();
  const GroupWalk<false> walk(rows.layout);
  const Epilogue epilogue{rows, static_cast<float>(Grouped<F>::kValueScale)};
  for_tiles<Quad::kWords, kTokens, kMany>(
      rows, a, first_token, tile_begin, tile_end, token_begin, token_end,
      [&](auto count, const std::byte* bytes, const std::byte* quads, const std::byte* meta,
          std::int64_t token, std::int64_t tile) LOWBIT_LAMBDA {
        tile_words<F, count>(table, walk, bytes, quads, meta, epilogue, token, tile);
      });
}

template <Format F, bool kMany>
constexpr Path words_path(const char* name) {
  return {name,
          kMany ? "avx2.int16.t4" : "avx2.int16",
          quads_bytes<Quad::kWords, kTokens, kMany>,
          prepare_quads<Quad::kWords, kTokens, kMany>,
          no_scratch,
          run_words<F, kMany>,
          1,
          kMany ? kTokens : 1,
          kMany};
}

template <bool kMany>
constexpr Path kWords[3] = {
    words_path<Format::kSymInt8, kMany>("avx2.int16.sym_int8"),
    words_path<Format::kNf3, kMany>("avx2.int16.nf3"),
    words_path<Format::kNf4, kMany>("avx2.int16.nf4"),
};

}  // namespace

const Path* avx2::words(Format format, bool many) {
  const int i = format == Format::kSymInt8 ? 0
                : format == Format::kNf3   ? 1
                : format == Format::kNf4   ? 2
                                           : -1;
  if (i < 0) return nullptr;
  return many ? &kWords<true>[i] : &kWords<false>[i];
}

}  // namespace lowbit::cpu
