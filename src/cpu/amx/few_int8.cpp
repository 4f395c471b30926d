// Up to 16 tokens, grouped formats: out = sum over groups of s * as * sum of (code - zero) * q (+ m
// * as * sum of q), as in avx512vnni, with the products of a group done by tiles and bytes signed
// where that takes the zero point out for nothing. One plane of activations serves 16 tokens, two
// planes 8: the rows of a tile. Products are then nearly free, and so is the second plane; what is
// left for the vector units is to make bytes of codes, once for all tokens, and to end groups.
//
// A step is 64 inputs of a row tile (groups of 32: 32), and steps overlap, across row tiles as
// well:
//   step s      codes of 16 outputs to bytes, 1 KiB per byte plane of the weights, in L1
//   s - kBehind their product, after the sums of the group before have been stored
//   one more    sums of a group, stored in the step before, are scaled and added to totals
// What is written must have reached L1 before tiles load it, hence the distance. Lines are fetched
// one at a time, spread over a step: in bursts they cost a tenth of the bandwidth.
//
// Groups of 64, where four of them divide the inputs (run_blocks): runs of four groups, whose
// activations stay in four tiles while the row tiles of a block pass by, and whose totals wait in
// L1. Others come one row tile after the other, whose totals stay in registers (run_steps).
#include "cpu/amx/few_outputs.h"
#include "cpu/amx/paths.h"
#include "cpu/amx/tiles.h"
#include "cpu/generic/avx512_codes.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

constexpr int kRowsMost = 16;
constexpr int kBehind = 2;
constexpr int kRing = 4;       // slots for what steps hand on
constexpr int kRun = 4;        // groups whose activations stay in tiles
constexpr int kAhead = 4;      // runs from the one expanded to the last one fetched
constexpr int kScaleRing = 8;  // from the first step to the last
constexpr int kTiles = 4;      // row tiles of a block: their outputs are written together
constexpr std::int64_t kTileBytes = 1024;
constexpr std::int64_t kMostSlot = 2048;  // two planes

// Tokens per instance of the kernel.
template <int kPlanes>
LOWBIT_INLINE std::int64_t padded_tokens(std::int64_t m) {
  if (kPlanes == 2 && m <= 2) return m;
  return (m + 3) / 4 * 4;
}

// What the record of a group holds per token besides the step of its activations.
enum class Extra {
  kNone,
  kStart,  // int32: -128 * sum of q, for bytes that lie in memory unsigned
  kSum,    // float32: step * sum of q, what a minimum is multiplied by
};

// Record of a group: two arrays with an entry per token (step, Extra), then the A tiles.
template <int kPlanes>
struct Shape {
  std::int64_t group, groups, depth, parts, rows, tile_bytes, array, head, record;

  LOWBIT_INLINE explicit Shape(const Activations& a)
      : group(a.group),
        groups(a.groups),
        depth(a.group < 64 ? 32 : 64),
        parts(a.group / depth),
        rows(a.m * kPlanes),
        tile_bytes(rows * depth),
        array(padded_tokens<kPlanes>(a.m) * 4),
        head(align64(2 * array)),
        record(align64(head + parts * tile_bytes)) {}
};

template <int kPlanes>
std::int64_t activation_bytes(const Activations& a) {
  const Shape<kPlanes> shape(a);
  return shape.groups * shape.record;
}

template <int kPlanes, Extra kExtra>
void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const Shape<kPlanes> shape(a);
  const __m512i order = packed_order(tokens.dtype);
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    std::byte* record = a.data + g * shape.record;
    if (begin == 0) {
      for (std::int64_t i = 0; i < shape.head; i += 64) {
        _mm512_store_si512(record + i, _mm512_setzero_si512());
      }
    }
    for (std::int64_t t = begin; t < end; ++t) {
      std::byte* row = record + shape.head + t * shape.depth;
      const auto put = [&](int plane, std::int64_t k, __m512i bytes, bool whole) LOWBIT_LAMBDA {
        std::byte* to = row + plane * a.m * shape.depth + k / 64 * shape.tile_bytes;
        if (whole) {
          _mm512_storeu_si512(to, bytes);
        } else {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(bytes));
        }
      };
      const std::int64_t k0 = g * shape.group;
      const Quantized<kPlanes> q = quantize_group<kPlanes>(tokens, t * tokens.stride + k0, a.k - k0,
                                                           shape.group, order, put);
      const auto set = [&](int array, auto value) LOWBIT_LAMBDA {
        __builtin_memcpy(record + array * shape.array + 4 * t, &value, 4);
      };
      set(0, q.step);
      if constexpr (kExtra == Extra::kStart) set(1, -128 * q.sum());
      if constexpr (kExtra == Extra::kSum) set(1, q.step * static_cast<float>(q.sum()));
    }
  }
}

