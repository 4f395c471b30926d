// Up to 16 tokens, formats without groups: products of bfloat16 tiles, whose sums stay in tiles for
// a whole row tile. fp8 and bf16 weights are exact, fp16 is rounded. Activations are rounded to
// bf16 (one plane, 16 tokens) or split into two of them (8 tokens): the rows of a tile.
//
// A step is 32 inputs of a row tile: a tile of weights is made in L1 (bf16 weights are one as they
// lie) and multiplied kBehind steps later, when it has arrived there; the vector units have nothing
// else to do. Outputs of row tiles are written while the next ones pass by.
#include "cpu/amx/few_outputs.h"
#include "cpu/amx/paths.h"
#include "cpu/amx/tiles.h"
#include "cpu/generic/avx512_floats.h"

namespace lowbit::cpu {
namespace {

constexpr int kBehind = 2;
constexpr int kRing = 4;  // slots for what steps hand on
constexpr std::int64_t kTileBytes = 1024;

// Activations: [k_padded / 32][planes][tokens][32] bf16. fp8 operands hold the inputs 0 and 2, then
// 1 and 3 of every four.
template <int kPlanes>
std::int64_t activation_bytes(const Activations& a) {
  return a.k_padded * a.m * kPlanes * 2;
}

template <bool kFp8, int kPlanes>
void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const __m512i order =
      kFp8 ? _mm512_set_epi16(31, 29, 30, 28, 27, 25, 26, 24, 23, 21, 22, 20, 19, 17, 18, 16, 15,
                              13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0)
           : _mm512_setzero_si512();
  const std::int64_t stride = a.m * kPlanes * 64;
  for (std::int64_t t = begin; t < end; ++t) {
    std::byte* to = a.data + t * 64;
    for (std::int64_t k = 0; k < a.k_padded; k += 32, to += stride) {
      __m512 x[2];
      unroll<2>([&](auto i) LOWBIT_LAMBDA {
        x[i] = load16(tokens.x, tokens.dtype, t * tokens.stride + k + i * 16, a.k - k - i * 16);
      });
      unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
        __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
        if constexpr (p + 1 < kPlanes) {
          unroll<2>([&](auto i) LOWBIT_LAMBDA {
            const __m256i half =
                i == 0 ? _mm512_castsi512_si256(bits) : _mm512_extracti64x4_epi64(bits, 1);
            const __m512 rounded =
                _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            // A non-finite activation leaves nothing: its first part carries it.
            const __mmask16 finite = _mm512_cmp_ps_mask(
                _mm512_abs_ps(rounded), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
            x[i] = _mm512_maskz_sub_ps(finite, x[i], rounded);
          });
        }
        if constexpr (kFp8) bits = _mm512_permutexvar_epi16(order, bits);
        _mm512_storeu_si512(to + p * a.m * 64, bits);
      });
    }
  }
}

// A quad of codes, 16 outputs x 4 inputs, as two rows of a B tile.
template <Format F>
struct Rows : Fp8Floats<F> {
  static constexpr std::int64_t kStepBytes = 512;
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, __m512i (&out)[2]) const {
    this->template pairs<I>(codes, 0, out[0], out[1]);
  }
};
template <>
struct Rows<Format::kFp16> {
  static constexpr std::int64_t kStepBytes = 1024;
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, __m512i (&out)[2]) const {
    unroll<2>([&](auto i) LOWBIT_LAMBDA {
      const std::byte* unit = codes + I * 128 + i * 64;
      out[i] = (__m512i)_mm512_cvtne2ps_pbh(load_halves(unit + 32), load_halves(unit));
    });
  }
};
template <>
struct Rows<Format::kBf16> {
  static constexpr std::int64_t kStepBytes = 1024;
};

