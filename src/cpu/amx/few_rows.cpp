// Attention of few rows, a decoding step above all, by tiles over keys and values as they lie in
// the cache. A query and a weight are each the sum of two bfloat16, so 8 rows fill the 16 of a
// tile, first parts above second parts.
//   1. scores of 16 positions = K Q^T: 16 rows of keys, as they lie, times queries in pairs of
//      channels; turned, and the parts added
//   2. softmax over kFewSpan positions, as for many rows
//   3. acc += P V: values of two positions are interleaved on the way from the cache
// Reading the cache is what this costs: some 300 instructions for 16 positions of 64 channels.
#include "cpu/amx/tiles.h"
#include "cpu/generic/fused_softmax.h"

namespace lowbit::cpu {
namespace {

constexpr int kFewSpan = 128;
constexpr int kGroupRows = 8;

struct FewWork {
  int groups, d;
  float* scores;           // [groups * 8][kFewSpan]
  float* turned;           // [16][16]
  float* mixed;            // [16][64]
  std::uint16_t* query;    // [groups][d / 32] tiles: [16 pairs][8 first, 8 second parts][2]
  std::uint16_t* weights;  // [groups][16][kFewSpan]
  std::uint16_t* values;   // [kFewSpan / 2][d][2]
  std::uint16_t* rest;     // [16][d]: keys of the last positions

  static std::int64_t floats(std::int64_t rows, std::int64_t d) {
    const std::int64_t count = (rows + kGroupRows - 1) / kGroupRows;
    return count * (kGroupRows * kFewSpan + 16 * d / 2 + 16 * kFewSpan / 2) + 256 + 1024 +
           kFewSpan * d / 2 + 16 * d / 2 + 16;
  }

  FewWork(int rows, int head_dim, float* scratch)
      : groups((rows + kGroupRows - 1) / kGroupRows), d(head_dim) {
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    scores = scratch + (64 - address % 64) % 64 / 4;
    turned = scores + groups * kGroupRows * kFewSpan;
    mixed = turned + 256;
    query = reinterpret_cast<std::uint16_t*>(mixed + 1024);
    weights = query + groups * 16 * d;
    values = weights + groups * 16 * kFewSpan;
    rest = values + kFewSpan * d;
  }
};

// x as the sum of two bfloat16; what is not finite is in the first.
LOWBIT_INLINE void split(__m512 x, __m256i& first, __m256i& second) {
  first = (__m256i)_mm512_cvtneps_pbh(x);
  const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16));
  const __mmask16 finite =
      _mm512_cmp_ps_mask(_mm512_abs_ps(rounded), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  second = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_sub_ps(finite, x, rounded));
}

void prepare(const AttendRows& args, const FewWork& work) {
  std::memset(work.query, 0,
              static_cast<std::size_t>(work.groups) * 32 * static_cast<std::size_t>(work.d));
  for (int r = 0; r < args.rows; ++r) {
    std::uint16_t* group = work.query + std::int64_t{r / kGroupRows} * 16 * work.d;
    for (int i = 0; i < work.d; i += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(args.q + std::int64_t{r} * work.d + i),
                                     _mm512_set1_ps(kLog2E));
      __m256i parts[2];
      split(x, parts[0], parts[1]);
      for (int part = 0; part < 2; ++part) {
        std::uint16_t values[16];
        std::memcpy(values, &parts[part], 32);
        const int column = r % kGroupRows + part * kGroupRows;
        for (int j = 0; j < 16; ++j) {
          group[(i / 2 + j / 2) * 32 + column * 2 + j % 2] = values[j];
        }
      }
    }
  }
}

// Scores of positions first ... first + 15 of a span, of which the keys begin at `keys`.
template <int kSteps>
LOWBIT_INLINE void score_steps(const std::uint16_t* keys, std::int64_t stride,
                               const std::uint16_t* query) {
  unroll<kSteps>([&](auto step) LOWBIT_LAMBDA {
    tile_load<4 + step % 2>(keys + step * 32, stride * 2);
    tile_load<6 + step % 2>(query + step * 512, 64);
    tile_multiply<0, 4 + step % 2, 6 + step % 2>();
  });
}

