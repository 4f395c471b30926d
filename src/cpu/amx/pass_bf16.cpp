// Products in bf16 by tiles, any format, up to 128 tokens: out[32 tokens][32 outputs] += A B, A 16
// tokens x 32 inputs and B 32 inputs x 16 outputs in a tile each. Weights become bf16, the scale of
// their group included. Those of the bf16 format lie in packed tiles as a B tile wants them and are
// multiplied where they are.
//
// Loops, from the outside:
//   spans of inputs, so that their activations (1 MiB) stay in L2
//   panels of 32 outputs, whose sums (16 KiB for 128 tokens) stay in L1
//   chunks of up to 192 inputs, whose weights (12 KiB, and 12 KiB of the next chunk) stay in L1
//   pairs of token tiles: activations come from L2 and pass by L1
// What leaves L1 modified costs four cycles a line on its way to L2 and back, what is only read
// one: so sums and expanded weights stay and activations travel. While tiles multiply, the vector
// units expand the next chunk, four inputs x 16 outputs after every product: out of order execution
// hides only what is spread that finely.
#include "cpu/amx/bf16_operands.h"
#include "cpu/amx/paths.h"

namespace lowbit::cpu {
namespace {

constexpr int kPanelTiles = 2;  // of outputs
constexpr int kPassTiles = amx::kMostPassTokens / kTileTokens;
constexpr int kChunkSteps = 6;
constexpr std::int64_t kChunk = kChunkSteps * 32;
constexpr std::int64_t kStay = 5 << 18;  // bytes of activations that stay in L2

// How the inputs are cut.
struct Plan {
  std::int64_t k_padded, spans, span, chunk;

  // tokens: of the call, so that the cut does not depend on how threads share them.
  Plan(std::int64_t k, std::int64_t tokens) : k_padded(k) {
    spans = divide_up(divide_up(tokens, kTileTokens) * kTileTokens * 2 * k, kStay);
    span = round_up(divide_up(k, spans));
    spans = divide_up(k, span);
    chunk = round_up(divide_up(span, divide_up(span, kChunk)));
  }

 private:
  static std::int64_t round_up(std::int64_t k) { return divide_up(k, kInputBlock) * kInputBlock; }
};

// A position in the weights, chunk by chunk: span, panel, chunk. Two row tiles, of which the
// second may be missing.
struct Position {
  std::int64_t k_begin = 0, tile, k = 0;

  LOWBIT_INLINE std::int64_t span_end(const Plan& plan) const {
    const std::int64_t end = k_begin + plan.span;
    return end < plan.k_padded ? end : plan.k_padded;
  }
  LOWBIT_INLINE std::int64_t chunk_end(const Plan& plan) const {
    const std::int64_t end = k + plan.chunk, last = span_end(plan);
    return end < last ? end : last;
  }
  LOWBIT_INLINE bool done(const Plan& plan) const { return k_begin >= plan.k_padded; }
  void next(const Plan& plan, std::int64_t tile_begin, std::int64_t tile_end) {
    k = chunk_end(plan);
    if (k < span_end(plan)) return;
    tile += kPanelTiles;
    if (tile >= tile_end) {
      tile = tile_begin;
      k_begin = span_end(plan);
    }
    k = k_begin;
  }
};

template <Format F>
constexpr bool kInPlace = F == Format::kBf16;

// Expands one chunk after the other, a quad at a time, in step with something else.
template <Format F>
class Feed {
  using Plane = decltype(Floats<F>::plane(nullptr, 0, 0));

 public:
  Feed(const RowBlock& rows, const AnyWalk<F>& walk, const Plan& plan, std::int64_t tile_begin,
       std::int64_t tile_end)
      : rows_(rows),
        walk_(walk),
        plan_(plan),
        tile_begin_(tile_begin),
        tile_end_(tile_end),
        next_{0, tile_begin, 0} {}

