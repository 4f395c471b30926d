// Many tokens, grouped formats, int8 activations in one or two planes.
//
// Two row tiles (32 outputs) are expanded to a panel of byte operands, a chunk of K at a time:
//   panel   [inputs / 4][2 tiles][16 rows][4 inputs] u8, in L1
//   scales  [groups][2][16] float32 (and minima)
// then all tokens run through it in blocks of up to 6: 6 x 2 integer and 6 x 2 float accumulators,
// two weight vectors, one broadcast: 27 of 32 registers. Float totals wait in memory for the next
// chunk. Up to four panels take turns at a chunk, so that its activations (256 KiB of 512 tokens)
// come from L2. Two planes share the integer accumulators: the high plane's sum is shifted by 8
// before the low plane is added.
#include "cpu/generic/avx512_codes.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

constexpr int kTokens = 6;
constexpr int kTiles = 2;
constexpr int kBandTiles = 8;  // 4 panels
constexpr int kChunk = 512;    // inputs: 16 KiB of panel; a multiple of every group size

struct Panel {
  std::byte* codes;
  float* scales;
  float* minima;
  float* kept;  // [4 panels][tokens][2][16]: totals between chunks of K
};

LOWBIT_INLINE std::int64_t chunk_inputs(const Layout& layout) {
  return layout.k_padded < kChunk ? layout.k_padded : kChunk;
}

Panel make_panel(std::byte* scratch, const Layout& layout) {
  Panel panel;
  panel.codes = scratch;
  panel.scales = reinterpret_cast<float*>(scratch + chunk_inputs(layout) * 32);
  panel.minima = panel.scales + layout.groups * 32;
  panel.kept = panel.minima + layout.groups * 32;
  return panel;
}

std::int64_t scratch_bytes(const RowBlock& rows, const Activations& a) {
  return chunk_inputs(rows.layout) * 32 + rows.layout.groups * 2 * 32 * 4 + a.m * kBandTiles * 64;
}

// Groups [begin, end) of a chunk of K; sums of the chunks before are kept in memory.
struct Chunk {
  std::int64_t begin, end;
  bool first, last;
};

template <Format F>
void expand(const Operand<F>& operand, const std::byte* tile,
            const GroupWalk<Grouped<F>::kMinimum>& walk, const Panel& panel, const Chunk& chunk,
            int side) {
  std::byte* to = panel.codes + side * 64;
  for (std::int64_t g = chunk.begin; g < chunk.end; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      const auto plane = Operand<F>::Codes::plane(codes, inputs, b);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        _mm512_store_si512(to + i * 128, operand.template quad<i>(codes, b, plane));
      });
      to += 8 * 128;
    }
    _mm512_store_ps(panel.scales + g * 32 + side * 16, load_halves(tile + walk.scales(g)));
    if constexpr (Grouped<F>::kMinimum) {
      _mm512_store_ps(panel.minima + g * 32 + side * 16, load_halves(tile + walk.scales(g) + 32));
    }
  }
}

// Lines of the next panel's packed bytes, asked for while this one computes.
struct Ahead {
  const std::byte *at, *end;
  int lines;  // per group
};

