// Products in bf16 by tiles, any format: out[48 tokens][32 outputs] += A B, A 16 tokens x 32 inputs
// and B 32 inputs x 16 outputs in a tile each. Weights become bf16, the scale of their group
// included, in memory that stays in L2. Those of the bf16 format lie in packed tiles as a B tile
// wants them: few tokens multiply them where they are.
//
// Loops, from the outside:
//   groups of up to 384 outputs      (few tokens: 32)
//   chunks of about 256 inputs       (few tokens: 1024), whose weights stay in L2
//   blocks of up to 48 tokens, whose 24 KiB of activations stay in L1
//   pairs of output tiles            sums come from L2 and go back there
// While tiles multiply, the vector units do the rest: they expand the next chunk, block of 32 x 16
// by block, fetch what that will read, and write the outputs that are complete. Out of order, all
// of it runs side by side.
#include "cpu/amx/bf16_operands.h"
#include "cpu/amx/paths.h"

namespace lowbit::cpu {
namespace {

constexpr int kMostTiles = 3;    // of tokens, multiplied together
constexpr int kGroupTiles = 24;  // of outputs
constexpr std::int64_t kChunk = 256, kFewChunk = 1024;

// How a matrix is cut.
struct Plan {
  bool few;
  std::int64_t group_tiles, chunk;  // output tiles; inputs
  std::int64_t panel_bytes, group_bytes, sums_bytes, sums_sets;

  Plan(std::int64_t k_padded, std::int64_t tokens) {
    const std::int64_t tiles = divide_up(tokens, kTileTokens);
    few = tiles <= kMostTiles;
    group_tiles = few ? 2 : kGroupTiles;
    const std::int64_t chunks = divide_up(k_padded, few ? kFewChunk : kChunk);
    chunk = divide_up(divide_up(k_padded, chunks), kInputBlock) * kInputBlock;
    // Panels of one output tile are apart by an odd number of KiB and so in other sets of a cache.
    panel_bytes = (chunk / kInputBlock | 1) * kTile;
    group_bytes = group_tiles * panel_bytes;
    // Few tokens have one block, whose sums are written while the next group's are made.
    sums_bytes = tiles * group_tiles * kTile;
    sums_sets = few ? 2 : 1;
  }
};

struct Chunk {
  std::int64_t tile = 0, tiles = 0, k0 = 0, k1 = 0;
  std::int64_t blocks() const { return tiles * ((k1 - k0) / kInputBlock); }
};

// A position in a chunk, block of 32 inputs by block, row tile by row tile.
struct Cursor {
  std::int64_t tile_begin, tile, tile_end, k0, k1, k;
  explicit Cursor(const Chunk& chunk)
      : tile_begin(chunk.tile),
        tile(chunk.tile),
        tile_end(chunk.tile + chunk.tiles),
        k0(chunk.k0),
        k1(chunk.k1),
        k(chunk.k0) {}
  LOWBIT_INLINE bool done() const { return tile >= tile_end; }
  LOWBIT_INLINE void next() {
    k += kInputBlock;
    if (k < k1) return;
    k = k0;
    ++tile;
  }
};

// Expands a chunk a block at a time, in step with something else.
template <Format F>
class Feed {
 public:
  // to: nothing is expanded where there is none.
  Feed(const RowBlock& rows, const AnyWalk<F>& walk, const Chunk& chunk, std::byte* to,
       std::int64_t panel_bytes, std::int64_t steps)
      : rows_(rows),
        walk_(walk),
        at_(chunk),
        ahead_(chunk),
        to_(to),
        panel_bytes_(panel_bytes),
        left_(chunk.blocks()),
        rate_(steps > 0 ? (left_ * kUnit + steps - 1) / steps : 0) {
    constexpr std::int64_t kDistance = 4096 / Brain<F>::kBlockBytes;
    if (to != nullptr) {
      for (std::int64_t i = 0; i < kDistance; ++i) fetch();
    }
  }
  // Called `steps` times.
  LOWBIT_INLINE void step() {
    credit_ += rate_;
    while (credit_ >= kUnit) {
      credit_ -= kUnit;
      if (left_ > 0) block();
    }
  }
  void finish() {
    while (left_ > 0) block();
  }

 private:
  static constexpr std::int64_t kUnit = 1 << 16;

