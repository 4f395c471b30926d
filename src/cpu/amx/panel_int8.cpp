// Many tokens, grouped formats, int8 activations by tiles.
//
// A tile of A is 16 tokens x 64 inputs, as quantized; a tile of B is 16 quads (4 inputs) x 16
// outputs: what packed codes unpack to. One step multiplies 16 tokens by 32 outputs over a chunk of
// up to four groups, products whose integer sums go to L1, and meanwhile adds the sums of the step
// before to float totals: tile and vector units work side by side. Next to tile instructions
// 512-bit float instructions have one pipe instead of two, so the end of a group is what counts:
// two multiply-adds for 16 sums, since adding the bits of 1.5 * 2^23, on the pipe that is closed to
// floats, makes an integer a float.
//
//   codes   [groups of the chunk][2 row tiles][16 quads][16 outputs][4 inputs] int8
//   steps   [2][groups of the chunk][2 row tiles] scales, and -kBias * scales
//   sums    [2][groups of the chunk][16 tokens][32 outputs] int32
//   kept    [panels][tokens][32 outputs] float32: totals between chunks of K
//
// All but `kept` stays in L1: what misses it costs a tile store four times its time. Minima are a
// product of their own at the end, of bfloat16 tiles over the groups: minima times sums of
// activations, both as the sum of two bfloat16.
#include "cpu/amx/paths.h"
#include "cpu/amx/tiles.h"
#include "cpu/generic/avx512_codes.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

constexpr int kTokens = 16;
constexpr int kTiles = 2;    // row tiles of a panel
constexpr int kRows = 8;     // tokens whose totals are in registers: kRows * kTiles are 16
constexpr int kPanels = 16;  // that take turns at a chunk
constexpr std::int64_t kStay = 1 << 20;                    // bytes of activations that stay in L2
constexpr std::int64_t kRowBytes = kTiles * 64;            // 32 outputs, four bytes each
constexpr std::int64_t kBlockBytes = kTokens * kRowBytes;  // of sums or totals
constexpr std::int64_t kTileBytes = 1024;
constexpr int kGroupsPerTile = 32;  // in products of minima

// How groups of a size are cut into products and chunks.
struct Shape {
  std::int64_t group, groups, products, tile_bytes, record, chunk, blocks;

  // Groups of 32 take tiles of half the depth, larger ones several tiles.
  LOWBIT_INLINE explicit Shape(const Activations& a)
      : group(a.group),
        groups(a.groups),
        products(a.group <= 64 ? 1 : a.group / 64),
        tile_bytes(a.group < 64 ? 512 : 1024),
        record(64 + products * tile_bytes),
        chunk(products == 1 ? 4 : 4 / products),
        blocks((a.m + kTokens - 1) / kTokens) {}

  // Record of a block of tokens and a group: 16 scales, then tiles; in the order chunk, block,
  // group.
  LOWBIT_INLINE std::int64_t at(std::int64_t block, std::int64_t g) const {
    const std::int64_t begin = g / chunk * chunk;
    return (begin * blocks + block * in_chunk(begin) + g - begin) * record;
  }
  LOWBIT_INLINE std::int64_t in_chunk(std::int64_t begin) const {
    return begin + chunk < groups ? chunk : groups - begin;
  }
  // Sums of a block's activations follow: [first, second part][32 groups at a time][16 tokens].
  LOWBIT_INLINE std::int64_t deep() const { return (groups + kGroupsPerTile - 1) / kGroupsPerTile; }
  LOWBIT_INLINE std::int64_t sums_at(std::int64_t block, std::int64_t part) const {
    return blocks * groups * record + (block * 2 + part) * deep() * kTileBytes;
  }
};

template <bool kMinimum>
std::int64_t activation_bytes(const Activations& a) {
  const Shape shape(a);
  return shape.sums_at(kMinimum ? shape.blocks : 0, 0);
}