// sum[t][n] += q[t] * w[n] over `blocks` blocks of 32 inputs for six tokens. In assembly because
// GCC 12 copies all twelve accumulators at both ends of every such loop and spills float totals to
// make room, a tenth of the time. Activations are fetched ahead.
LOWBIT_INLINE void multiply_six(__m512i (&sum)[6][2], const std::byte* w, const std::byte* q,
                                std::int64_t blocks) {
#define LOWBIT_TOKEN(x, at, low, high)   \
  "vpbroadcastd 24*i+" at "(%[q]), %%" x \
  "\n"                                   \
  "vpdpbusd %%" x ", %%zmm30, %[" low    \
  "]\n"                                  \
  "vpdpbusd %%" x ", %%zmm31, %[" high "]\n"
  __asm__ volatile(
      "1:\n"
      ".set i, 0\n"
      ".rept 8\n"
      "vmovdqa64 128*i(%[w]), %%zmm30\n"
      "vmovdqa64 128*i+64(%[w]), %%zmm31\n"
      LOWBIT_TOKEN("zmm28", "0", "a0", "b0")
      LOWBIT_TOKEN("zmm29", "4", "a1", "b1")
      LOWBIT_TOKEN("zmm28", "8", "a2", "b2")
      LOWBIT_TOKEN("zmm29", "12", "a3", "b3")
      LOWBIT_TOKEN("zmm28", "16", "a4", "b4")
      LOWBIT_TOKEN("zmm29", "20", "a5", "b5")
      ".set i, i+1\n"
      ".endr\n"
      "prefetcht0 1024(%[q])\n"
      "prefetcht0 1088(%[q])\n"
      "prefetcht0 1152(%[q])\n"
      "add $1024, %[w]\n"
      "add $192, %[q]\n"
      "dec %[blocks]\n"
      "jnz 1b\n"
      : [a0] "+v"(sum[0][0]), [b0] "+v"(sum[0][1]), [a1] "+v"(sum[1][0]), [b1] "+v"(sum[1][1]),
        [a2] "+v"(sum[2][0]), [b2] "+v"(sum[2][1]), [a3] "+v"(sum[3][0]), [b3] "+v"(sum[3][1]),
        [a4] "+v"(sum[4][0]), [b4] "+v"(sum[4][1]), [a5] "+v"(sum[5][0]), [b5] "+v"(sum[5][1]),
        [w] "+r"(w), [q] "+r"(q), [blocks] "+r"(blocks)
      :
      : "xmm28", "xmm29", "xmm30", "xmm31", "memory", "cc");
#undef LOWBIT_TOKEN
}

template <int kPlanes, bool kMinimum, int kCount>
void block_int(const Panel& panel, const Chunk& chunk, float* kept, std::int64_t group,
               std::int64_t k_padded, const std::byte* block, const IntRecords& records,
               const Epilogue& epilogue, std::int64_t token, std::int64_t tile, bool second,
               Ahead& ahead) {
  __m512 total[kCount][kTiles];
  unroll<kCount * kTiles>([&](auto i) LOWBIT_LAMBDA {
    total[i / kTiles][i % kTiles] =
        chunk.first ? _mm512_setzero_ps() : _mm512_load_ps(kept + i * 16);
  });
  for (std::int64_t g = chunk.begin; g < chunk.end; ++g) {
    const std::int64_t k0 = g * group;
    const std::byte* record = block + (g - chunk.begin) * records.bytes;
    const std::int64_t blocks = ((k0 + group < k_padded ? group : k_padded - k0)) / kInputBlock;
    for (int i = 0; i < ahead.lines && ahead.at < ahead.end; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
      ahead.at += 64;
    }
    __m512i sum[kCount][kTiles];
    unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
      sum[t][0] = kPlanes == 1 ? broadcast(init_of(record, t, kCount)) : _mm512_setzero_si512();
      sum[t][1] = sum[t][0];
    });
    unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
      if constexpr (p == 1) {
        unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
          const __m512i init = broadcast(init_of(record, t, kCount));
          sum[t][0] = _mm512_add_epi32(_mm512_slli_epi32(sum[t][0], 8), init);
          sum[t][1] = _mm512_add_epi32(_mm512_slli_epi32(sum[t][1], 8), init);
        });
      }
      const std::byte* q = record + (16 + p * group) * kCount;
      const std::byte* w = panel.codes + (k0 - chunk.begin * group) * 32;
      if constexpr (kCount == 6) {
        multiply_six(sum, w, q, blocks);
      } else {
        for (std::int64_t b = 0; b < blocks; ++b) {
          unroll<8>([&](auto i) LOWBIT_LAMBDA {
            const __m512i w0 = load_unit(w + i * 128);
            const __m512i w1 = load_unit(w + i * 128 + 64);
            unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
              const __m512i x = broadcast(q + (i * kCount + t) * 4);
              sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, x);
              sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, x);
            });
          });
          q += 32 * kCount;
          w += 8 * 128;
        }
      }
    });
    unroll<kTiles>([&](auto n) LOWBIT_LAMBDA {
      const __m512 scale = _mm512_load_ps(panel.scales + g * 32 + n * 16);
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        const __m512 value = scaled_sum<kPlanes>(sum[t][n], record, t, kCount);
        total[t][n] = _mm512_fmadd_ps(value, scale, total[t][n]);
      });
      if constexpr (kMinimum) {
        const __m512 minimum = _mm512_load_ps(panel.minima + g * 32 + n * 16);
        unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
          total[t][n] =
              _mm512_fmadd_ps(minimum, broadcast_f32(init2_of(record, t, kCount)), total[t][n]);
        });
      }
    });
  }
  if (!chunk.last) {
    unroll<kCount * kTiles>([&](auto i) LOWBIT_LAMBDA {
      _mm512_store_ps(kept + i * 16, total[i / kTiles][i % kTiles]);
    });
    return;
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    epilogue.store(token + t, tile, total[t][0]);
    if (second) epilogue.store(token + t, tile + 1, total[t][1]);
  });
}

