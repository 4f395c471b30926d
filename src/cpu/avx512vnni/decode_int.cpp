// Few tokens, grouped formats: out = sum over groups of s * as * (sum of code * q - zero * sum of
// q)
// (+ m * as * sum of q), integer sums exact.
//
// Tile: 16 rows, all inputs, one sequential stream of bytes; tokens in blocks of up to kTokens,
// each with its accumulators in registers. Weights are the unsigned operand of vpdpbusd,
// activations the signed one, broadcast four bytes at a time. The zero point enters as the
// accumulators' start.
#include "cpu/generic/avx512_codes.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

template <Format F, int kPlanes, int kTokensMax, int kTokens>
void tile_int(const Operand<F>& operand, const std::byte* tile,
              const GroupWalk<Grouped<F>::kMinimum>& walk, const std::byte* block,
              const IntRecords& records, const Epilogue& epilogue, std::int64_t token,
              std::int64_t tile_index) {
  using Facts = Grouped<F>;
  using Codes = Unpack<Facts::kBits>;
  // Two chains per sum where there are few, or the latency of vpdpbusd shows.
  constexpr int kChains = kTokens * kPlanes <= 4 ? 2 : 1;
  __m512 total[kTokens];
  unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { total[t] = _mm512_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    const std::byte* record = block + g * records.bytes;
    const std::byte* planes[2] = {record + 16 * kTokens, record + (16 + walk.group) * kTokens};
    __m512i sum[kTokens][kPlanes][kChains];
    unroll<kTokens>([&](auto t) LOWBIT_LAMBDA {
      unroll<kPlanes * kChains>(
          [&](auto i) LOWBIT_LAMBDA { sum[t][i / kChains][i % kChains] = _mm512_setzero_si512(); });
      sum[t][kPlanes - 1][0] = broadcast(init_of(record, t, kTokens));
    });
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      prefetch_block<Codes::kBlockBytes>(codes + b * Codes::kBlockBytes);
      const auto plane = Codes::plane(codes, inputs, b);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        const __m512i weights = operand.template quad<i>(codes, b, plane);
        unroll<kTokens>([&](auto t) LOWBIT_LAMBDA {
          unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
            constexpr int kChain = i % kChains;
            sum[t][p][kChain] = _mm512_dpbusd_epi32(sum[t][p][kChain], weights,
                                                    broadcast(planes[p] + (i * kTokens + t) * 4));
          });
        });
      });
      planes[0] += 32 * kTokens;
      planes[1] += 32 * kTokens;
    }
    prefetch_far(tile + walk.scales(g));
    const __m512 scale = load_halves(tile + walk.scales(g));
    unroll<kTokens>([&](auto t) LOWBIT_LAMBDA {
      if constexpr (kChains == 2) {
        unroll<kPlanes>([&](auto p) LOWBIT_LAMBDA {
          sum[t][p][0] = _mm512_add_epi32(sum[t][p][0], sum[t][p][1]);
        });
      }
      __m512i whole = sum[t][kPlanes - 1][0];
      if constexpr (kPlanes == 2) {
        whole = _mm512_add_epi32(whole, _mm512_slli_epi32(sum[t][0][0], 8));
      }
      const __m512 value = scaled_sum<kPlanes>(whole, record, t, kTokens);
      total[t] = _mm512_fmadd_ps(value, scale, total[t]);
      if constexpr (Facts::kMinimum) {
        const __m512 minimum = load_halves(tile + walk.scales(g) + 32);
        total[t] = _mm512_fmadd_ps(minimum, broadcast_f32(init2_of(record, t, kTokens)), total[t]);
      }
    });
  }
  unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

