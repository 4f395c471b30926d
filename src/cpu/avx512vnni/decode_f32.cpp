// Few tokens, weights exact in float32, activations too: out = sum of w * x by multiply-add. The
// way of the 8- and 16-bit float formats, whose bytes cost more time than this arithmetic.
#include "cpu/generic/avx512_floats.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

constexpr std::int64_t kPrefetch = 4096;  // as in decode_int.cpp
constexpr int kTokens = 4;  // 4 x 2 accumulators; more tokens go over the tile again, from L1 or L2

template <Format F, int kCount>
void tile_f32(Floats<F>& floats, const std::byte* tile, const AnyWalk<F>& walk, const float* x,
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
    floats.open(tile, walk, g);
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      unroll<static_cast<int>(Floats<F>::kBlockBytes / 64)>([&](auto i) LOWBIT_LAMBDA {
        _mm_prefetch(
            reinterpret_cast<const char*>(codes + b * Floats<F>::kBlockBytes + i * 64 + kPrefetch),
            _MM_HINT_T0);
      });
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        __m512 weights[4];
        floats.template quad<i>(codes, inputs, b, weights);
        unroll<4>([&](auto k) LOWBIT_LAMBDA {
          unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
            constexpr int kChain = k % kChains;
            sum[t][kChain] = _mm512_fmadd_ps(
                weights[k], _mm512_set1_ps(x[t * k_padded + i * 4 + k]), sum[t][kChain]);
          });
        });
      });
      x += kInputBlock;
    }
  }
  const __m512 scale = row_scales<F>(tile);
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    __m512 total = _mm512_add_ps(sum[t][0], sum[t][1]);
    if constexpr (kChains == 4) total = _mm512_add_ps(total, _mm512_add_ps(sum[t][2], sum[t][3]));
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
  Floats<F> floats;
  const AnyWalk<F> walk(rows.layout);
  const Epilogue epilogue(rows, 1.0f);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; t += kTokens) {
      const float* x = reinterpret_cast<const float*>(a.data) + t * a.k_padded;
      const std::int64_t left = token_end - t;
      unroll<kTokens>([&](auto i) LOWBIT_LAMBDA {
        if (left == i + 1 || (i + 1 == kTokens && left > kTokens)) {
          tile_f32<F, i + 1>(floats, bytes, walk, x, a.k_padded, epilogue, first_token + t, tile);
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