template <bool kMinimum>
void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const Shape shape(a);
  const __m512i order = packed_order(tokens.dtype);
  const std::int64_t depth = shape.tile_bytes / kTokens;
  // The last block is filled up with zeros.
  const std::int64_t stop = end == a.m ? shape.blocks * kTokens : end;
  for (std::int64_t t = begin; t < stop; ++t) {
    const std::int64_t block = t / kTokens, slot = t % kTokens;
    std::byte* sums = a.data + shape.sums_at(block, 0) + slot * 64;
    std::byte* rest = a.data + shape.sums_at(block, 1) + slot * 64;
    if constexpr (kMinimum) {
      for (std::int64_t i = 0; i < shape.deep(); ++i) {
        _mm512_store_si512(sums + i * kTileBytes, _mm512_setzero_si512());
        _mm512_store_si512(rest + i * kTileBytes, _mm512_setzero_si512());
      }
    }
    for (std::int64_t g = 0; g < shape.groups; ++g) {
      std::byte* record = a.data + shape.at(block, g);
      std::byte* tile = record + 64 + slot * depth;
      const std::int64_t from = t * tokens.stride + g * shape.group;
      const std::int64_t inputs = t < a.m ? a.k - g * shape.group : 0;
      const auto put_bytes = [&](int, std::int64_t k, __m512i bytes, bool whole) LOWBIT_LAMBDA {
        if (whole) {
          _mm512_store_si512(tile + k / 64 * kTileBytes, bytes);
        } else {
          _mm256_store_si256(reinterpret_cast<__m256i*>(tile), _mm512_castsi512_si256(bytes));
        }
      };
      const Quantized<1> quantized =
          quantize_group<1>(tokens, from, inputs, shape.group, order, put_bytes);
      const float step = quantized.step;
      __builtin_memcpy(record + slot * 4, &step, 4);
      if constexpr (kMinimum) {
        const float sum = step * static_cast<float>(quantized.sum());
        const auto put = [&](std::byte* part, float value) LOWBIT_LAMBDA {
          const __m128i bits = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(value));
          const auto word = static_cast<std::uint16_t>(_mm_cvtsi128_si32(bits));
          __builtin_memcpy(part + g / kGroupsPerTile * kTileBytes + g % kGroupsPerTile * 2, &word,
                           2);
          const std::uint32_t wide = std::uint32_t{word} << 16;
          float rounded;
          __builtin_memcpy(&rounded, &wide, 4);
          return value - rounded;
        };
        put(rest, put(sums, sum));
      }
    }
  }
}

// Of a chunk: up to four products deep.
constexpr std::int64_t kCodeBytes = 4 * kTiles * kTileBytes;
constexpr std::int64_t kSumBytes = 4 * kBlockBytes;
constexpr std::int64_t kStepFloats = 4 * kTiles * 32;

struct Panel {
  std::byte* codes;
  float* steps;
  std::byte* sums;
  std::byte* kept;
  std::byte* minima;  // [row tiles][2 parts][32 groups at a time][16 pairs of groups][16 outputs]
};

LOWBIT_INLINE Panel make_panel(std::byte* scratch, const Shape& shape) {
  Panel panel;
  panel.codes = scratch;
  panel.sums = panel.codes + kCodeBytes;
  panel.steps = reinterpret_cast<float*>(panel.sums + 2 * kSumBytes);
  panel.minima = reinterpret_cast<std::byte*>(panel.steps + 2 * kStepFloats);
  panel.kept = panel.minima + kPanels * kTiles * 2 * shape.deep() * kTileBytes;
  return panel;
}

std::int64_t scratch_bytes(const RowBlock&, const Activations& a) {
  const Shape shape(a);
  return kCodeBytes + 2 * kSumBytes + 2 * kStepFloats * 4 +
         kPanels * (kTiles * 2 * shape.deep() * kTileBytes + shape.blocks * kBlockBytes);
}