// A table of bytes around 128 as signed ones.
LOWBIT_INLINE __m512i signed_table(const std::uint8_t (&table)[64]) {
  return _mm512_xor_si512(_mm512_load_si512(table), _mm512_set1_epi8(-128));
}
// 256 * sums of high bytes + sums of low ones.
LOWBIT_INLINE __m512i both(const std::byte* high, std::int64_t low) {
  return _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 8),
                          _mm512_load_si512(high + low));
}

// The bytes that stand for a code, one or several planes of them, signed or not.
template <Format F, int kPlanes>
struct Bytes {
  using Codes = Unpack<Grouped<F>::kBits>;
  static constexpr int kCount = 1;
  static constexpr Extra kExtra = F == Format::kSymInt8  ? Extra::kStart
                                  : Grouped<F>::kMinimum ? Extra::kSum
                                                         : Extra::kNone;
  static constexpr bool kSigned = kExtra == Extra::kNone;
  // sym_int4: what two's complement makes of four bits is left in the upper ones.
  static constexpr float kScale = F == Format::kSymInt4 ? 1.0f / 16 : Grouped<F>::kValueScale;
  __m512i table;

  LOWBIT_INLINE Bytes() {
    if constexpr (Grouped<F>::kTable) table = signed_table(byte_tables<F>().single);
  }
  LOWBIT_INLINE static constexpr bool is_signed(int) { return kSigned; }
  // Quads 2 I and 2 I + 1 of a block.
  template <int I>
  LOWBIT_INLINE void quads(const std::byte* codes, std::int64_t block,
                           const typename Codes::Plane& plane, __m512i (&out)[2][kCount]) const {
    if constexpr (F == Format::kSymInt4) {
      const __m512i unit = load_unit(codes + block * Codes::kBlockBytes + I * 64);
      unroll<2>([&](auto i) LOWBIT_LAMBDA {
        out[i][0] = _mm512_ternarylogic_epi32(i == 0 ? _mm512_slli_epi16(unit, 4) : unit,
                                              _mm512_set1_epi8(-128), _mm512_set1_epi8(-16), 0x28);
      });
    } else if constexpr (F == Format::kSymInt5) {
      const __m512i unit = load_unit(codes + block * 256 + I * 64);
      unroll<2>([&](auto i) LOWBIT_LAMBDA {
        const __m512i low =
            _mm512_or_si512(i == 0 ? unit : _mm512_srli_epi16(unit, 4), _mm512_set1_epi8(-16));
        out[i][0] = _mm512_mask_sub_epi8(low, load_bits(plane + (2 * I + i) * 8), low,
                                         _mm512_set1_epi8(-16));
      });
    } else {
      unroll<2>([&](auto i) LOWBIT_LAMBDA {
        if constexpr (Grouped<F>::kTable) {
          out[i][0] =
              _mm512_permutexvar_epi8(Codes::template index<2 * I + i>(codes, block, plane), table);
        } else {
          out[i][0] = Codes::template quad<2 * I + i>(codes, block, plane);
        }
      });
    }
  }
  // Sums of token t times the activations' step; arguments as in Sums.
  LOWBIT_INLINE static __m512 value(const std::byte* sums, std::int64_t, std::int64_t low,
                                    const std::byte* record, std::int64_t array, int t) {
    static_assert(kPlanes == 2);
    __m512i whole = both(sums + t * 64, low);
    if constexpr (kExtra == Extra::kStart) {
      whole = _mm512_add_epi32(whole, broadcast(record + array + 4 * t));
    }
    return _mm512_mul_ps(_mm512_cvtepi32_ps(whole), broadcast_f32(record + 4 * t));
  }
};
// Two bytes (normal_float_pair.h).
template <Format F>
struct PairBytes {
  using Codes = Unpack<Grouped<F>::kBits>;
  using Pair = NormalFloatPair<F>;
  static constexpr int kCount = 2;
  static constexpr Extra kExtra = Extra::kNone;
  static constexpr float kScale = 1.0f;
  __m512i table[2];