// Rows that are needed next, fetched a line at a time between other things: a burst of fetches
// fills the buffers of the L1 and stalls whatever comes behind it.
struct Ahead {
  const std::uint16_t* row = nullptr;
  std::int64_t stride = 0;
  int rows = 0, lines = 0, line = 0;

  LOWBIT_INLINE void step() {
    if (rows <= 0) return;
    _mm_prefetch(reinterpret_cast<const char*>(row) + line * 64, _MM_HINT_T1);
    if (++line < lines) return;
    line = 0;
    row += stride;
    --rows;
  }
};

void score_block(const FewWork& work, const std::uint16_t* keys, std::int64_t stride, int position,
                 Ahead& ahead) {
  for (int g = 0; g < work.groups; ++g) {
    tile_zero<0>();
    const std::uint16_t* query = work.query + std::int64_t{g} * 16 * work.d;
    for (int i = 0; i < work.d; i += 64) {
      const std::uint16_t* at = query + i / 32 * 512;
      i + 64 <= work.d ? score_steps<2>(keys + i, stride, at)
                       : score_steps<1>(keys + i, stride, at);
    }
    tile_store<0>(work.turned, 64);
    __m512i rows[16];
    unroll<16>([&](auto i) LOWBIT_LAMBDA {
      for (int line = 0; line < work.d / 32; ++line) ahead.step();
      rows[i] = _mm512_load_si512(work.turned + i * 16);
    });
    transpose16(rows);
    unroll<kGroupRows>([&](auto r) LOWBIT_LAMBDA {
      const __m512 first = _mm512_castsi512_ps(rows[r]);
      const __m512 second = _mm512_castsi512_ps(rows[r + kGroupRows]);
      _mm512_store_ps(work.scores + (g * kGroupRows + r) * kFewSpan + position,
                      _mm512_add_ps(first, second));
    });
  }
}