  [[gnu::noinline]] void block() {
    --left_;
    fetch();
    if (to_ == nullptr) return;
    Floats<F> floats;
    std::byte* const to =
        to_ + (at_.tile - at_.tile_begin) * panel_bytes_ + (at_.k - at_.k0) / kInputBlock * kTile;
    Brain<F>::expand_block(floats, walk_, rows_.packed + at_.tile * rows_.layout.tile_bytes, at_.k,
                           to);
    at_.next();
  }
  LOWBIT_INLINE void fetch() {
    if (ahead_.done()) return;
    const auto* from = reinterpret_cast<const char*>(
        rows_.packed + ahead_.tile * rows_.layout.tile_bytes + Brain<F>::codes_at(walk_, ahead_.k));
    unroll<static_cast<int>((Brain<F>::kBlockBytes + 63) / 64)>(
        [&](auto i) LOWBIT_LAMBDA { _mm_prefetch(from + i * 64, _MM_HINT_T1); });
    ahead_.next();
  }

  const RowBlock& rows_;
  const AnyWalk<F>& walk_;
  Cursor at_, ahead_;
  std::byte* to_;
  std::int64_t panel_bytes_, left_, rate_, credit_ = 0;
};

// What sums of a group become outputs with: row scales and biases.
struct GroupFactors {
  alignas(64) float scale[kGroupTiles * kTileRows];
  alignas(64) float bias[kGroupTiles * kTileRows];
};

// Writes the outputs of a block of tokens whose sums are complete, token by token.
template <Format F>
class Drain {
 public:
  explicit Drain(const RowBlock& rows) : rows_(rows) {}

  // sums: [pairs of output tiles][tiles of tokens][2][16][16]; token: row of out.
  void open(const std::byte* sums, std::int64_t tiles, const GroupFactors& factors,
            std::int64_t tile, std::int64_t tile_end, std::int64_t token, std::int64_t tokens,
            std::int64_t steps) {
    finish();
    sums_ = sums;
    pair_bytes_ = tiles * 2 * kTile;
    factors_ = &factors;
    tile_ = tile;
    tile_end_ = tile_end;
    token_ = token;
    at_ = 0;
    end_ = tokens;
    each_ = divide_up(tokens, steps);
  }
  // Called `steps` times.
  LOWBIT_INLINE void step() {
    if (at_ < end_) store(at_ + each_ < end_ ? at_ + each_ : end_);
  }
  void finish() {
    if (at_ < end_) store(end_);
  }
  // Before these sums change.
  void release(const std::byte* sums) {
    if (sums == sums_) finish();
  }