  LOWBIT_INLINE PairBytes()
      : table{signed_table(pair_tables<F>().first), signed_table(pair_tables<F>().second)} {}
  LOWBIT_INLINE static constexpr bool is_signed(int) { return true; }
  template <int I>
  LOWBIT_INLINE void quads(const std::byte* codes, std::int64_t block,
                           const typename Codes::Plane& plane, __m512i (&out)[2][kCount]) const {
    unroll<2>([&](auto i) LOWBIT_LAMBDA {
      const __m512i index = Codes::template index<2 * I + i>(codes, block, plane);
      unroll<2>([&](auto j)
                    LOWBIT_LAMBDA { out[i][j] = _mm512_permutexvar_epi8(index, table[j]); });
    });
  }
  LOWBIT_INLINE static __m512 value(const std::byte* sums, std::int64_t plane, std::int64_t low,
                                    const std::byte* record, std::int64_t, int t) {
    const __m512 first = _mm512_cvtepi32_ps(both(sums + t * 64, low));
    const __m512 second = _mm512_cvtepi32_ps(both(sums + plane + t * 64, low));
    const __m512 value = _mm512_fmadd_ps(first, _mm512_set1_ps(Pair::kFirst),
                                         _mm512_mul_ps(second, _mm512_set1_ps(Pair::kSecond)));
    return _mm512_mul_ps(value, broadcast_f32(record + 4 * t));
  }
};
template <>
struct Bytes<Format::kNf3, 2> : PairBytes<Format::kNf3> {};
template <>
struct Bytes<Format::kNf4, 2> : PairBytes<Format::kNf4> {};

std::int64_t scratch_bytes(const RowBlock&, const Activations&) {
  return 2 * kRing * kMostSlot + kScaleRing * 2 * kUnitBytes + kTiles * kTileBytes;
}

// Outputs of a few row tiles; out of line, because it is rare and would take registers.
[[gnu::noinline]] void write(const Epilogue& epilogue, std::int64_t first_token, std::int64_t m,
                             std::int64_t first, std::int64_t tiles, const std::byte* totals) {
  write_outputs(epilogue, first_token, m, first, tiles,
                [&](std::int64_t t, std::int64_t tile) LOWBIT_LAMBDA {
                  return _mm512_load_ps(totals + (tile - first) * kTileBytes + t * kUnitBytes);
                });
}

// Tile kSum = tile kTokens times tile kWeights + tile kSum.
template <bool kSigned, int kSum, int kTokens, int kWeights>
LOWBIT_INLINE void multiply() {
  if constexpr (kSigned) {
    tile_multiply_int8<kSum, kTokens, kWeights>();
  } else {
    tile_multiply_unsigned<kSum, kTokens, kWeights>();
  }
}

// Bytes of block kBlock of a step, `block` of its group; fetch(I) before quad I.
template <int kBlock, Format F, int kPlanes, class Fetch>
LOWBIT_INLINE void expand(const Bytes<F, kPlanes>& bytes, const std::byte* group,
                          std::int64_t inputs, std::int64_t block, std::byte* to, Fetch&& fetch) {
  using Of = Bytes<F, kPlanes>;
  const auto plane = Of::Codes::plane(group, inputs, block);
  unroll<4>([&](auto i) LOWBIT_LAMBDA {
    fetch(std::integral_constant<int, 2 * i>{});
    __m512i quads[2][Of::kCount];
    bytes.template quads<i>(group, block, plane, quads);
    unroll<2>([&](auto q) LOWBIT_LAMBDA {
      unroll<Of::kCount>([&](auto j) LOWBIT_LAMBDA {
        _mm512_store_si512(to + j * kTileBytes + kBlock * 512 + (2 * i + q) * 64, quads[q][j]);
      });
      if constexpr (q == 0) fetch(std::integral_constant<int, 2 * i + 1>{});
    });
  });
}