// Values of `count` positions in pairs; zeros up to a multiple of 32.
void interleave_values(const FewWork& work, const std::uint16_t* values, std::int64_t stride,
                       int count, Ahead& ahead) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int end = (count + 31) / 32 * 32;
  for (int p = 0; p < end; p += 2) {
    for (int i = 0; i < work.d; i += 32) {
      const std::uint16_t* at = values + p * stride + i;
      ahead.step();
      ahead.step();
      const __m512i zero = _mm512_setzero_si512();
      const __m512i first = p < count ? _mm512_loadu_si512(at) : zero;
      const __m512i second = p + 1 < count ? _mm512_loadu_si512(at + stride) : zero;
      std::uint16_t* to = work.values + (std::int64_t{p} * work.d + i * 2);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
      _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}

// mixed[16][16 * kTiles] = weights[16][positions] values, from channel i on.
template <int kTiles>
LOWBIT_INLINE void mix(const FewWork& work, int group, int blocks, int channel) {
  unroll<kTiles>([&](auto t) LOWBIT_LAMBDA { tile_zero<t>(); });
  for (int block = 0; block < blocks; ++block) {
    tile_load<4>(work.weights + (std::int64_t{group} * 16 * kFewSpan + block * 32), kFewSpan * 2);
    unroll<kTiles>([&](auto t) LOWBIT_LAMBDA {
      tile_load<5 + t % 2>(
          work.values + (std::int64_t{block} * 32 * work.d + (channel + t * 16) * 2), work.d * 4);
      tile_multiply<t, 4, 5 + t % 2>();
    });
  }
  unroll<kTiles>([&](auto t) LOWBIT_LAMBDA { tile_store<t>(work.mixed + t * 16, 256); });
}

void few_attend(const AttendRows& args) {
  const int d = args.d;
  const FewWork work(args.rows, d, args.scratch);
  prepare(args, work);
  std::memset(args.acc, 0, sizeof(float) * static_cast<std::size_t>(args.rows * d));
  std::memset(work.weights, 0, static_cast<std::size_t>(work.groups) * 32 * kFewSpan);
  for (int r = 0; r < args.rows; ++r) {
    args.max[r] = -INFINITY;
    args.sum[r] = 0;
  }
  const std::uint16_t* keys = static_cast<const std::uint16_t*>(args.keys);
  const std::uint16_t* values = static_cast<const std::uint16_t*>(args.values);
  const TileSession session;
  for (std::int64_t first = args.begin; first < args.end; first += kFewSpan) {
    const std::int64_t left = args.end - first;
    const int count = static_cast<int>(left < kFewSpan ? left : kFewSpan);
    Ahead values_ahead{values + first * args.value_stride, args.value_stride, count, d / 32};
    for (int p = 0; p < count; p += 16) {
      const std::uint16_t* at = keys + (first + p) * args.key_stride;
      const int here = count - p < 16 ? count - p : 16;
      if (here < 16) {  // rows behind the last are not ours to read
        std::memset(work.rest, 0, static_cast<std::size_t>(32 * d));
        for (int i = 0; i < here; ++i) {
          std::memcpy(work.rest + i * d, at + i * args.key_stride, static_cast<std::size_t>(2 * d));
        }
        score_block(work, work.rest, d, p, values_ahead);
      } else {
        score_block(work, at, args.key_stride, p, values_ahead);
      }
    }
    const std::int64_t behind = left - count;
    Ahead keys_ahead{keys + (first + count) * args.key_stride, args.key_stride,
                     static_cast<int>(behind < kFewSpan ? behind : kFewSpan), d / 32};
    interleave_values(work, values + first * args.value_stride, args.value_stride, count,
                      keys_ahead);
    const int end = (count + 31) / 32 * 32;
    float factors[64];
    for (int r = 0; r < args.rows; ++r) {
      float* row = work.scores + std::int64_t{r} * kFewSpan;
      const auto [before, after, most] = take_maximum<kFewSpan>(args, r, first, end, row);
      __m512 total = _mm512_setzero_ps();
      std::uint16_t* parts =
          work.weights + (std::int64_t{r / kGroupRows} * 16 + r % kGroupRows) * kFewSpan;
      for (int p = 0; p < end; p += 16) {
        const __m512 weight = exp2_of<5>(_mm512_sub_ps(_mm512_load_ps(row + p), most));
        total = _mm512_add_ps(total, weight);
        __m256i one, two;
        split(weight, one, two);
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts + p), one);
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts + kGroupRows * kFewSpan + p), two);
      }
      factors[r] = 1;
      if (after != before && before != -INFINITY) {
        factors[r] = _mm512_cvtss_f32(exp2_of<5>(_mm512_set1_ps(before - after)));
      }
      if (after != before) args.max[r] = after;
      args.sum[r] = args.sum[r] * factors[r] + _mm512_reduce_add_ps(total);
    }
    for (int g = 0; g < work.groups; ++g) {
      for (int i = 0; i < d; i += 64) {
        const int tiles = d - i < 64 ? 2 : 4;
        tiles == 4 ? mix<4>(work, g, end / 32, i) : mix<2>(work, g, end / 32, i);
        for (int r = g * kGroupRows; r < args.rows && r < (g + 1) * kGroupRows; ++r) {
          const float* one = work.mixed + (r % kGroupRows) * 64;
          float* to = args.acc + std::int64_t{r} * d + i;
          const __m512 factor = _mm512_set1_ps(factors[r]);
          for (int j = 0; j < tiles * 16; j += 16) {
            const __m512 both =
                _mm512_add_ps(_mm512_load_ps(one + j), _mm512_load_ps(one + kGroupRows * 64 + j));
            _mm512_storeu_ps(to + j, _mm512_fmadd_ps(_mm512_loadu_ps(to + j), factor, both));
          }
        }
      }
    }
  }
  for (int r = 0; r < args.rows; ++r) args.max[r] /= kLog2E;
}

constexpr FewRows kFew = {"amx", 32, [](int rows, int d) { return FewWork::floats(rows, d); },
                          few_attend};

}  // namespace

const FewRows& few_rows_amx() {
  return kFew;
}

}  // namespace lowbit::cpu