// NormalFloats as two bytes (normal_float_pair.h) against two activation planes, all four products.
// A sum gets one product per quad: two chains for one token, or the latency shows. (A parameter: as
// a constant of the function, some compilers do not take it for one inside the lambdas.)
template <Format F, int kTokens, int kChains = kTokens == 1 ? 2 : 1>
void tile_pair(const PairTables& tables, const std::byte* tile, const GroupWalk<false>& walk,
               const std::byte* block, const IntRecords& records, const Epilogue& epilogue,
               std::int64_t token, std::int64_t tile_index) {
  using Codes = Unpack<Grouped<F>::kBits>;
  using Pair = NormalFloatPair<F>;
  const __m512i table[2] = {_mm512_load_si512(tables.first), _mm512_load_si512(tables.second)};
  __m512 total[kTokens];
  unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { total[t] = _mm512_setzero_ps(); });
  auto next = Codes::plane(tile, walk.inputs(0), 0);
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    const std::byte* record = block + g * records.bytes;
    const std::byte* planes[2] = {record + 16 * kTokens, record + (16 + walk.group) * kTokens};
    const std::int64_t following = g + 1 < walk.groups ? g + 1 : g;
    __m512i sum[kTokens][2][2][kChains];  // [token][byte of the weight][plane][chain]
    unroll<kTokens * 4 * kChains>([&](auto i) LOWBIT_LAMBDA {
      constexpr int kOf = i / kChains;
      sum[kOf / 4][kOf / 2 % 2][kOf % 2][i % kChains] =
          kOf % 2 == 1 && i % kChains == 0 ? broadcast(init_of(record, kOf / 4, kTokens))
                                           : _mm512_setzero_si512();
    });
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      // A block ahead: some thirty cycles of latency, more than the schedulers see.
      const auto plane = next;
      next = b + 1 < inputs / kInputBlock
                 ? Codes::plane(codes, inputs, b + 1)
                 : Codes::plane(tile + walk.codes(following), walk.inputs(following), 0);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        prefetch_quad_here<i, Codes::kBlockBytes>(codes + b * Codes::kBlockBytes);
        const __m512i index = Codes::template index<i>(codes, b, plane);
        const __m512i weights[2] = {_mm512_permutexvar_epi8(index, table[0]),
                                    _mm512_permutexvar_epi8(index, table[1])};
        unroll<kTokens * 4>([&](auto j) LOWBIT_LAMBDA {
          constexpr int t = j / 4, w = j / 2 % 2, p = j % 2;
          __m512i& to = sum[t][w][p][i % kChains];
          to = _mm512_dpbusd_epi32(to, weights[w], broadcast(planes[p] + (i * kTokens + t) * 4));
        });
      });
      planes[0] += 32 * kTokens;
      planes[1] += 32 * kTokens;
    }
    prefetch_far(tile + walk.scales(g));
    const __m512 scale = load_halves(tile + walk.scales(g));
    unroll<kTokens>([&](auto t) LOWBIT_LAMBDA {
      __m512 part[2];
      unroll<2>([&](auto w) LOWBIT_LAMBDA {
        if constexpr (kChains == 2) {
          unroll<2>([&](auto p) LOWBIT_LAMBDA {
            sum[t][w][p][0] = _mm512_add_epi32(sum[t][w][p][0], sum[t][w][p][1]);
          });
        }
        part[w] = _mm512_cvtepi32_ps(
            _mm512_add_epi32(sum[t][w][1][0], _mm512_slli_epi32(sum[t][w][0][0], 8)));
      });
      __m512 value = _mm512_mul_ps(part[1], _mm512_set1_ps(Pair::kSecond));
      value = _mm512_fmadd_ps(part[0], _mm512_set1_ps(Pair::kFirst), value);
      value = _mm512_mul_ps(value, broadcast_f32(scale_of(record, t, kTokens)));
      total[t] = _mm512_fmadd_ps(value, scale, total[t]);
    });
  }
  unroll<kTokens>([&](auto t) LOWBIT_LAMBDA { epilogue.store(token + t, tile_index, total[t]); });
}

std::int64_t no_scratch(const RowBlock&, const Activations&) {
  return 0;
}

template <Format F, int kPlanes, int kTokensMax>
void run_int(const RowBlock& rows, const Activations& a, std::int64_t first_token,
             std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
             std::int64_t token_end, std::int64_t, std::byte*) {
  const Operand<F> operand;
  const GroupWalk<Grouped<F>::kMinimum> walk(rows.layout);
  const std::int64_t per_block = block_tokens(a.m, kTokensMax);
  const IntRecords records(a, kPlanes, per_block, 0);
  const Epilogue epilogue(rows, Grouped<F>::kValueScale);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += per_block) {
      const std::byte* block = a.data + records.at(t / per_block, 0);
      const std::int64_t left = token_end - t;
      const std::int64_t nt = left < per_block ? left : per_block;
      unroll<kTokensMax>([&](auto i) LOWBIT_LAMBDA {
        if (nt == i + 1) {
          tile_int<F, kPlanes, kTokensMax, i + 1>(operand, bytes, walk, block, records, epilogue,
                                                  first_token + t, tile);
        }
      });
    }
  }
}