// Where the sums of a group are: those of a byte plane of the weights are `plane` apart, those of
// the low bytes of activations `low` behind those of the high ones.
struct Sums {
  const std::byte* at;
  std::int64_t plane, low;
};

// Ends a group: its sums times scales and steps, and minima times sums of activations.
template <Format F, int kPlanes, int kTokens>
LOWBIT_INLINE void add_group(const Sums& sums, __m512 scale, __m512 minimum,
                             const std::byte* record, __m512 (&total)[kTokens]) {
  using Of = Bytes<F, kPlanes>;
  constexpr std::int64_t kArray = kTokens * 4;
  const __m512 offset = _mm512_mul_ps(scale, _mm512_set1_ps(-kBias));
  unroll<kTokens>([&](auto t) LOWBIT_LAMBDA {
    if constexpr (kPlanes == 1) {
      __m512i sum = _mm512_load_si512(sums.at + t * 64);
      if constexpr (Of::kExtra == Extra::kStart) {
        sum = _mm512_add_epi32(sum, broadcast(record + kArray + 4 * t));
      }
      sum = _mm512_add_epi32(sum, _mm512_set1_epi32(kBiasBits));
      const __m512 value = _mm512_fmadd_ps(_mm512_castsi512_ps(sum), scale, offset);
      total[t] = _mm512_fmadd_ps(value, broadcast_f32(record + 4 * t), total[t]);
    } else {
      total[t] = _mm512_fmadd_ps(Of::value(sums.at, sums.plane, sums.low, record, kArray, t), scale,
                                 total[t]);
    }
    if constexpr (Grouped<F>::kMinimum) {
      total[t] = _mm512_fmadd_ps(minimum, broadcast_f32(record + kArray + 4 * t), total[t]);
    }
  });
}

// Where things are in a run of four groups of 64 inputs.
template <Format F>
struct RunLayout {
  static constexpr std::int64_t kStepBytes = 2 * Unpack<Grouped<F>::kBits>::kBlockBytes;
  static constexpr bool kMinimum = Grouped<F>::kMinimum;

  static constexpr GroupWalk<kMinimum> kWalk{kStepBytes, kRun, 64};
  static constexpr std::int64_t kBytes = kWalk.codes(kRun);
  // Steps ahead that lines are fetched: 2 and 4 KiB, or a little more.
  static constexpr int kNearSteps = static_cast<int>((2048 + kStepBytes - 1) / kStepBytes);
  static constexpr int kFarSteps = 2 * kNearSteps;
  static_assert((kRun - 1 + kFarSteps) / kRun < kAhead);
};

// A run in the order in which runs pass by: row tiles of a block, runs of a row tile, blocks.
struct Run {
  const std::byte* at;
  std::int64_t tile, first, count;  // row tile; the first of its block, and how many it has
  std::int64_t run;                 // of the row tile
};