// Signed operands of groups [begin, end) of one row tile.
template <Format F>
void expand(const Operand<F>& operand, const std::byte* tile,
            const GroupWalk<Grouped<F>::kMinimum>& walk, const Shape& shape, std::int64_t begin,
            std::int64_t end, std::byte* to, float* steps, std::byte* minima) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(Grouped<F>::kZero));
  for (std::int64_t g = begin; g < end; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    std::byte* at = to;
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      const auto plane = Operand<F>::Codes::plane(codes, inputs, b);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        __m512i quad = operand.template quad<i>(codes, b, plane);
        if constexpr (Grouped<F>::kZero != 0) quad = _mm512_sub_epi8(quad, zero);
        _mm512_store_si512(at + i * 64, quad);
      });
      at += 8 * 64;
    }
    const __m512 scale = load_halves(tile + walk.scales(g));
    _mm512_store_ps(steps, scale);
    _mm512_store_ps(steps + 16, _mm512_mul_ps(scale, _mm512_set1_ps(-kBias)));
    if constexpr (Grouped<F>::kMinimum) {
      const __m512 minimum = load_halves(tile + walk.scales(g) + 32);
      const auto put = [&](std::int64_t part, __m512 value) LOWBIT_LAMBDA {
        const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
        const __m512i high = _mm512_slli_epi32(bits, 16);
        std::byte* pair = minima + (part * shape.deep() + g / kGroupsPerTile) * kTileBytes +
                          g % kGroupsPerTile / 2 * 64;
        _mm512_store_si512(pair,
                           g % 2 == 0 ? bits : _mm512_or_si512(high, _mm512_load_si512(pair)));
        return _mm512_sub_ps(value, _mm512_castsi512_ps(high));
      };
      put(1, put(0, minimum));
    }
    to += kTiles * shape.products * shape.tile_bytes;
    steps += kTiles * 32;
  }
}

// The packed bytes that are unpacked next, of two row tiles, asked for a few lines at a time.
struct Ahead {
  const std::byte* at;
  std::int64_t left, second, lines;  // bytes; distance of the other row tile; lines at a time

  LOWBIT_INLINE void fetch() {
    for (std::int64_t i = 0; i < lines && left > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(at + second), _MM_HINT_T1);
      at += 64;
      left -= 64;
    }
  }
};

// What a step multiplies: one block of tokens, one panel, kGroups groups.
struct Multiply {
  const std::byte* record;
  const std::byte* codes;
  std::byte* sums;
  std::byte* sums_before;  // of the step before
};
// And what it adds up, of the step before.
struct Add {
  const std::byte* record;
  const float* steps;
  const std::byte* sums;
  float* kept;
  std::int64_t tokens;
  bool first;
};

// Products are in the order group, tile; they take turns at four accumulators, and sums are stored
// two products later.
template <int kIndex>
LOWBIT_INLINE void store_one(std::byte* sums) {
  tile_store<kIndex % 4>(sums + kIndex / kTiles * kBlockBytes + kIndex % kTiles * 64, kRowBytes);
}

// The last two of a step are stored in the next one, which adds them up, unless it needs them at
// once.
template <int kGroups>
constexpr bool kCarry = kGroups > 1;

template <int kGroups, int kProducts, int kIndex, bool kBehind>
LOWBIT_INLINE void multiply_one(const Multiply& work, const Shape& shape) {
  constexpr int kGroup = kIndex / kTiles, kTile = kIndex % kTiles, kTo = kIndex % 4;
  const std::int64_t depth = shape.tile_bytes / kTokens;
  const std::byte* record = work.record + kGroup * shape.record + 64;
  const std::byte* codes = work.codes + kIndex * kProducts * shape.tile_bytes;
  if constexpr (kIndex >= 2) {
    store_one<kIndex - 2>(work.sums);
  } else if constexpr (kBehind && kCarry<kGroups>) {
    store_one<kGroups * kTiles - 2 + kIndex>(work.sums_before);
  }
  tile_zero<kTo>();
  unroll<kProducts>([&](auto p) LOWBIT_LAMBDA {
    // Operands take turns: A at tiles 4 and 7, B at 5 and 6. Up to two A are held for all of a
    // group.
    constexpr int kB = 5 + (kTile * kProducts + p) % 2;
    constexpr int kA = (kProducts == 1 ? kGroup : int{p}) % 2 == 0 ? 4 : 7;
    if constexpr (kTile == 0 || kProducts > 2) tile_load<kA>(record + p * kTileBytes, depth);
    tile_load<kB>(codes + p * kTileBytes, 64);
    tile_multiply_int8<kTo, kA, kB>();
  });
}