  // The next chunk. to: memory of two row tiles; nothing is expanded where there is none.
  void open(std::byte* to, std::int64_t panel_bytes) {
    at_ = end_ = 0;
    if (next_.done(plan_)) return;
    const Position at = next_;
    next_.next(plan_, tile_begin_, tile_end_);
    const Position& soon = next_.done(plan_) ? at : next_;
    const std::int64_t blocks = (at.chunk_end(plan_) - at.k) / kInputBlock;
    for (std::int64_t t = 0; t < kPanelTiles && at.tile + t < tile_end_; ++t) {
      const std::byte* tile = rows_.packed + (at.tile + t) * rows_.layout.tile_bytes;
      std::int64_t g = kIsGrouped<F> ? at.k / walk_.group : 0;
      std::int64_t number = (at.k - g * walk_.group) / kInputBlock;
      // What is expanded after that is asked for meanwhile.
      const std::int64_t ahead =
          Brain<F>::codes_at(walk_, soon.k) +
          (soon.tile + t < tile_end_ ? soon.tile + t : soon.tile) * rows_.layout.tile_bytes -
          (at.tile + t) * rows_.layout.tile_bytes - Brain<F>::codes_at(walk_, at.k);
      for (std::int64_t b = 0; b < blocks; ++b, ++number) {
        if (kIsGrouped<F> && number * kInputBlock == walk_.group) {
          number = 0;
          ++g;
        }
        Entry& entry = entries_[end_++];
        entry.codes = tile + walk_.codes(g);
        entry.ahead = reinterpret_cast<const char*>(entry.codes + number * kBlockBytes + ahead);
        entry.number = number;
        if constexpr (kIsGrouped<F>) {
          entry.scales = tile + walk_.scales(g);
          entry.inputs = walk_.inputs(g);
        }
        entry.to = to == nullptr ? nullptr : to + t * panel_bytes + b * kTile;
      }
    }
  }
  // What the quads of a block need: in registers while tiles multiply, since every tile load takes
  // 16 of the entries that loads have.
  struct Block {
    bool some = false, odd = false;  // odd: half of it is expanded
    const std::byte* codes = nullptr;
    std::byte* to = nullptr;
    Floats<F> floats;
    [[no_unique_address]] Plane plane{};

    template <int I>
    LOWBIT_INLINE void quad() const {
      if constexpr (!kInPlace<F>) Brain<F>::template expand<I>(floats, codes, 0, plane, to);
    }
  };
  // The next block, if there is one.
  LOWBIT_INLINE void next(Block& block) {
    block.some = at_ < end_;
    if (!block.some) return;
    const Entry& entry = entries_[at_++];
    block.to = entry.to;
    block.codes = entry.codes + entry.number * Brain<F>::kQuadBytes * 8;
    if constexpr (!kInPlace<F>) {
      block.floats.open(entry.scales, Here{}, 0);
      block.plane = Floats<F>::plane(entry.codes, entry.inputs, entry.number);
    }
    unroll<static_cast<int>((kBlockBytes + 63) / 64)>(
        [&](auto i) LOWBIT_LAMBDA { _mm_prefetch(entry.ahead + i * 64, _MM_HINT_T1); });
  }
  void finish() {
    if (held.odd) unroll<4>([&](auto i) LOWBIT_LAMBDA { held.template quad<i + 4>(); });
    held.odd = false;
    for (next(held); held.some; next(held)) {
      unroll<8>([&](auto i) LOWBIT_LAMBDA { held.template quad<i>(); });
    }
  }

  Block held;

 private:
  static constexpr std::int64_t kBlockBytes = Brain<F>::kBlockBytes;
  // A group's codes and factors; the block's number in it.
  struct Entry {
    const std::byte *codes, *scales;
    const char* ahead;
    std::int64_t number, inputs;
    std::byte* to;
  };
  // A walk whose scales are where it begins.
  struct Here {
    LOWBIT_INLINE std::int64_t scales(std::int64_t) const { return 0; }
  };
  const RowBlock& rows_;
  const AnyWalk<F>& walk_;
  const Plan& plan_;
  std::int64_t tile_begin_, tile_end_;
  Position next_;
  std::int64_t at_ = 0, end_ = 0;
  Entry entries_[kPanelTiles * kChunkSteps] = {};
};

// Writes outputs whose sums are complete, a few tokens at a time.
template <Format F>
class Drain {
 public:
  explicit Drain(const RowBlock& rows)
      : rows_(rows), exponent_(_mm512_set1_ps(static_cast<float>(rows.exponent))) {}