 private:
  [[gnu::noinline]] void store(std::int64_t end) {
    const __m512 exponent = _mm512_set1_ps(static_cast<float>(rows_.exponent));
    for (; at_ < end; ++at_) {
      const std::byte* from = sums_ + at_ / kTileTokens * 2 * kTile + at_ % kTileTokens * 64;
      for (std::int64_t tile = tile_; tile < tile_end_; tile += 2, from += pair_bytes_) {
        const std::int64_t row = tile * kTileRows, left = rows_.layout.n - row;
        const std::int64_t to = (token_ + at_) * rows_.out_stride + row;
        const std::int64_t factor = (tile - tile_) * kTileRows;
        __m512 value[2];
        unroll<2>([&](auto i) LOWBIT_LAMBDA {
          value[i] = _mm512_load_ps(from + i * kTile);
          if constexpr (kHasRowScale<F>) {
            value[i] =
                _mm512_mul_ps(value[i], _mm512_load_ps(factors_->scale + factor + i * kTileRows));
          }
          if (rows_.exponent != 0) value[i] = _mm512_scalef_ps(value[i], exponent);
          if (rows_.bias != nullptr) {
            value[i] =
                _mm512_add_ps(value[i], _mm512_load_ps(factors_->bias + factor + i * kTileRows));
          }
        });
        if (left >= 2 * kTileRows && rows_.out_dtype == DType::kBFloat16) {
          _mm512_storeu_si512(static_cast<std::uint16_t*>(rows_.out) + to,
                              (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
        } else if (left >= 2 * kTileRows && rows_.out_dtype == DType::kFloat32) {
          _mm512_storeu_ps(static_cast<float*>(rows_.out) + to, value[0]);
          _mm512_storeu_ps(static_cast<float*>(rows_.out) + to + kTileRows, value[1]);
        } else {
          store16(rows_.out, rows_.out_dtype, to, left, value[0]);
          if (left > kTileRows) {
            store16(rows_.out, rows_.out_dtype, to + kTileRows, left - kTileRows, value[1]);
          }
        }
      }
    }
  }

  const RowBlock& rows_;
  const std::byte* sums_ = nullptr;
  const GroupFactors* factors_ = nullptr;
  std::int64_t pair_bytes_ = 0, tile_ = 0, tile_end_ = 0, token_ = 0, at_ = 0, end_ = 0, each_ = 0;
};

template <Format F>
void fill_factors(const RowBlock& rows, std::int64_t tile, std::int64_t tiles, GroupFactors& to) {
  for (std::int64_t i = 0; i < tiles; ++i) {
    const std::int64_t row = (tile + i) * kTileRows;
    if constexpr (kHasRowScale<F>) {
      _mm512_store_ps(to.scale + i * kTileRows,
                      row_scales<F>(rows.packed + (tile + i) * rows.layout.tile_bytes));
    }
    if (rows.bias != nullptr) {
      _mm512_store_ps(to.bias + i * kTileRows,
                      load16(rows.bias, rows.bias_dtype, row, rows.layout.n - row));
    }
  }
}

// Lines of other activations, fetched to L2 a few at a time: pieces of `bytes`, stride apart.
struct Ahead {
  const std::byte* at;
  std::int64_t stride, bytes, pieces, done = 0;

  LOWBIT_INLINE void step() {
    if (pieces <= 0) return;
    unroll<4>([&](auto i) LOWBIT_LAMBDA {
      _mm_prefetch(reinterpret_cast<const char*>(at) + done + i * 64, _MM_HINT_T1);
    });
    done += 256;
    if (done < bytes) return;
    done = 0;
    at += stride;
    --pieces;
  }
};

// Scratch memory of a thread: this, factors of two groups, two chunks of weights, sums. This says
// what the first of two calls has expanded for the second; the driver zeroes it before the first
// call.
struct Expanded {
  const std::byte* packed;
  std::int64_t tile, tiles, half;
};
static_assert(sizeof(Expanded) <= 64);

template <Format F>
LOWBIT_INLINE bool multiplies_in_place(const Plan& plan) {
  return F == Format::kBf16 && plan.few;
}

template <Format F>
std::int64_t scratch_bytes(const RowBlock& rows, const Activations& a) {
  const Plan plan(rows.layout.k_padded, a.m);
  return 64 + 2 * static_cast<std::int64_t>(sizeof(GroupFactors)) +
         (multiplies_in_place<F>(plan) ? 0 : 2 * plan.group_bytes) +
         plan.sums_sets * plan.sums_bytes;
}

// Where the operands of a block of tokens are.
struct Operands {
  const std::byte* a;
  std::int64_t a_stride;  // between tiles of tokens
  const std::byte* b;
  std::int64_t b_stride;  // between tiles of outputs
  std::int64_t tiles;     // of outputs
  std::int64_t steps;     // of 32 inputs
  std::byte* c;           // [pairs][kTiles][2] tiles
  bool add;               // to what is in c
};

// c (+)= a b for all pairs of output tiles. step() is called once per 32 inputs and pair. The sums
// of one pair are written and those of the next one read between the first products of the next,
// one accumulator at a time, so that products never wait for either.
template <int kTiles, class Step>
LOWBIT_INLINE void multiply(const Operands& o, Ahead& ahead, const Step& step) {
  constexpr int kSumBytes = kTiles * 2 * kTile;
  const std::int64_t pairs = (o.tiles + 1) / 2;
  std::byte* c = o.c;
  for (std::int64_t p = 0; p < pairs; ++p, c += kSumBytes) {
    const std::byte* a = o.a;
    const std::byte* b0 = o.b + 2 * p * o.b_stride;
    const std::byte* b1 = 2 * p + 1 < o.tiles ? b0 + o.b_stride : b0;
    const std::byte* soon = c + kSumBytes;  // sums that are needed next
    const auto products = [&](const auto& change) LOWBIT_LAMBDA {
      if constexpr (kTiles == 3) {
        // Six accumulators leave a tile for each operand: of five operands the activations of two
        // are loaded again, from L1. Weights pass by L1, which is full of activations.
        change(std::integral_constant<int, 0>{});
        tile_load<6>(a, 64);
        tile_load_once<7>(b0, 64);
        tile_multiply<0, 6, 7>();
        change(std::integral_constant<int, 2>{});
        tile_load<6>(a + o.a_stride, 64);
        tile_multiply<2, 6, 7>();
        change(std::integral_constant<int, 4>{});
        tile_load<6>(a + 2 * o.a_stride, 64);
        tile_multiply<4, 6, 7>();
        change(std::integral_constant<int, 5>{});
        tile_load_once<7>(b1, 64);
        tile_multiply<5, 6, 7>();
        change(std::integral_constant<int, 3>{});
        tile_load<6>(a + o.a_stride, 64);
        tile_multiply<3, 6, 7>();
        change(std::integral_constant<int, 1>{});
        tile_load<6>(a, 64);
        tile_multiply<1, 6, 7>();
      } else {
        change(std::integral_constant<int, 0>{});
        tile_load<4>(a, 64);
        tile_load_once<6>(b0, 64);
        tile_multiply<0, 4, 6>();
        change(std::integral_constant<int, 1>{});
        tile_load_once<7>(b1, 64);
        tile_multiply<1, 4, 7>();
        if constexpr (kTiles == 2) {
          change(std::integral_constant<int, 2>{});
          tile_load<5>(a + o.a_stride, 64);
          tile_multiply<2, 5, 6>();
          change(std::integral_constant<int, 3>{});
          tile_multiply<3, 5, 7>();
        }
      }
      a += kTile;
      b0 += kTile;
      b1 += kTile;
    };
    const auto fetch_sums = [&]() LOWBIT_LAMBDA {
      if (soon >= c + 2 * kSumBytes) return;
      unroll<kTiles * 4>([&](auto i) LOWBIT_LAMBDA {
        _mm_prefetch(reinterpret_cast<const char*>(soon) + i * 64, _MM_HINT_T0);
      });
      soon += kTiles * 256;
    };
    products([&](auto i) LOWBIT_LAMBDA {
      if (p > 0) tile_store<i>(c - kSumBytes + i * kTile, 64);
      if (o.add) {
        tile_load<i>(c + i * kTile, 64);
      } else {
        tile_zero<i>();
      }
    });
    step();
    for (std::int64_t s = 1; s < o.steps; ++s) {
      fetch_sums();
      ahead.step();
      products([](auto) LOWBIT_LAMBDA {});
      step();
    }
  }
  unroll<kTiles * 2>([&](auto i) LOWBIT_LAMBDA { tile_store<i>(c - kSumBytes + i * kTile, 64); });
}

template <Format F>
void run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
         std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
         std::int64_t token_end, std::int64_t next_tile, std::byte* scratch) {
  const Layout& layout = rows.layout;
  const AnyWalk<F> walk(layout);
  const Plan plan(layout.k_padded, a.m);
  const bool in_place = multiplies_in_place<F>(plan);
  Expanded& expanded = *reinterpret_cast<Expanded*>(scratch);
  GroupFactors* const factors = reinterpret_cast<GroupFactors*>(scratch + 64);
  std::byte* const weights = reinterpret_cast<std::byte*>(factors + 2);
  std::byte* const all_sums = weights + (in_place ? 0 : 2 * plan.group_bytes);
  const std::int64_t a_stride = token_tile_bytes(a);
  const std::int64_t token_tiles = divide_up(token_end - token_begin, kTileTokens);
  const std::int64_t token_blocks = divide_up(token_tiles, kMostTiles);
  const TileSession session;

  const auto first_of = [&](std::int64_t tile, std::int64_t end) {
    const std::int64_t tiles = end - tile < plan.group_tiles ? end - tile : plan.group_tiles;
    const std::int64_t k1 = plan.chunk < layout.k_padded ? plan.chunk : layout.k_padded;
    return Chunk{tile, tiles, 0, k1};
  };
  // What follows a chunk: the group's next inputs, the next group, the thread's next call.
  const auto after = [&](const Chunk& chunk) {
    if (chunk.k1 < layout.k_padded) {
      const std::int64_t k1 = chunk.k1 + plan.chunk;
      return Chunk{chunk.tile, chunk.tiles, chunk.k1, k1 < layout.k_padded ? k1 : layout.k_padded};
    }
    if (chunk.tile + chunk.tiles < tile_end) return first_of(chunk.tile + chunk.tiles, tile_end);
    if (next_tile < 0 || next_tile >= layout.tiles) return Chunk{};
    const std::int64_t end = next_tile + (tile_end - tile_begin);
    return first_of(next_tile, end < layout.tiles ? end : layout.tiles);
  };
  const auto half_at = [&](std::int64_t half) {
    return in_place ? nullptr : weights + half * plan.group_bytes;
  };

  Chunk chunk = first_of(tile_begin, tile_end);
  std::int64_t half = 0;
  if (expanded.packed == rows.packed && expanded.tile == tile_begin &&
      expanded.tiles >= chunk.tiles) {
    half = expanded.half;
  } else if (!in_place) {
    Feed<F>(rows, walk, chunk, half_at(half), plan.panel_bytes, 0).finish();
  }
  expanded.packed = nullptr;
  Drain<F> drain(rows);
  std::int64_t set = 0;
  for (bool more = true; more;) {
    const Chunk next = after(chunk);
    const std::int64_t steps = (chunk.k1 - chunk.k0) / kInputBlock;
    const bool last = chunk.k1 == layout.k_padded;
    std::byte* const sums = all_sums + (plan.sums_sets == 2 ? set * plan.sums_bytes : 0);
    if (last) fill_factors<F>(rows, chunk.tile, chunk.tiles, factors[set]);
    Feed<F> feed(rows, walk, next, half_at(1 - half), plan.panel_bytes,
                 steps * ((chunk.tiles + 1) / 2) * token_blocks);
    Operands o;
    o.a_stride = a_stride;
    o.b = in_place ? rows.packed + chunk.tile * layout.tile_bytes + chunk.k0 * 32 : half_at(half);
    o.b_stride = in_place ? layout.tile_bytes : plan.panel_bytes;
    o.tiles = chunk.tiles;
    o.steps = steps;
    o.add = chunk.k0 > 0;
    for (std::int64_t block = 0; block < token_blocks; ++block) {
      const std::int64_t first = token_tiles * block / token_blocks;
      const std::int64_t behind = token_tiles * (block + 1) / token_blocks;
      const std::int64_t tiles = behind - first;
      const auto activations = [&](std::int64_t tile, std::int64_t k) {
        return a.data + (token_begin / kTileTokens + tile) * a_stride + k * 32;
      };
      o.a = activations(first, chunk.k0);
      o.c = sums + first * plan.group_tiles * kTile;
      Ahead ahead{nullptr, a_stride, steps * kTile, 0};
      if (block + 1 < token_blocks) {
        ahead.at = activations(behind, chunk.k0);
        ahead.pieces = token_tiles * (block + 2) / token_blocks - behind;
      } else if (next.tiles > 0 && token_blocks > 1) {
        ahead.at = activations(0, next.k0);
        ahead.pieces = token_tiles / token_blocks;
      }
      const std::int64_t token = token_begin + first * kTileTokens;
      const std::int64_t left = token_end - token;
      const std::int64_t tokens = left < tiles * kTileTokens ? left : tiles * kTileTokens;
      drain.release(o.c);
      const auto step = [&]() LOWBIT_LAMBDA {
        feed.step();
        drain.step();
      };
      unroll<kMostTiles>([&](auto i) LOWBIT_LAMBDA {
        if (tiles == i + 1) multiply<i + 1>(o, ahead, step);
      });
      if (last) {
        drain.open(o.c, tiles, factors[set], chunk.tile, chunk.tile + chunk.tiles,
                   first_token + token, tokens, steps * ((chunk.tiles + 1) / 2));
      }
    }
    feed.finish();
    if (last) set = 1 - set;
    half = 1 - half;
    more = !last || chunk.tile + chunk.tiles < tile_end;
    chunk = next;
  }
  drain.finish();
  if (!in_place && chunk.tiles > 0) expanded = {rows.packed, chunk.tile, chunk.tiles, half};
}

template <Format F>
constexpr Path path(const char* name) {
  constexpr bool kPairs = Brain<F>::kPairs;
  return {name,
          kPairs ? "amx.bf16.pairs" : "amx.bf16",
          bf16_activation_bytes,
          prepare_bf16<kPairs>,
          scratch_bytes<F>,
          run<F>,
          2,
          kTileTokens,
          true,
          kGroupTiles / 2};
}

constexpr Path kPaths[kFormatCount] = {
    path<Format::kSymInt4>("amx.bf16.panel.sym_int4"),
    path<Format::kAsymInt4>("amx.bf16.panel.asym_int4"),
    path<Format::kSymInt5>("amx.bf16.panel.sym_int5"),
    path<Format::kAsymInt5>("amx.bf16.panel.asym_int5"),
    path<Format::kSymInt8>("amx.bf16.panel.sym_int8"),
    path<Format::kNf3>("amx.bf16.panel.nf3"),
    path<Format::kNf4>("amx.bf16.panel.nf4"),
    path<Format::kFp4>("amx.bf16.panel.fp4"),
    path<Format::kFp8E4M3>("amx.bf16.panel.fp8_e4m3"),
    path<Format::kFp8E5M2>("amx.bf16.panel.fp8_e5m2"),
    path<Format::kFp16>("amx.bf16.panel.fp16"),
    path<Format::kBf16>("amx.bf16.panel.bf16"),
};

}  // namespace

namespace amx {

const Path* panel_bf16(Format format) {
  return &kPaths[static_cast<int>(format)];
}

}  // namespace amx
}  // namespace lowbit::cpu