template <int kGroups>
LOWBIT_INLINE void store_last(std::byte* sums) {
  store_one<kGroups * kTiles - 2>(sums);
  store_one<kGroups * kTiles - 1>(sums);
}

template <int kGroups, int kProducts>
void multiply_alone(const Multiply& work, const Shape& shape) {
  unroll<kGroups * kTiles>(
      [&](auto i) LOWBIT_LAMBDA { multiply_one<kGroups, kProducts, i, false>(work, shape); });
  if constexpr (!kCarry<kGroups>) store_last<kGroups>(work.sums);
}

template <int kGroups, int kProducts, bool kMultiply>
void step(const Multiply& work, const Add& add, const Shape& shape, Ahead& ahead) {
  const __m512i bias = _mm512_set1_epi32(kBiasBits);
  if constexpr (!kMultiply && kCarry<kGroups>) store_last<kGroups>(work.sums_before);
  unroll<kTokens / kRows>([&](auto u) LOWBIT_LAMBDA {
    const auto multiply = [&](auto g) LOWBIT_LAMBDA {
      ahead.fetch();
      if constexpr (kMultiply) {
        multiply_one<kGroups, kProducts, u * kGroups + g, true>(work, shape);
      }
    };
    if (u * kRows >= add.tokens) {
      unroll<kGroups>(multiply);
      return;
    }
    float* kept = add.kept + u * 16 * 16;
    __m512 total[kRows][kTiles];
    unroll<16>([&](auto i) LOWBIT_LAMBDA {
      total[i / kTiles][i % kTiles] =
          add.first ? _mm512_setzero_ps() : _mm512_load_ps(kept + i * 16);
    });
    unroll<kGroups>([&](auto g) LOWBIT_LAMBDA {
      multiply(g);
      const float* steps = add.steps + g * kTiles * 32;
      const std::byte* sums = add.sums + g * kBlockBytes + u * kRows * kRowBytes;
      __m512 scale[kTiles], offset[kTiles];
      unroll<kTiles>([&](auto n) LOWBIT_LAMBDA {
        scale[n] = _mm512_load_ps(steps + n * 32);
        offset[n] = _mm512_load_ps(steps + n * 32 + 16);
      });
      unroll<kRows>([&](auto t) LOWBIT_LAMBDA {
        const __m512 x = broadcast_f32(add.record + g * shape.record + (u * kRows + t) * 4);
        unroll<kTiles>([&](auto n) LOWBIT_LAMBDA {
          const __m512i sum =
              _mm512_add_epi32(bias, _mm512_load_si512(sums + t * kRowBytes + n * 64));
          const __m512 value = _mm512_fmadd_ps(_mm512_castsi512_ps(sum), scale[n], offset[n]);
          total[t][n] = _mm512_fmadd_ps(value, x, total[t][n]);
        });
      });
    });
    unroll<16>([&](auto i) LOWBIT_LAMBDA {
      _mm512_store_ps(kept + i * 16, total[i / kTiles][i % kTiles]);
    });
  });
  if constexpr (kMultiply && !kCarry<kGroups>) store_last<kGroups>(work.sums);
}

using StepFn = void (*)(const Multiply&, const Add&, const Shape&, Ahead&);
struct Steps {
  void (*multiply)(const Multiply&, const Shape&);
  StepFn both, add;
};
template <int kGroups, int kProducts>
constexpr Steps kSteps = {multiply_alone<kGroups, kProducts>, step<kGroups, kProducts, true>,
                          step<kGroups, kProducts, false>};

const Steps& steps_for(std::int64_t groups, std::int64_t products) {
  if (products == 4) return kSteps<1, 4>;
  if (products == 2) return groups == 1 ? kSteps<1, 2> : kSteps<2, 2>;
  return groups == 1 ? kSteps<1, 1> : groups < 4 ? kSteps<2, 1> : kSteps<4, 1>;
}