// A line as far ahead as the kernels of one stream of bytes fetch them.
LOWBIT_INLINE void fetch_line(const std::byte* far, const std::byte* near) {
  __asm__ volatile("prefetcht1 (%0)\n\tprefetcht0 (%1)" ::"r"(far), "r"(near) : "memory");
}

constexpr int kTiles = 4;  // row tiles that pass by together, so that activations are loaded once

// Outputs of `tiles` row tiles; out of line, because it is rare.
template <Format F, int kPlanes>
[[gnu::noinline]] void write(const Epilogue& epilogue, std::int64_t first_token, std::int64_t m,
                             std::int64_t first, std::int64_t tiles, const std::byte* sums) {
  __m512 scales[kTiles];
  for (std::int64_t n = 0; n < tiles; ++n) {
    scales[n] = row_scales<F>(epilogue.rows.packed + (first + n) * epilogue.rows.layout.tile_bytes);
  }
  write_outputs(epilogue, first_token, m, first, tiles,
                [&](std::int64_t t, std::int64_t tile) LOWBIT_LAMBDA {
                  const std::byte* at = sums + (tile - first) * kTileBytes;
                  __m512 total = _mm512_load_ps(at + t * 64);
                  if constexpr (kPlanes == 2) {
                    total = _mm512_add_ps(total, _mm512_load_ps(at + (m + t) * 64));
                  }
                  return _mm512_mul_ps(total, scales[tile - first]);
                });
}

std::int64_t scratch_bytes(const RowBlock&, const Activations&) {
  return kTiles * (kRing + 2) * kTileBytes;
}

// kCount row tiles at a time, from tile_begin on as many as make up such groups.
template <Format F, int kPlanes, int kCount>
void run_tiles(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::byte* scratch) {
  constexpr bool kDirect = F == Format::kBf16;  // tiles as they lie
  constexpr std::int64_t kHead = kHasRowScale<F> ? kUnitBytes : 0;
  constexpr std::int64_t kStepBytes = Rows<F>::kStepBytes;
  const Rows<F> unpack;
  const Epilogue epilogue(rows, 1.0f);
  const std::int64_t tile_bytes = rows.layout.tile_bytes, token_bytes = a.m * kPlanes * 64;
  std::byte* const operands = scratch;
  std::byte* const sums = operands + kTiles * kRing * kTileBytes;
  const std::size_t per_tile = static_cast<std::size_t>(a.k_padded / kInputBlock);
  const std::size_t steps = static_cast<std::size_t>((tile_end - tile_begin) / kCount) * per_tile;
  const std::byte* codes = rows.packed + tile_begin * tile_bytes + kHead;
  const std::byte* late = codes;  // what is multiplied, of bf16
  const std::byte* end = codes + static_cast<std::int64_t>(per_tile) * kStepBytes;
  const std::int64_t skip = (kCount - 1) * tile_bytes + kHead;  // to the next group
  std::size_t multiplied = 0;                                   // of a row tile
  std::int64_t tile = tile_begin, waiting = -1;
  const auto write_waiting = [&] {
    write<F, kPlanes>(epilogue, first_token, a.m, waiting, kCount,
                      sums + (waiting - tile_begin) / kCount % 2 * kTiles * kTileBytes);
  };
  const std::byte* x = a.data;
  unroll<kCount>([&](auto n) LOWBIT_LAMBDA { tile_zero<n>(); });
  for (std::size_t s = 0; s < steps + kBehind; ++s) {
    if (s - kBehind < steps) {
      tile_load<4>(x, 64);
      unroll<kCount>([&](auto n) LOWBIT_LAMBDA {
        tile_load<5 + n % 3>(kDirect ? late + n * tile_bytes
                                     : operands + ((s - kBehind) % kRing * kTiles + n) * kTileBytes,
                             64);
        tile_multiply<n, 4, 5 + n % 3>();
      });
      if constexpr (kDirect) late += kTileBytes;
      x += token_bytes;
      if (++multiplied == per_tile) {
        unroll<kCount>([&](auto n) LOWBIT_LAMBDA {
          tile_store<n>(sums + ((tile - tile_begin) / kCount % 2 * kTiles + n) * kTileBytes, 64);
          tile_zero<n>();
        });
        if constexpr (kDirect) late += skip;
        multiplied = 0;
        x = a.data;
        if (waiting >= 0) write_waiting();
        waiting = tile;
        tile += kCount;
      }
    }
    if (s < steps) {
      const std::byte* far = codes + kFar;
      far = far < end ? far : far + skip;
      const std::byte* near = codes + kNear;
      near = near < end ? near : near + skip;
      std::byte* to = operands + s % kRing * kTiles * kTileBytes;
      unroll<kCount>([&](auto n) LOWBIT_LAMBDA {
        unroll<8>([&](auto i) LOWBIT_LAMBDA {
          unroll<static_cast<int>(kStepBytes / 512)>([&](auto line) LOWBIT_LAMBDA {
            const std::int64_t at = n * tile_bytes + (i * kStepBytes / 512 + line) * 64;
            fetch_line(far + at, near + at);
          });
          if constexpr (!kDirect) {
            __m512i out[2];
            unpack.template quad<i>(codes + n * tile_bytes, out);
            _mm512_store_si512(to + n * kTileBytes + i * 128, out[0]);
            _mm512_store_si512(to + n * kTileBytes + i * 128 + 64, out[1]);
          }
        });
      });
      codes += kStepBytes;
      if (codes == end) {
        codes += skip;
        end += kCount * tile_bytes;
      }
    }
  }
  if (waiting >= 0) write_waiting();
}

