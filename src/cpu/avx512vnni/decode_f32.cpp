// Few tokens, weights exact in float32, activations too: out = sum of w * x by multiply-add. The
// way of the 8- and 16-bit float formats, whose bytes cost more time than this arithmetic.
#include "cpu/generic/avx512_floats.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

constexpr int kTokens = 4;  // 4 x 2 accumulators; more tokens go over the tile again, from L1 or L2

// How the four vectors of a quad meet activations: here an input each, a lane a row.
template <Format F>
struct Terms : Floats<F> {
  LOWBIT_INLINE static __m512 activation(const float* x, int k) { return _mm512_set1_ps(x[k]); }
  LOWBIT_INLINE static __m512 total(__m512 first, __m512 second) {
    return _mm512_add_ps(first, second);
  }
};
// Half a unit each, converted where it lies: 8 rows x 2 inputs, met by the same two activations
// repeated. Taking one input of 16 rows instead needs a shift and a narrowing before each
// conversion: twice the time.
template <>
struct Terms<Format::kFp16> {
  static constexpr std::int64_t kBlockBytes = 1024;
  template <class Walk>
  LOWBIT_INLINE void open(const std::byte*, const Walk&, std::int64_t) {}
  LOWBIT_INLINE static NoPlane plane(const std::byte*, std::int64_t, std::int64_t) { return {}; }
  template <int I>
  LOWBIT_INLINE void quad(const std::byte* codes, std::int64_t block, NoPlane,
                          __m512 (&out)[4]) const {
    unroll<4>([&](auto i) LOWBIT_LAMBDA {
      out[i] = load_halves(codes + block * kBlockBytes + I * 128 + i * 32);
    });
  }
  LOWBIT_INLINE static __m512 activation(const float* x, int k) {
    double two;
    __builtin_memcpy(&two, x + k / 2 * 2, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(two));
  }
  LOWBIT_INLINE static __m512 total(__m512 first, __m512 second) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(first, even, second),
                         _mm512_permutex2var_ps(first, odd, second));
  }
};

template <Format F, int kCount>
void tile_f32(Terms<F>& terms, const std::byte* tile, const AnyWalk<F>& walk, const float* x,
              std::int64_t k_padded, const Epilogue& epilogue, std::int64_t token,
              std::int64_t tile_index) {
  // Four chains for one token: the latency of a multiply-add is 4 cycles and one starts per cycle.
  constexpr int kChains = kCount == 1 ? 4 : 2;
  __m512 sum[kCount][kChains];
  unroll<kCount * kChains>(
      [&](auto i) LOWBIT_LAMBDA { sum[i / kChains][i % kChains] = _mm512_setzero_ps(); });
  for (std::int64_t g = 0; g < walk.groups; ++g) {
    const std::int64_t inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    terms.open(tile, walk, g);
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      const auto plane = Terms<F>::plane(codes, inputs, b);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        prefetch_quad<i, Terms<F>::kBlockBytes>(codes + b * Terms<F>::kBlockBytes);
        __m512 weights[4];
        terms.template quad<i>(codes, b, plane, weights);
        unroll<4>([&](auto k) LOWBIT_LAMBDA {
          unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
            constexpr int kChain = k % kChains;
            sum[t][kChain] = _mm512_fmadd_ps(
                weights[k], Terms<F>::activation(x + t * k_padded + i * 4, k), sum[t][kChain]);
          });
        });
      });
      x += kInputBlock;
    }
  }
  const __m512 scale = row_scales<F>(tile);
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    if constexpr (kChains == 4) {
      sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][2]);
      sum[t][1] = _mm512_add_ps(sum[t][1], sum[t][3]);
    }
    const __m512 total = Terms<F>::total(sum[t][0], sum[t][1]);
    epilogue.store(token + t, tile_index, _mm512_mul_ps(total, scale));
  });
}

std::int64_t no_scratch(const RowBlock&, const Activations&) {
  return 0;
}

template <Format F>
void run_f32(const RowBlock& rows, const Activations& a, std::int64_t first_token,
             std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
             std::int64_t token_end, std::int64_t, std::byte*) {
  Terms<F> terms;
  const AnyWalk<F> walk(rows.layout);
  const Epilogue epilogue(rows, 1.0f);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += kTokens) {
      const float* x = reinterpret_cast<const float*>(a.data) + t * a.k_padded;
      const std::int64_t left = token_end - t;
      unroll<kTokens>([&](auto i) LOWBIT_LAMBDA {
        if (left == i + 1 || (i + 1 == kTokens && left > kTokens)) {
          tile_f32<F, i + 1>(terms, bytes, walk, x, a.k_padded, epilogue, first_token + t, tile);
        }
      });
    }
  }
}

template <Format F>
constexpr Path f32_path(const char* name) {
  return {name, "avx512.f32", f32_activation_bytes, prepare_f32, no_scratch, run_f32<F>, 1,
          1,    false};
}

constexpr Path kPaths[] = {
    f32_path<Format::kFp8E4M3>("avx512vnni.fp32.decode.fp8_e4m3"),
    f32_path<Format::kFp8E5M2>("avx512vnni.fp32.decode.fp8_e5m2"),
    f32_path<Format::kFp16>("avx512vnni.fp32.decode.fp16"),
    f32_path<Format::kBf16>("avx512vnni.fp32.decode.bf16"),
};

}  // namespace

namespace avx512 {

const Path* decode_f32(Format format) {
  const int i = static_cast<int>(format) - static_cast<int>(Format::kFp8E4M3);
  return i < 0 ? nullptr : &kPaths[i];
}

}  // namespace avx512
}  // namespace lowbit::cpu