// totals += minima times sums of activations.
void add_minima(const std::byte* sums, const std::byte* rest, const std::byte* minima,
                const Shape& shape, std::byte* kept) {
  const std::int64_t part = shape.deep() * kTileBytes;
  const std::byte* left = minima;
  const std::byte* right = minima + 2 * part;
  tile_load<0>(kept, kRowBytes);
  tile_load<1>(kept + 64, kRowBytes);
  for (std::int64_t i = 0; i < part; i += kTileBytes) {
    tile_load<2>(sums + i, 64);
    tile_load<3>(left + i, 64);
    tile_multiply<0, 2, 3>();
    tile_load<3>(right + i, 64);
    tile_multiply<1, 2, 3>();
    tile_load<3>(left + part + i, 64);
    tile_multiply<0, 2, 3>();
    tile_load<3>(right + part + i, 64);
    tile_multiply<1, 2, 3>();
    tile_load<2>(rest + i, 64);
    tile_load<3>(left + i, 64);
    tile_multiply<0, 2, 3>();
    tile_load<3>(right + i, 64);
    tile_multiply<1, 2, 3>();
  }
  tile_store<0>(kept, kRowBytes);
  tile_store<1>(kept + 64, kRowBytes);
}

template <Format F>
void run_panel(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
               std::int64_t token_end, std::int64_t next_tile, std::byte* scratch) {
  constexpr bool kMinimum = Grouped<F>::kMinimum;
  const Operand<F> operand;
  const Layout& layout = rows.layout;
  const GroupWalk<kMinimum> walk(layout);
  const Shape shape(a);
  const Epilogue epilogue(rows, Grouped<F>::kValueScale);
  const Panel panel = make_panel(scratch, shape);
  const std::int64_t block_begin = token_begin / kTokens;
  const std::int64_t block_end = (token_end + kTokens - 1) / kTokens;
  const std::int64_t blocks = block_end - block_begin;
  const std::int64_t minima_bytes = 2 * shape.deep() * kTileBytes;
  // Few tokens stay in L2 while one panel after another goes through all of K; of more tokens a
  // chunk of K does, for several panels.
  const std::int64_t most = shape.blocks * shape.groups * shape.record > kStay ? kPanels : 1;
  const TileSession session(static_cast<int>(shape.tile_bytes / kTokens));
  for (std::int64_t band = tile_begin; band < tile_end; band += most * kTiles) {
    const std::int64_t band_end = band + most * kTiles < tile_end ? band + most * kTiles : tile_end;
    const std::int64_t panels = (band_end - band + kTiles - 1) / kTiles;
    const auto tiles_of = [&](std::int64_t p) LOWBIT_LAMBDA {
      const std::int64_t left = layout.tiles - (band + p * kTiles);
      return left < kTiles ? left : std::int64_t{kTiles};
    };
    if constexpr (kMinimum) {
      for (std::int64_t i = 0; i < panels * kTiles * minima_bytes; i += 64) {
        _mm512_store_si512(panel.minima + i, _mm512_setzero_si512());
      }
    }
    const Steps* pending = nullptr;
    Add add{};
    std::int64_t turn = 0, step_number = 0;
    for (std::int64_t g = 0; g < shape.groups;) {
      const std::int64_t held = shape.in_chunk(g / shape.chunk * shape.chunk);
      // Three groups at the end are two and one.
      const std::int64_t left = g / shape.chunk * shape.chunk + held - g;
      const std::int64_t count = left == 3 ? 2 : left;
      const Steps& steps = steps_for(count, shape.products);
      for (std::int64_t p = 0; p < panels; ++p, ++turn) {
        float* scales = panel.steps + turn % 2 * kStepFloats;
        for (int n = 0; n < kTiles; ++n) {
          if (n < tiles_of(p)) {
            expand<F>(operand, rows.packed + (band + p * kTiles + n) * layout.tile_bytes, walk,
                      shape, g, g + count, panel.codes + n * shape.products * shape.tile_bytes,
                      scales + n * 32, panel.minima + (p * kTiles + n) * minima_bytes);
          } else {
            for (std::int64_t i = 0; i < count * kTiles; i += kTiles) {
              _mm512_store_ps(scales + (i + n) * 32, _mm512_setzero_ps());
              _mm512_store_ps(scales + (i + n) * 32 + 16, _mm512_setzero_ps());
            }
          }
        }
        // The next panel, or the next chunk of the first one.
        Ahead ahead{};
        const std::int64_t next_g = p + 1 < panels ? g : g + count;
        const std::int64_t next = next_g < shape.groups
                                      ? band + (p + 1 < panels ? p + 1 : 0) * kTiles
                                      : (band_end < tile_end ? band_end : next_tile);
        if (next >= 0 && next + 1 < layout.tiles) {
          const std::int64_t from = next_g < shape.groups ? next_g : 0;
          const std::int64_t to =
              from + count < shape.groups ? walk.codes(from + count) : layout.tile_bytes;
          ahead = {rows.packed + next * layout.tile_bytes + walk.codes(from), to - walk.codes(from),
                   layout.tile_bytes, 0};
          const std::int64_t units = blocks * count * kTiles;
          ahead.lines = (ahead.left / 64 + units) / units;
        }
        for (std::int64_t block = block_begin; block < block_end; ++block, ++step_number) {
          std::byte* sums = panel.sums + step_number % 2 * kSumBytes;
          std::byte* before = panel.sums + (step_number + 1) % 2 * kSumBytes;
          const Multiply work{a.data + shape.at(block, g), panel.codes, sums, before};
          if (pending == &steps) {
            steps.both(work, add, shape, ahead);
          } else {
            if (pending != nullptr) pending->add(work, add, shape, ahead);
            steps.multiply(work, shape);
          }
          pending = &steps;
          const std::int64_t left_tokens = token_end - block * kTokens;
          add = {work.record,
                 scales,
                 sums,
                 reinterpret_cast<float*>(panel.kept +
                                          (p * blocks + block - block_begin) * kBlockBytes),
                 left_tokens < kTokens ? left_tokens : std::int64_t{kTokens},
                 g == 0};
        }
      }
      g += count;
    }
    Ahead none{};
    pending->add(
        Multiply{nullptr, nullptr, nullptr, panel.sums + (step_number + 1) % 2 * kSumBytes}, add,
        shape, none);
    for (std::int64_t i = 0; i < panels * blocks; ++i) {
      const std::int64_t p = i / blocks, block = block_begin + i % blocks;
      std::byte* kept = panel.kept + i * kBlockBytes;
      if constexpr (kMinimum) {
        add_minima(a.data + shape.sums_at(block, 0), a.data + shape.sums_at(block, 1),
                   panel.minima + p * kTiles * minima_bytes, shape, kept);
      }
      for (std::int64_t t = block * kTokens; t < token_end && t < (block + 1) * kTokens; ++t) {
        const std::byte* row = kept + (t - block * kTokens) * kRowBytes;
        for (std::int64_t n = 0; n < tiles_of(p); ++n) {
          epilogue.store(first_token + t, band + p * kTiles + n, _mm512_load_ps(row + n * 64));
        }
      }
    }
  }
}