template <Format F, int kPlanes, int kTokens>
void run_blocks(const RowBlock& rows, const Activations& a, std::int64_t first_token,
                std::int64_t tile_begin, std::int64_t tile_end, std::byte* scratch) {
  using Of = Bytes<F, kPlanes>;
  using At = RunLayout<F>;
  constexpr int kCount = Of::kCount;
  constexpr bool kDirect = F == Format::kSymInt8;  // tiles as they lie
  constexpr std::int64_t kBlockBytes = Of::Codes::kBlockBytes;
  constexpr std::int64_t kSlot = kCount * kTileBytes;
  constexpr int kWeights = 2, kActivations = 4;  // tiles; sums are in the first ones
  const Of bytes;
  const Shape<kPlanes> shape(a);
  const Epilogue epilogue(rows, Of::kScale);
  const std::int64_t sum_bytes = shape.rows * 64, low = a.m * 64;
  const std::int64_t runs = shape.groups / kRun;
  std::byte* const operands = scratch;
  std::byte* const sums = operands + kRun * kSlot;
  std::byte* const totals = sums + kRun * kSlot;  // of the row tiles of a block

  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] =
        tile >= kWeights && tile < kActivations ? 16 : static_cast<std::uint8_t>(shape.rows);
  }
  const TileSession session(config);

  const auto clear = [&] {
    for (std::int64_t i = 0; i < kTiles * kTileBytes; i += kUnitBytes) {
      _mm512_store_ps(totals + i, _mm512_setzero_ps());
    }
  };
  clear();
  const auto enter = [&](std::int64_t first) LOWBIT_LAMBDA {
    const std::int64_t most = kTiles - first % kTiles;
    return Run{nullptr, first, first, first + most < tile_end ? most : tile_end - first, 0};
  };
  const auto place = [&](Run& run) LOWBIT_LAMBDA {
    run.at = rows.packed + run.tile * rows.layout.tile_bytes + run.run * At::kBytes;
  };
  const auto advance = [&](Run& run) LOWBIT_LAMBDA {
    if (++run.tile == run.first + run.count) {
      run.tile = run.first;
      if (++run.run == runs) run = enter(run.first + run.count);
    }
    place(run);
  };
  Run ahead[kAhead];  // what is expanded, and what lines are fetched of
  ahead[0] = enter(tile_begin);
  place(ahead[0]);
  unroll<kAhead - 1>([&](auto i) LOWBIT_LAMBDA {
    ahead[i + 1] = ahead[i];
    advance(ahead[i + 1]);
  });
  Run before = ahead[0];  // what is added up
  bool any = false;       // there is one
  for (std::int64_t left = (tile_end - tile_begin) * runs; left >= 0; --left) {
    const Run& now = ahead[0];
    const bool more = left > 0;
    const std::byte* const old_records = a.data + before.run * kRun * shape.record;
    const std::byte* const records = a.data + now.run * kRun * shape.record;
    std::byte* const sum = totals + (before.tile - before.first) * kTileBytes;
    __m512 total[kTokens];
    unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { total[t] = _mm512_load_ps(sum + t * kUnitBytes); });
    unroll<kRun>([&](auto j) LOWBIT_LAMBDA {
      constexpr int kStored = (j + kRun - kBehind - 1) % kRun;
      constexpr int kMultiplied = (j + kRun - kBehind) % kRun;
      if (j > kBehind ? more : any) {
        std::byte* to = sums + kStored * kSlot;
        unroll<kCount>([&](auto i) LOWBIT_LAMBDA { tile_store<i>(to + i * sum_bytes, 64); });
      }
      if (j >= kBehind ? more : any) {
        const Run& of = j >= kBehind ? now : before;
        constexpr int kTile = kActivations + kMultiplied;
        if (of.tile == of.first) {
          const std::byte* record =
              (j >= kBehind ? records : old_records) + kMultiplied * shape.record;
          tile_load<kTile>(record + shape.head, 64);
        }
        const std::byte* operand =
            kDirect ? of.at + At::kWalk.codes(kMultiplied) : operands + kMultiplied * kSlot;
        unroll<kCount>([&](auto i) LOWBIT_LAMBDA {
          constexpr int kOperand = kWeights + i;
          tile_zero<i>();
          tile_load<kOperand>(operand + i * kTileBytes, 64);
          multiply<Of::is_signed(i), i, kTile, kOperand>();
        });
      }
      if (more) {
        constexpr int kNearStep = j + At::kNearSteps, kFarStep = j + At::kFarSteps;
        const std::byte* near = ahead[kNearStep / kRun].at;
        const std::byte* far = ahead[kFarStep / kRun].at;
        constexpr std::int64_t kNearAt = At::kWalk.codes(kNearStep % kRun);
        constexpr std::int64_t kFarAt = At::kWalk.codes(kFarStep % kRun);
        unroll<2>([&](auto block) LOWBIT_LAMBDA {
          const auto fetch = [&](auto i) LOWBIT_LAMBDA {
            prefetch_quad_here<i, kBlockBytes, kFarAt + block * kBlockBytes,
                               kNearAt + block * kBlockBytes>(far, near);
          };
          if constexpr (kDirect) {
            unroll<8>(fetch);
          } else {
            expand<block>(bytes, now.at + At::kWalk.codes(j), 64, block, operands + j * kSlot,
                          fetch);
          }
        });
        // The line of scales.
        if constexpr (At::kMinimum || j % 2 == 1) {
          prefetch_line_here<kFarAt + At::kStepBytes, kNearAt + At::kStepBytes>(far, near);
        }
      }
      if (any) {
        const std::byte* scales = before.at + At::kWalk.scales(j);
        const __m512 minimum =
            At::kMinimum ? load_halves(scales + kUnitBytes / 2) : _mm512_setzero_ps();
        add_group<F, kPlanes>({sums + j * kSlot, sum_bytes, low}, load_halves(scales), minimum,
                              old_records + j * shape.record, total);
      }
    });
    unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { _mm512_store_ps(sum + t * kUnitBytes, total[t]); });
    if (any && before.run == runs - 1 && before.tile == before.first + before.count - 1) {
      write(epilogue, first_token, a.m, before.first, before.count, totals);
      clear();
    }
    before = ahead[0];
    any = true;
    unroll<kAhead - 1>([&](auto i) LOWBIT_LAMBDA { ahead[i] = ahead[i + 1]; });
    advance(ahead[kAhead - 1]);
  }
  _mm_sfence();  // outputs that went past the caches, before anybody is told
}