template <Format F, int kPlanes>
void run_panel(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
               std::int64_t token_end, std::int64_t next_tile, std::byte* scratch) {
  const Operand<F> operand;
  const Layout& layout = rows.layout;
  const GroupWalk<Grouped<F>::kMinimum> walk(layout);
  // kTokens wherever the driver splits the tokens of a panel: there are at least eight blocks then.
  const std::int64_t per_block = block_tokens(a.m, kTokens);
  const IntRecords records(a, kPlanes, per_block, kChunk);
  const Epilogue epilogue(rows, Grouped<F>::kValueScale);
  const Panel panel = make_panel(scratch, layout);
  const std::int64_t chunk_groups = kChunk / layout.group_size;
  const std::int64_t token_blocks = (token_end - token_begin + per_block - 1) / per_block;
  for (std::int64_t band = tile_begin; band < tile_end; band += kBandTiles) {
    const std::int64_t band_end = band + kBandTiles < tile_end ? band + kBandTiles : tile_end;
    Ahead ahead{nullptr, nullptr, 0};
    const std::int64_t next = band_end < tile_end ? band_end : next_tile;
    if (next >= 0 && next < layout.tiles) {
      const std::int64_t tiles =
          next + kBandTiles <= layout.tiles ? kBandTiles : layout.tiles - next;
      ahead.at = rows.packed + next * layout.tile_bytes;
      ahead.end = ahead.at + tiles * layout.tile_bytes;
      const std::int64_t steps =
          token_blocks * layout.groups * ((band_end - band + kTiles - 1) / kTiles);
      ahead.lines = static_cast<int>((tiles * layout.tile_bytes / 64 + steps - 1) / steps);
    }
    for (std::int64_t g = 0; g < layout.groups; g += chunk_groups) {
      const std::int64_t end = g + chunk_groups < layout.groups ? g + chunk_groups : layout.groups;
      const Chunk chunk{g, end, g == 0, end == layout.groups};
      for (std::int64_t tile = band; tile < band_end; tile += kTiles) {
        const bool second = tile + 1 < layout.tiles;
        const std::byte* bytes = rows.packed + tile * layout.tile_bytes;
        float* kept_panel = panel.kept + (tile - band) * a.m * 16;
        expand<F>(operand, bytes, walk, panel, chunk, 0);
        expand<F>(operand, second ? bytes + layout.tile_bytes : bytes, walk, panel, chunk, 1);
        for (std::int64_t t = token_begin; t < token_end; t += per_block) {
          const std::byte* block = a.data + records.at(t / per_block, g);
          float* kept = kept_panel + (t - token_begin) * kTiles * 16;
          const std::int64_t left = token_end - t < per_block ? token_end - t : per_block;
          unroll<kTokens>([&](auto i) LOWBIT_LAMBDA {
            if (left == i + 1) {
              block_int<kPlanes, Grouped<F>::kMinimum, i + 1>(
                  panel, chunk, kept, layout.group_size, layout.k_padded, block, records, epilogue,
                  first_token + t, tile, second, ahead);
            }
          });
        }
      }
    }
  }
}