template <Format F>
constexpr Path panel_path(const char* name) {
  constexpr bool kMinimum = Grouped<F>::kMinimum;
  return {name,
          kMinimum ? "amx.int8.sums" : "amx.int8",
          activation_bytes<kMinimum>,
          prepare<kMinimum>,
          scratch_bytes,
          run_panel<F>,
          2 * kTiles,
          kTokens,
          true};
}

constexpr Path kPaths[] = {
    panel_path<Format::kSymInt4>("amx.int8.panel.sym_int4"),
    panel_path<Format::kAsymInt4>("amx.int8.panel.asym_int4"),
    panel_path<Format::kSymInt5>("amx.int8.panel.sym_int5"),
    panel_path<Format::kAsymInt5>("amx.int8.panel.asym_int5"),
    panel_path<Format::kSymInt8>("amx.int8.panel.sym_int8"),
    panel_path<Format::kNf3>("amx.int8.panel.nf3"),
    panel_path<Format::kNf4>("amx.int8.panel.nf4"),
    panel_path<Format::kFp4>("amx.int8.panel.fp4"),
};

}  // namespace

namespace amx {

const Path* panel_int8(Format format) {
  return &kPaths[static_cast<int>(format)];
}

}  // namespace amx
}  // namespace lowbit::cpu