  // sums: [tiles of tokens][2][16][16] of the panel that begins at a row tile; token: row of out.
  void open(std::int64_t tile, const std::byte* sums, std::int64_t token, std::int64_t tokens) {
    finish();
    if (tile != tile_) panel(tile);
    sums_ = sums;
    token_ = token;
    at_ = 0;
    end_ = tokens;
  }
  LOWBIT_INLINE bool busy() const { return at_ < end_; }
  LOWBIT_INLINE void step() { store(at_ + kAtOnce < end_ ? at_ + kAtOnce : end_); }
  LOWBIT_INLINE void finish() {
    if (at_ < end_) store(end_);
  }
  // Outputs that will be written, to L1.
  LOWBIT_INLINE void fetch(std::int64_t tile, std::int64_t token, std::int64_t tokens) const {
    const std::int64_t each = static_cast<std::int64_t>(dtype_bytes(rows_.out_dtype));
    auto* out =
        static_cast<std::byte*>(rows_.out) + (token * rows_.out_stride + tile * kTileRows) * each;
    for (std::int64_t t = 0; t < tokens; ++t, out += rows_.out_stride * each) {
      __builtin_prefetch(out, 1);
      if (each == 4) __builtin_prefetch(out + 64, 1);
    }
  }
  // Before these sums change.
  LOWBIT_INLINE void release(const std::byte* sums) {
    if (sums == sums_) finish();
  }

 private:
  static constexpr int kAtOnce = 6;