template <Format F, int kPlanes>
constexpr Path panel_path(const char* name, const char* activations) {
  return {name,
          activations,
          int_activation_bytes<kPlanes, kTokens>,
          prepare_int<kPlanes, kTokens, kChunk, Grouped<F>::kZero, Grouped<F>::kMinimum>,
          scratch_bytes,
          run_panel<F, kPlanes>,
          kTiles,
          kTokens,
          true};
}

#define LOWBIT_NAME(kind, format) "avx512vnni." kind ".panel." format

constexpr Path kInt8[kFormatCount] = {
    panel_path<Format::kSymInt4, 1>(LOWBIT_NAME("int8", "sym_int4"), "avx512.int8.t6.z8"),
    panel_path<Format::kAsymInt4, 1>(LOWBIT_NAME("int8", "asym_int4"), "avx512.int8.t6.z0"),
    panel_path<Format::kSymInt5, 1>(LOWBIT_NAME("int8", "sym_int5"), "avx512.int8.t6.z16"),
    panel_path<Format::kAsymInt5, 1>(LOWBIT_NAME("int8", "asym_int5"), "avx512.int8.t6.z0"),
    panel_path<Format::kSymInt8, 1>(LOWBIT_NAME("int8", "sym_int8"), "avx512.int8.t6.z128"),
    panel_path<Format::kNf3, 1>(LOWBIT_NAME("int8", "nf3"), "avx512.int8.t6.z128"),
    panel_path<Format::kNf4, 1>(LOWBIT_NAME("int8", "nf4"), "avx512.int8.t6.z128"),
    panel_path<Format::kFp4, 1>(LOWBIT_NAME("int8", "fp4"), "avx512.int8.t6.z128"),
};

// Not for nf3 and nf4: their single plane is rounded.
constexpr Path kNone = {};
constexpr Path kInt8x2[kFormatCount] = {
    panel_path<Format::kSymInt4, 2>(LOWBIT_NAME("int8x2", "sym_int4"), "avx512.int8x2.t6.z8"),
    panel_path<Format::kAsymInt4, 2>(LOWBIT_NAME("int8x2", "asym_int4"), "avx512.int8x2.t6.z0"),
    panel_path<Format::kSymInt5, 2>(LOWBIT_NAME("int8x2", "sym_int5"), "avx512.int8x2.t6.z16"),
    panel_path<Format::kAsymInt5, 2>(LOWBIT_NAME("int8x2", "asym_int5"), "avx512.int8x2.t6.z0"),
    panel_path<Format::kSymInt8, 2>(LOWBIT_NAME("int8x2", "sym_int8"), "avx512.int8x2.t6.z128"),
    kNone,
    kNone,
    panel_path<Format::kFp4, 2>(LOWBIT_NAME("int8x2", "fp4"), "avx512.int8x2.t6.z128"),
};

const Path* path_or_null(const Path& path) {
  return path.run == nullptr ? nullptr : &path;
}

}  // namespace

namespace avx512 {

const Path* panel_int8(Format format) {
  return path_or_null(kInt8[static_cast<int>(format)]);
}
const Path* panel_int8x2(Format format) {
  return path_or_null(kInt8x2[static_cast<int>(format)]);
}

}  // namespace avx512
}  // namespace lowbit::cpu