template <Format F, int kPlanes, int kTokens, bool kPlain>
void run_steps(const RowBlock& rows, const Activations& a, std::int64_t first_token,
               std::int64_t tile_begin, std::int64_t tile_end, std::byte* scratch) {
  using Of = Bytes<F, kPlanes>;
  using Codes = typename Of::Codes;
  constexpr int kCount = Of::kCount;
  constexpr bool kMinimum = Grouped<F>::kMinimum;
  constexpr bool kDirect = F == Format::kSymInt8;  // tiles as they lie
  constexpr std::int64_t kStepBytes = 2 * Codes::kBlockBytes;
  constexpr std::size_t kSlot = kCount * kTileBytes;
  constexpr std::size_t kSlots = kRing * kSlot;
  const Of bytes;
  const GroupWalk<kMinimum> walk(rows.layout);
  const Shape<kPlanes> shape(a);
  const Epilogue epilogue(rows, Of::kScale);
  const std::int64_t sum_bytes = shape.rows * 64, low = a.m * 64;
  std::byte* const operands = scratch;
  std::byte* const sums = operands + kSlots;
  std::byte* const scales = sums + kSlots;
  std::byte* const totals = scales + kScaleRing * 2 * kUnitBytes;
  const std::byte* from[kRing] = {};

  TileConfig config;
  for (int tile = 0; tile < 4; ++tile) {
    config.row_bytes[tile] = static_cast<std::uint16_t>(tile == 3 ? shape.depth : 64);
    config.rows[tile] = static_cast<std::uint8_t>(shape.rows);
  }
  for (int tile = 4; tile < 7; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<std::uint8_t>(shape.depth / 4);
  }
  const TileSession session(config);

  __m512 total[kTokens];
  unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { total[t] = _mm512_setzero_ps(); });
  const std::byte* const records = a.data;
  const std::byte* const records_end = a.data + shape.groups * shape.record;
  const std::byte *multiplying = records, *adding = records;
  const std::byte* row_tile = rows.packed + tile_begin * rows.layout.tile_bytes;
  const std::byte* codes = row_tile;
  std::int64_t g = 0, part = 0, multiplied_part = 0;  // of what is expanded; multiplied
  std::int64_t tile = tile_begin;                     // that is added up
  std::int64_t unwritten = tile_begin;                // the first in `totals`
  const std::size_t groups = static_cast<std::size_t>((tile_end - tile_begin) * shape.groups);
  const std::size_t steps = kPlain ? groups : groups * static_cast<std::size_t>(shape.parts);
  std::size_t expanded = 0, stored = 0, added = 0;  // groups
  bool complete = false;                            // sums in the tiles wait to be stored
  for (std::size_t s = 0; added < groups; ++s) {
    const std::size_t ready = stored;
    if (complete) {
      std::byte* to = sums + stored % kRing * kSlot;
      unroll<kCount>([&](auto i) LOWBIT_LAMBDA { tile_store<i>(to + i * sum_bytes, 64); });
      ++stored;
      complete = false;
    }
    if (s - kBehind < steps) {
      const std::size_t slot = (s - kBehind) % kRing;
      const std::byte* operand = kDirect ? from[slot] : operands + slot * kSlot;
      const std::byte* tokens = multiplying + shape.head;
      if constexpr (!kPlain) tokens += multiplied_part * shape.tile_bytes;
      tile_load<3>(tokens, kPlain ? 64 : shape.depth);
      unroll<kCount>([&](auto i) LOWBIT_LAMBDA {
        if (kPlain || multiplied_part == 0) tile_zero<i>();
        tile_load<4 + i>(operand + i * kTileBytes, 64);
        multiply<Of::is_signed(i), i, 3, 4 + i>();
      });
      if (kPlain || ++multiplied_part == shape.parts) {
        multiplied_part = 0;
        complete = true;
        multiplying += shape.record;
        if (multiplying == records_end) multiplying = records;
      }
    }
    if (s < steps) {
      std::byte* to = operands + s % kRing * kSlot;
      const auto blocks_of = [&](const std::byte* group, std::int64_t inputs, std::int64_t first,
                                 int blocks) LOWBIT_LAMBDA {
        const auto block = [&](auto second) LOWBIT_LAMBDA {
          const std::byte* lines = group + (first + second) * Codes::kBlockBytes;
          expand<second>(bytes, group, inputs, first + second, to, [&](auto i) LOWBIT_LAMBDA {
            prefetch_quad_here<i, Codes::kBlockBytes>(lines);
          });
        };
        if constexpr (kDirect) {
          const bool whole = blocks * kInputBlock >= shape.depth;
          from[s % kRing] = whole ? group + first * Codes::kBlockBytes : to;
          if (whole) {
            for (std::int64_t i = 0; i < blocks * Codes::kBlockBytes; i += 64) {
              prefetch_ahead(from[s % kRing] + i);
            }
            return;
          }
        }
        if (blocks > 0) block(std::integral_constant<int, 0>{});
        if (blocks > 1) block(std::integral_constant<int, 1>{});
      };
      const auto keep_scales = [&](const std::byte* at) LOWBIT_LAMBDA {
        prefetch_far(at);
        std::byte* keep = scales + expanded++ % kScaleRing * (2 * kUnitBytes);
        _mm512_store_ps(keep, load_halves(at));
        if constexpr (kMinimum) _mm512_store_ps(keep + kUnitBytes, load_halves(at + 32));
      };
      if (kPlain && g + 2 < shape.groups) {
        blocks_of(codes, 64, 0, 2);
        if constexpr (kMinimum) {
          keep_scales(codes + kStepBytes);
          codes += kStepBytes + kUnitBytes;
        } else {
          keep_scales(codes + kStepBytes + (g % 2 == 0 ? kStepBytes : 32));
          codes += kStepBytes + g % 2 * kUnitBytes;
        }
        ++g;
      } else {
        const std::int64_t inputs = walk.inputs(g), left = inputs / kInputBlock - part * 2;
        blocks_of(row_tile + walk.codes(g), inputs, part * 2,
                  static_cast<int>(shape.depth == 32 || left < 2 ? (left > 0 ? 1 : 0) : 2));
        if (part == 0) keep_scales(row_tile + walk.scales(g));
        if (kPlain || ++part == shape.parts) {
          part = 0;
          if (++g == shape.groups) {
            g = 0;
            row_tile += rows.layout.tile_bytes;
            codes = row_tile;
          }
        }
      }
    }
    if (added < ready) {
      const std::byte* at = sums + added % kRing * kSlot;
      const std::byte* step = scales + added % kScaleRing * (2 * kUnitBytes);
      add_group<F, kPlanes>({at, sum_bytes, low}, _mm512_load_ps(step),
                            _mm512_load_ps(step + kUnitBytes), adding, total);
      ++added;
      adding += shape.record;
      if (adding == records_end) {
        adding = records;
        std::byte* sum = totals + (tile - unwritten) * kTileBytes;
        unroll<kTokens>([&](auto t) LOWBIT_LAMBDA {
          _mm512_store_ps(sum + t * kUnitBytes, total[t]);
          total[t] = _mm512_setzero_ps();
        });
        if (++tile % kTiles == 0 || tile == tile_end) {
          write(epilogue, first_token, a.m, unwritten, tile - unwritten, totals);
          unwritten = tile;
        }
      }
    }
  }
  _mm_sfence();  // outputs that went past the caches, before anybody is told
}