  // Row scales and biases.
  void panel(std::int64_t tile) {
    tile_ = tile;
    row_ = tile * kTileRows;
    left_ = rows_.layout.n - row_;
    for (int i = 0; i < kPanelTiles; ++i) {
      const std::int64_t left = left_ - i * kTileRows;
      if constexpr (kHasRowScale<F>) {
        scale_[i] = left > 0 ? row_scales<F>(rows_.packed + (tile + i) * rows_.layout.tile_bytes)
                             : _mm512_setzero_ps();
      }
      if (rows_.bias != nullptr) {
        bias_[i] = load16(rows_.bias, rows_.bias_dtype, row_ + i * kTileRows, left);
      }
    }
  }
  [[gnu::noinline]] void store(std::int64_t end) {
    for (; at_ < end; ++at_) {
      const std::int64_t to = (token_ + at_) * rows_.out_stride + row_;
      const std::byte* from = sums_ + at_ / kTileTokens * 2 * kTile + at_ % kTileTokens * 64;
      __m512 value[2];
      unroll<2>([&](auto i) LOWBIT_LAMBDA {
        value[i] = _mm512_load_ps(from + i * kTile);
        if constexpr (kHasRowScale<F>) value[i] = _mm512_mul_ps(value[i], scale_[i]);
        if (rows_.exponent != 0) value[i] = _mm512_scalef_ps(value[i], exponent_);
        if (rows_.bias != nullptr) value[i] = _mm512_add_ps(value[i], bias_[i]);
      });
      if (left_ >= 2 * kTileRows && rows_.out_dtype == DType::kBFloat16) {
        _mm512_storeu_si512(static_cast<std::uint16_t*>(rows_.out) + to,
                            (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
      } else if (left_ >= 2 * kTileRows && rows_.out_dtype == DType::kFloat32) {
        _mm512_storeu_ps(static_cast<float*>(rows_.out) + to, value[0]);
        _mm512_storeu_ps(static_cast<float*>(rows_.out) + to + kTileRows, value[1]);
      } else {
        store16(rows_.out, rows_.out_dtype, to, left_, value[0]);
        if (left_ > kTileRows) {
          store16(rows_.out, rows_.out_dtype, to + kTileRows, left_ - kTileRows, value[1]);
        }
      }
    }
  }

  const RowBlock& rows_;
  __m512 exponent_;
  __m512 scale_[kPanelTiles] = {}, bias_[kPanelTiles] = {};
  std::int64_t tile_ = -1, row_ = 0, left_ = 0;
  const std::byte* sums_ = nullptr;
  std::int64_t token_ = 0, at_ = 0, end_ = 0;
};

// Activations of a span, fetched to L2 a few lines at a time, in the order of the
// chunks.
struct Ahead {
  const char* at = nullptr;  // of the chunk: its tokens' first
  std::int64_t stride = 0, tiles = 0, bytes = 0, chunk = 0, left = 0;
  std::int64_t tile = 0, done = 0;

  void open(const std::byte* from, std::int64_t tile_stride, std::int64_t count, std::int64_t k,
            std::int64_t chunk_k) {
    at = reinterpret_cast<const char*>(from);
    stride = tile_stride;
    tiles = count;
    left = k / kInputBlock * kTile;
    chunk = chunk_k / kInputBlock * kTile;
    bytes = chunk < left ? chunk : left;
    tile = done = 0;
  }
  // The next lines, in one piece; none is a null pointer.
  const char* take(std::int64_t lines) {
    if (left <= 0) return nullptr;
    const char* from = at + tile * stride + done;
    done += lines * 64;
    if (done >= bytes) next();
    return from;
  }

 private:
  void next() {
    done = 0;
    if (++tile < tiles) return;
    tile = 0;
    at += bytes;
    left -= bytes;
    bytes = chunk < left ? chunk : left;
  }
};

// Scratch memory of a thread: two chunks of weights, sums.
constexpr std::int64_t kPanelBytes = (kChunk / kInputBlock + 1) * kTile;
// The first bytes stay zero, as other paths of the same call want them.
constexpr std::int64_t kZeros = 64;
constexpr std::int64_t kSumBytes = kPassTiles * kPanelTiles * kTile;
constexpr std::int64_t kWeightBytes = 2 * kPanelTiles * kPanelBytes;
constexpr int kMostPanels = 64;                  // of one call
constexpr std::int64_t kSoon = 8 * kPanelTiles;  // row tiles from the end: activations are fetched

template <Format F>
std::int64_t scratch_bytes(const RowBlock& rows, const Activations& a) {
  const Plan plan(rows.layout.k_padded, a.m);
  const std::int64_t panels = divide_up(rows.layout.tiles, kPanelTiles);
  // Between spans every panel's sums are kept.
  return kZeros + kWeightBytes + kSumBytes * (plan.spans == 1 ? 1 : panels);
}

// The operands of 32 tokens, or 16, and 32 outputs, and where their sums are.
struct Unit {
  const std::byte* a;
  std::int64_t a_stride;  // between tiles of tokens
  const std::byte* b;
  std::int64_t b_stride;  // between tiles of outputs
  std::int64_t steps;     // of 32 inputs
  std::byte* before;      // where the tiles of the unit before go, if anywhere
  std::byte* c;           // [kTiles][2] tiles
  bool first;             // c holds nothing yet
  const char* fetch;      // lines that are fetched to L2, one for a product; if any
  // Outputs of this unit, if they will be written next: a few are fetched in every step.
  std::int64_t out_tile, out_token, out_tokens;
};

// c (+)= a b, which stays in tiles: whoever comes next stores it between its first products, one
// accumulator at a time, and calls stored(). After every product kQuads quads are expanded and a
// line is fetched, and after every other outputs are written.
template <int kTiles, int kQuads, Format F, class Stored>
[[gnu::noinline]] void multiply(const Unit& unit, Feed<F>& feed, Drain<F>& drain,
                                const Stored& stored) {
  // Quads of a step: half a block, one or two.
  constexpr int kStepQuads = 2 * kTiles * kQuads;
  static_assert(kStepQuads == 4 || kStepQuads == 8 || kStepQuads == 16);
  const std::byte* a0 = unit.a;
  const std::byte* b0 = unit.b;
  const std::int64_t a_stride = unit.a_stride, b_stride = unit.b_stride;
  const char* fetch = unit.fetch;
  constexpr std::int64_t kOutputs = 6;
  std::int64_t out_token = unit.out_token, out_tokens = unit.out_tokens;
  typename Feed<F>::Block block = feed.held;
  bool busy = false;
  const bool fresh = unit.first, store = unit.before != nullptr;
  std::byte* const c = unit.c;
  std::byte* const before = unit.before;
  // at: of the step; begin: of the unit.
  const auto step = [&](auto half, auto begin, std::int64_t at) LOWBIT_LAMBDA {
    const auto change = [&](auto i) LOWBIT_LAMBDA {
      if constexpr (begin) {
        if (store) tile_store<i>(before + i * kTile, 64);
        if (fresh) {
          tile_zero<i>();
        } else if (i < 2 * kTiles) {
          tile_load<i>(c + i * kTile, 64);
        }
      }
    };
    const auto meanwhile = [&](auto slot) LOWBIT_LAMBDA {
      constexpr int kFirst = half * 4 + slot * kQuads;
      if constexpr (kFirst % 8 == 0) feed.next(block);
      if (block.some) {
        unroll<kQuads>([&](auto q) LOWBIT_LAMBDA { block.template quad<(kFirst + q) % 8>(); });
      }
    };
    change(std::integral_constant<int, 0>{});
    tile_load_once<4>(a0 + at, 64);
    tile_load<6>(b0 + at, 64);
    tile_multiply<0, 4, 6>();
    meanwhile(std::integral_constant<int, 0>{});
    change(std::integral_constant<int, 1>{});
    tile_load<7>(b0 + b_stride + at, 64);
    tile_multiply<1, 4, 7>();
    meanwhile(std::integral_constant<int, 1>{});
    change(std::integral_constant<int, 2>{});
    if constexpr (kTiles == 2) {
      tile_load_once<5>(a0 + a_stride + at, 64);
      tile_multiply<2, 5, 6>();
      meanwhile(std::integral_constant<int, 2>{});
    }
    change(std::integral_constant<int, 3>{});
    if constexpr (kTiles == 2) {
      tile_multiply<3, 5, 7>();
      meanwhile(std::integral_constant<int, 3>{});
    }
    if constexpr (begin) {
      stored();
      busy = drain.busy();
    }
    if (busy) {
      drain.step();
      busy = drain.busy();
    }
    if (fetch != nullptr) {
      unroll<2 * kTiles>([&](auto i) LOWBIT_LAMBDA { _mm_prefetch(fetch + i * 64, _MM_HINT_T1); });
      fetch += 2 * kTiles * 64;
    }
    if (out_tokens > 0) {
      const std::int64_t some = out_tokens < 2 * kOutputs ? out_tokens : kOutputs;
      drain.fetch(unit.out_tile, out_token, some);
      out_token += some;
      out_tokens -= some;
    }
  };
  using Zero = std::integral_constant<int, 0>;
  constexpr int kHalf = kStepQuads == 4;
  if (unit.steps == kChunkSteps && !block.odd) {
    unroll<kChunkSteps>([&](auto s) LOWBIT_LAMBDA {
      step(std::integral_constant<int, s % 2 * kHalf>{}, std::bool_constant<s == 0>{}, s * kTile);
    });
  } else {
    bool odd = block.odd;
    if (odd) {
      step(std::integral_constant<int, kHalf>{}, std::true_type{}, 0);
    } else {
      step(Zero{}, std::true_type{}, 0);
    }
    odd = kHalf && block.some && !odd;
    for (std::int64_t at = kTile; at < unit.steps * kTile; at += kTile) {
      if (odd) {
        step(std::integral_constant<int, kHalf>{}, std::false_type{}, at);
      } else {
        step(Zero{}, std::false_type{}, at);
      }
      odd = kHalf && block.some && !odd;
    }
    block.odd = odd;
  }
  feed.held = block;
}

template <Format F>
void run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
         std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
         std::int64_t token_end, std::int64_t, std::byte* scratch) {
  const Layout& layout = rows.layout;
  const AnyWalk<F> walk(layout);
  const Plan plan(layout.k_padded, a.m);
  const std::int64_t tiles = divide_up(token_end - token_begin, kTileTokens);
  std::byte* const weights = scratch + kZeros;
  std::byte* const all_sums = weights + kWeightBytes;
  const std::int64_t a_stride = token_tile_bytes(a);
  const std::int64_t panel_bytes = (plan.chunk / kInputBlock | 1) * kTile;
  const TileSession session;

  const auto half_at = [&](std::int64_t turn) {
    return kInPlace<F> ? nullptr : weights + turn % 2 * kPanelTiles * panel_bytes;
  };
  const auto activations = [&](std::int64_t tile, std::int64_t k) {
    return a.data + (token_begin / kTileTokens + tile) * a_stride + k / kInputBlock * kTile;
  };
  Ahead ahead;
  Feed<F> feed(rows, walk, plan, tile_begin, tile_end);
  feed.open(half_at(0), panel_bytes);
  feed.finish();
  Drain<F> drain(rows);
  // Tiles whose products are under way or done: a unit's sums, and what becomes of them.
  struct {
    std::byte* sums = nullptr;
    bool last = false;
    std::int64_t tile = 0, token = 0, tokens = 0;
  } held;
  const auto stored = [&]() LOWBIT_LAMBDA {
    if (held.last) drain.open(held.tile, held.sums, held.token, held.tokens);
  };
  std::int64_t turn = 0;
  for (Position at{0, tile_begin, 0}; !at.done(plan); ++turn) {
    const Position here = at;
    at.next(plan, tile_begin, tile_end);
    const std::int64_t k1 = here.chunk_end(plan);
    const bool last = k1 == layout.k_padded;
    if (here.k == here.k_begin && here.span_end(plan) < plan.k_padded &&
        (here.tile == (tile_end - tile_begin > kSoon
                           ? tile_begin + (tile_end - tile_begin - kSoon) / 2 * 2
                           : tile_begin))) {
      // The next span's activations.
      const std::int64_t k = here.span_end(plan), left = plan.k_padded - k;
      ahead.open(activations(0, k), a_stride, tiles, plan.span < left ? plan.span : left,
                 plan.chunk);
    }
    std::byte* const sums =
        all_sums + (plan.spans == 1 ? 0 : (here.tile - tile_begin) / kPanelTiles * kSumBytes);
    Unit unit;
    unit.a_stride = a_stride;
    if constexpr (kInPlace<F>) {
      unit.b = rows.packed + here.tile * layout.tile_bytes + here.k / kInputBlock * kTile;
    } else {
      unit.b = half_at(turn);
    }
    unit.b_stride = here.tile + 1 >= tile_end ? 0 : (kInPlace<F> ? layout.tile_bytes : panel_bytes);
    unit.steps = (k1 - here.k) / kInputBlock;
    unit.first = here.k == 0;
    feed.open(half_at(turn + 1), panel_bytes);
    for (std::int64_t tile = 0; tile < tiles; tile += 2) {
      unit.a = activations(tile, here.k);
      unit.before = held.sums;
      unit.c = sums + tile * kPanelTiles * kTile;
      drain.release(unit.before);
      const std::int64_t token = token_begin + tile * kTileTokens;
      const std::int64_t left = token_end - token;
      const std::int64_t tokens = left < 2 * kTileTokens ? left : 2 * kTileTokens;
      unit.out_tile = here.tile;
      unit.out_token = first_token + token;
      unit.out_tokens = last ? tokens : 0;
      const bool two = tile + 1 < tiles;
      unit.fetch = ahead.take(unit.steps * (two ? 4 : 2));
      if (tiles == kPassTiles) {
        multiply<2, 1>(unit, feed, drain, stored);
      } else if (tiles >= 4) {
        two ? multiply<2, 2>(unit, feed, drain, stored) : multiply<1, 2>(unit, feed, drain, stored);
      } else if (tiles >= 2) {
        two ? multiply<2, 4>(unit, feed, drain, stored) : multiply<1, 4>(unit, feed, drain, stored);
      } else {
        multiply<1, 8>(unit, feed, drain, stored);
      }
      held = {unit.c, last, here.tile, first_token + token, tokens};
    }
    feed.finish();
  }
  drain.release(held.sums);
  unroll<4>([&](auto i) LOWBIT_LAMBDA { tile_store<i>(held.sums + i * kTile, 64); });
  stored();
  drain.finish();
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
          kPanelTiles,
          kTileTokens,
          true,
          kMostPanels};
}

constexpr Path kPaths[kFormatCount] = {
    path<Format::kSymInt4>("amx.bf16.pass.sym_int4"),
    path<Format::kAsymInt4>("amx.bf16.pass.asym_int4"),
    path<Format::kSymInt5>("amx.bf16.pass.sym_int5"),
    path<Format::kAsymInt5>("amx.bf16.pass.asym_int5"),
    path<Format::kSymInt8>("amx.bf16.pass.sym_int8"),
    path<Format::kNf3>("amx.bf16.pass.nf3"),
    path<Format::kNf4>("amx.bf16.pass.nf4"),
    path<Format::kFp4>("amx.bf16.pass.fp4"),
    path<Format::kFp8E4M3>("amx.bf16.pass.fp8_e4m3"),
    path<Format::kFp8E5M2>("amx.bf16.pass.fp8_e5m2"),
    path<Format::kFp16>("amx.bf16.pass.fp16"),
    path<Format::kBf16>("amx.bf16.pass.bf16"),
};

}  // namespace

namespace amx {

const Path* pass_bf16(Format format) {
  return &kPaths[static_cast<int>(format)];
}

}  // namespace amx
}  // namespace lowbit::cpu