template <Format F, int kPlanes>
void run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
         std::int64_t tile_begin, std::int64_t tile_end, std::int64_t, std::int64_t, std::int64_t,
         std::byte* scratch) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<std::uint8_t>(tile <= 4 ? a.m * kPlanes : 16);
  }
  const TileSession session(config);
  const std::int64_t whole = tile_begin + (tile_end - tile_begin) / kTiles * kTiles;
  run_tiles<F, kPlanes, kTiles>(rows, a, first_token, tile_begin, whole, scratch);
  run_tiles<F, kPlanes, 1>(rows, a, first_token, whole, tile_end, scratch);
  _mm_sfence();  // outputs that went past the caches, before anybody is told
}

template <Format F, int kPlanes>
constexpr Path few_path(const char* name, const char* activations) {
  return {name,
          activations,
          activation_bytes<kPlanes>,
          prepare<kHasRowScale<F>, kPlanes>,
          scratch_bytes,
          run<F, kPlanes>,
          1,
          16,
          false};
}

constexpr Path kPaths[] = {
    few_path<Format::kFp8E4M3, 1>("amx.bf16.few.fp8_e4m3", "amx.few.bf16.quad"),
    few_path<Format::kFp8E5M2, 1>("amx.bf16.few.fp8_e5m2", "amx.few.bf16.quad"),
    few_path<Format::kFp16, 1>("amx.bf16.few.fp16", "amx.few.bf16"),
    few_path<Format::kBf16, 1>("amx.bf16.few.bf16", "amx.few.bf16"),
};
constexpr Path kPaths2[] = {
    few_path<Format::kFp8E4M3, 2>("amx.bf16x2.few.fp8_e4m3", "amx.few.bf16x2.quad"),
    few_path<Format::kFp8E5M2, 2>("amx.bf16x2.few.fp8_e5m2", "amx.few.bf16x2.quad"),
};

int index_of(Format format) {
  return static_cast<int>(format) - static_cast<int>(Format::kFp8E4M3);
}

}  // namespace

namespace amx {

const Path* few_bf16(Format format) {
  return &kPaths[index_of(format)];
}
const Path* few_bf16x2(Format format) {
  return &kPaths2[index_of(format)];
}

}  // namespace amx
}  // namespace lowbit::cpu