template <Format F, int kPlanes>
void run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
         std::int64_t tile_begin, std::int64_t tile_end, std::int64_t, std::int64_t, std::int64_t,
         std::byte* scratch) {
  const auto go = [&](auto tokens) {
    if (a.group == 64 && a.k_padded % (kRun * 64) == 0) {
      run_blocks<F, kPlanes, tokens>(rows, a, first_token, tile_begin, tile_end, scratch);
    } else if (a.group == 64) {
      run_steps<F, kPlanes, tokens, true>(rows, a, first_token, tile_begin, tile_end, scratch);
    } else {
      run_steps<F, kPlanes, tokens, false>(rows, a, first_token, tile_begin, tile_end, scratch);
    }
  };
  if constexpr (kPlanes == 2) {
    if (a.m == 2) return go(std::integral_constant<int, 2>{});
  }
  if (a.m <= 4) return go(std::integral_constant<int, 4>{});
  if (a.m <= 8) return go(std::integral_constant<int, 8>{});
  if constexpr (kPlanes == 1) {
    if (a.m <= 12) return go(std::integral_constant<int, 12>{});
    go(std::integral_constant<int, 16>{});
  }
}

template <Format F, int kPlanes>
constexpr Path few_path(const char* name, const char* activations) {
  using Of = Bytes<F, kPlanes>;
  return {name,
          activations,
          activation_bytes<kPlanes>,
          prepare<kPlanes, Of::kExtra>,
          scratch_bytes,
          run<F, kPlanes>,
          1,
          kRowsMost,
          false};
}

