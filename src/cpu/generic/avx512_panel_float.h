// Many tokens in float32 or bf16: a panel of 32 outputs is expanded once per pass over the tokens
// and multiplied by blocks of up to 12 tokens: 12 x 2 accumulators, two weight vectors, a
// broadcast. The policy says how four float32 vectors become panel bytes and what one step
// multiplies.
//
// K is cut into chunks so that the panel stays in L2; sums of the chunks before are kept in
// scratch.
#pragma once

#include "cpu/generic/avx512_floats.h"

namespace lowbit::cpu {
namespace {

constexpr int kPanelTokens = 12;
constexpr int kPanelTiles = 2;
// Half of a 1 MiB L2: the other half holds activations and the next panel's packed bytes.
constexpr std::int64_t kPanelBytes = 512 * 1024;

// Inputs per chunk: a multiple of every group size.
template <class Policy>
LOWBIT_INLINE std::int64_t chunk_inputs(std::int64_t k_padded) {
  const std::int64_t most = kPanelBytes / (Policy::kQuadBytes * kPanelTiles / 4) / 256 * 256;
  const std::int64_t chunks = (k_padded + most - 1) / most;
  return ((k_padded + chunks - 1) / chunks + 255) / 256 * 256;
}

template <class Policy>
std::int64_t float_scratch_bytes(const RowBlock& rows, const Activations& a) {
  const std::int64_t chunk = chunk_inputs<Policy>(rows.layout.k_padded);
  const std::int64_t inputs = chunk < rows.layout.k_padded ? chunk : rows.layout.k_padded;
  return inputs / 4 * Policy::kQuadBytes * kPanelTiles + a.m * kPanelTiles * 64;
}

struct FloatAhead {
  const std::byte *at, *end;
  int lines;  // per 32 inputs
};

template <class Policy, Format F>
void expand_floats(Floats<F>& floats, const std::byte* tile, const AnyWalk<F>& walk,
                   std::int64_t k0, std::int64_t k1, std::byte* to) {
  std::int64_t k = k0;
  while (k < k1) {
    const std::int64_t g = k / walk.group;
    const std::int64_t start = g * walk.group, inputs = walk.inputs(g);
    const std::byte* codes = tile + walk.codes(g);
    floats.open(tile, walk, g);
    const std::int64_t stop = start + inputs < k1 ? start + inputs : k1;
    for (std::int64_t b = (k - start) / kInputBlock; b < (stop - start) / kInputBlock; ++b) {
      const auto plane = Floats<F>::plane(codes, inputs, b);
      unroll<8>([&](auto i) LOWBIT_LAMBDA {
        __m512 weights[4];
        floats.template quad<i>(codes, b, plane, weights);
        Policy::put(to + i * Policy::kQuadBytes * kPanelTiles, weights);
      });
      to += 8 * Policy::kQuadBytes * kPanelTiles;
    }
    k = stop;
  }
}

template <class Policy, int kCount>
void block_float(const std::byte* panel, std::int64_t inputs, const std::byte* x, float* kept,
                 bool first, bool last, const Epilogue& epilogue, __m512 scale0, __m512 scale1,
                 std::int64_t token, std::int64_t tile, bool second, FloatAhead& ahead) {
  __m512 sum[kCount][kPanelTiles];
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    unroll<kPanelTiles>([&](auto n) LOWBIT_LAMBDA {
      sum[t][n] = first ? _mm512_setzero_ps() : _mm512_load_ps(kept + (t * kPanelTiles + n) * 16);
    });
  });
  constexpr int kSteps = Policy::kQuadBytes / 64;  // multiply-adds per four inputs
  for (std::int64_t k = 0; k < inputs; k += kInputBlock) {
    for (int i = 0; i < ahead.lines && ahead.at < ahead.end; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
      ahead.at += 64;
    }
    unroll<8 * kSteps>([&](auto s) LOWBIT_LAMBDA {
      // The panel streams from L2, the activations from L3.
      _mm_prefetch(reinterpret_cast<const char*>(panel + s * 128 + 2048), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(panel + s * 128 + 2112), _MM_HINT_T0);
      if constexpr (kCount >= 6) {
        _mm_prefetch(reinterpret_cast<const char*>(x + s * kCount * 4 + 1536), _MM_HINT_T0);
      }
      const __m512 w0 = _mm512_load_ps(panel + s * 128);
      const __m512 w1 = _mm512_load_ps(panel + s * 128 + 64);
      unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
        float word;
        __builtin_memcpy(&word, x + (s * kCount + t) * 4, 4);
        const __m512 value = _mm512_set1_ps(word);
        sum[t][0] = Policy::multiply_add(value, w0, sum[t][0]);
        sum[t][1] = Policy::multiply_add(value, w1, sum[t][1]);
      });
    });
    panel += 8 * kSteps * 128;
    x += 8 * kSteps * kCount * 4;
  }
  unroll<kCount>([&](auto t) LOWBIT_LAMBDA {
    if (!last) {
      _mm512_store_ps(kept + (t * kPanelTiles) * 16, sum[t][0]);
      _mm512_store_ps(kept + (t * kPanelTiles + 1) * 16, sum[t][1]);
    } else {
      epilogue.store(token + t, tile, _mm512_mul_ps(sum[t][0], scale0));
      if (second) epilogue.store(token + t, tile + 1, _mm512_mul_ps(sum[t][1], scale1));
    }
  });
}