template <Format F, int kTokensMax>
void run_codebook(const RowBlock& rows, const Activations& a, std::int64_t first_token,
                  std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
                  std::int64_t token_end, std::int64_t, std::byte*) {
  const GroupWalk<false> walk(rows.layout);
  const std::int64_t per_block = block_tokens(a.m, kTokensMax);
  const IntRecords records(a, 2, per_block, 0);
  const Epilogue epilogue(rows, 1.0f);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += per_block) {
      const std::byte* block = a.data + records.at(t / per_block, 0);
      const std::int64_t left = token_end - t;
      const std::int64_t nt = left < per_block ? left : per_block;
      unroll<kTokensMax>([&](auto i) LOWBIT_LAMBDA {
        if (nt == i + 1) {
          tile_pair<F, i + 1>(pair_tables<F>(), bytes, walk, block, records, epilogue,
                              first_token + t, tile);
        }
      });
    }
  }
}

constexpr int kTokens1 = 8;  // one plane: 8 integer and 8 float accumulators
constexpr int kTokens2 = 4;  // two planes: 8 and 4

template <Format F, int kPlanes>
constexpr Path int_path(const char* name, const char* activations) {
  constexpr int kTokens = kPlanes == 1 ? kTokens1 : kTokens2;
  return {name,
          activations,
          int_activation_bytes<kPlanes, kTokens>,
          prepare_int<kPlanes, kTokens, 0, Grouped<F>::kZero, Grouped<F>::kMinimum>,
          no_scratch,
          run_int<F, kPlanes, kTokens>,
          1,
          1,
          false};
}

template <Format F>
constexpr Path codebook_path(const char* name) {
  return {name,
          "avx512.int8x2.t4.z128",
          int_activation_bytes<2, kTokens2>,
          prepare_int<2, kTokens2, 0, kPairZero, false>,
          no_scratch,
          run_codebook<F, kTokens2>,
          1,
          1,
          false};
}

#define LOWBIT_NAME(kind, format) "avx512vnni." kind "." format

// The activations' names carry the zero point that their starts contain.
constexpr Path kInt8[kFormatCount] = {
    int_path<Format::kSymInt4, 1>(LOWBIT_NAME("int8.decode", "sym_int4"), "avx512.int8.t8.z8"),
    int_path<Format::kAsymInt4, 1>(LOWBIT_NAME("int8.decode", "asym_int4"), "avx512.int8.t8.z0"),
    int_path<Format::kSymInt5, 1>(LOWBIT_NAME("int8.decode", "sym_int5"), "avx512.int8.t8.z16"),
    int_path<Format::kAsymInt5, 1>(LOWBIT_NAME("int8.decode", "asym_int5"), "avx512.int8.t8.z0"),
    int_path<Format::kSymInt8, 1>(LOWBIT_NAME("int8.decode", "sym_int8"), "avx512.int8.t8.z128"),
    int_path<Format::kNf3, 1>(LOWBIT_NAME("int8.decode", "nf3"), "avx512.int8.t8.z128"),
    int_path<Format::kNf4, 1>(LOWBIT_NAME("int8.decode", "nf4"), "avx512.int8.t8.z128"),
    int_path<Format::kFp4, 1>(LOWBIT_NAME("int8.decode", "fp4"), "avx512.int8.t8.z128"),
};

constexpr Path kInt8x2[kFormatCount] = {
    int_path<Format::kSymInt4, 2>(LOWBIT_NAME("int8x2.decode", "sym_int4"), "avx512.int8x2.t4.z8"),
    int_path<Format::kAsymInt4, 2>(LOWBIT_NAME("int8x2.decode", "asym_int4"),
                                   "avx512.int8x2.t4.z0"),
    int_path<Format::kSymInt5, 2>(LOWBIT_NAME("int8x2.decode", "sym_int5"), "avx512.int8x2.t4.z16"),
    int_path<Format::kAsymInt5, 2>(LOWBIT_NAME("int8x2.decode", "asym_int5"),
                                   "avx512.int8x2.t4.z0"),
    int_path<Format::kSymInt8, 2>(LOWBIT_NAME("int8x2.decode", "sym_int8"),
                                  "avx512.int8x2.t4.z128"),
    codebook_path<Format::kNf3>(LOWBIT_NAME("int8x2.decode", "nf3")),
    codebook_path<Format::kNf4>(LOWBIT_NAME("int8x2.decode", "nf4")),
    int_path<Format::kFp4, 2>(LOWBIT_NAME("int8x2.decode", "fp4"), "avx512.int8x2.t4.z128"),
};

const Path* path_or_null(const Path& path) {
  return path.run == nullptr ? nullptr : &path;
}

}  // namespace

namespace avx512 {

const Path* decode_int8(Format format) {
  return path_or_null(kInt8[static_cast<int>(format)]);
}
const Path* decode_int8x2(Format format) {
  return path_or_null(kInt8x2[static_cast<int>(format)]);
}

}  // namespace avx512
}  // namespace lowbit::cpu