// The activations' names carry what their records hold.
constexpr Path kPaths[] = {
    few_path<Format::kSymInt4, 1>("amx.int8.few.sym_int4", "amx.few.int8"),
    few_path<Format::kAsymInt4, 1>("amx.int8.few.asym_int4", "amx.few.int8.sums"),
    few_path<Format::kSymInt5, 1>("amx.int8.few.sym_int5", "amx.few.int8"),
    few_path<Format::kAsymInt5, 1>("amx.int8.few.asym_int5", "amx.few.int8.sums"),
    few_path<Format::kSymInt8, 1>("amx.int8.few.sym_int8", "amx.few.int8.z128"),
    few_path<Format::kNf3, 1>("amx.int8.few.nf3", "amx.few.int8"),
    few_path<Format::kNf4, 1>("amx.int8.few.nf4", "amx.few.int8"),
    few_path<Format::kFp4, 1>("amx.int8.few.fp4", "amx.few.int8"),
};
constexpr Path kPaths2[] = {
    few_path<Format::kSymInt4, 2>("amx.int8x2.few.sym_int4", "amx.few.int8x2"),
    few_path<Format::kAsymInt4, 2>("amx.int8x2.few.asym_int4", "amx.few.int8x2.sums"),
    few_path<Format::kSymInt5, 2>("amx.int8x2.few.sym_int5", "amx.few.int8x2"),
    few_path<Format::kAsymInt5, 2>("amx.int8x2.few.asym_int5", "amx.few.int8x2.sums"),
    few_path<Format::kSymInt8, 2>("amx.int8x2.few.sym_int8", "amx.few.int8x2.z128"),
    few_path<Format::kNf3, 2>("amx.int8x2.few.nf3", "amx.few.int8x2"),
    few_path<Format::kNf4, 2>("amx.int8x2.few.nf4", "amx.few.int8x2"),
    few_path<Format::kFp4, 2>("amx.int8x2.few.fp4", "amx.few.int8x2"),
};

}  // namespace

namespace amx {

const Path* few_int8(Format format) {
  return &kPaths[static_cast<int>(format)];
}
const Path* few_int8x2(Format format) {
  return &kPaths2[static_cast<int>(format)];
}

}  // namespace amx
}  // namespace lowbit::cpu