template <class Policy, Format F>
void run_float_panel(const RowBlock& rows, const Activations& a, std::int64_t first_token,
                     std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
                     std::int64_t token_end, std::int64_t next_tile, std::byte* scratch) {
  Floats<F> floats;
  const Layout& layout = rows.layout;
  const AnyWalk<F> walk(layout);
  const Epilogue epilogue(rows, 1.0f);
  const std::int64_t chunk = chunk_inputs<Policy>(layout.k_padded);
  const std::int64_t held = chunk < layout.k_padded ? chunk : layout.k_padded;
  float* kept = reinterpret_cast<float*>(scratch + held / 4 * Policy::kQuadBytes * kPanelTiles);
  constexpr int kSteps = Policy::kQuadBytes / 64;
  const std::int64_t block_stride = align64(layout.k_padded / 4 * kSteps * kPanelTokens * 4);
  const std::int64_t token_blocks = (token_end - token_begin + kPanelTokens - 1) / kPanelTokens;
  for (std::int64_t tile = tile_begin; tile < tile_end; tile += kPanelTiles) {
    const bool second = tile + 1 < layout.tiles;
    const std::byte* bytes0 = rows.packed + tile * layout.tile_bytes;
    const std::byte* bytes1 = second ? bytes0 + layout.tile_bytes : bytes0;
    const __m512 scale0 = row_scales<F>(bytes0), scale1 = row_scales<F>(bytes1);
    FloatAhead ahead{nullptr, nullptr, 0};
    const std::int64_t next = tile + kPanelTiles < tile_end ? tile + kPanelTiles : next_tile;
    // Only where the panel leaves room in L2 for what is fetched.
    if (next >= 0 && next < layout.tiles && chunk >= layout.k_padded) {
      const std::int64_t tiles =
          next + kPanelTiles <= layout.tiles ? kPanelTiles : layout.tiles - next;
      ahead.at = rows.packed + next * layout.tile_bytes;
      ahead.end = ahead.at + tiles * layout.tile_bytes;
      const std::int64_t steps = token_blocks * (layout.k_padded / kInputBlock);
      ahead.lines = static_cast<int>((tiles * layout.tile_bytes / 64 + steps - 1) / steps);
    }
    for (std::int64_t k0 = 0; k0 < layout.k_padded; k0 += chunk) {
      const std::int64_t k1 = k0 + chunk < layout.k_padded ? k0 + chunk : layout.k_padded;
      expand_floats<Policy, F>(floats, bytes0, walk, k0, k1, scratch);
      expand_floats<Policy, F>(floats, bytes1, walk, k0, k1, scratch + 64);
      for (std::int64_t t = token_begin; t < token_end; t += kPanelTokens) {
        const std::int64_t left = token_end - t;
        const std::int64_t count = left < kPanelTokens ? left : kPanelTokens;
        const std::byte* x = a.data + t / kPanelTokens * block_stride + k0 * kSteps * count;
        unroll<kPanelTokens>([&](auto i) LOWBIT_LAMBDA {
          if (count == i + 1) {
            block_float<Policy, i + 1>(scratch, k1 - k0, x,
                                       kept + (t - token_begin) * kPanelTiles * 16, k0 == 0,
                                       k1 == layout.k_padded, epilogue, scale0, scale1,
                                       first_token + t, tile, second, ahead);
          }
        });
      }
    }
  }
}

}  // namespace
}  // namespace lowbit::cpu
