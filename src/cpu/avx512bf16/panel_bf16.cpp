// Many tokens in bf16: weights dequantized, scale included, and rounded to bf16 in the panel;
// vdpbf16ps takes two inputs per step. It flushes subnormals, in its sums too.
//
// The panel holds inputs 0..3 of a quad as pairs (0, 2) and (1, 3); so do the activations.
#include "cpu/generic/avx512_bf16.h"
#include "cpu/generic/avx512_panel_float.h"
#include "cpu/generic/avx512_paths.h"

namespace lowbit::cpu {
namespace {

struct Bf16Policy {
  static constexpr int kQuadBytes = 128;
  LOWBIT_INLINE static void put(std::byte* to, const __m512 (&weights)[4]) {
    _mm512_store_si512(to, interleave(weights[0], weights[2]));
    _mm512_store_si512(to + 128, interleave(weights[1], weights[3]));
  }
  LOWBIT_INLINE static __m512 multiply_add(__m512 x, __m512 w, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(x),
                            (__m512bh)_mm512_castps_si512(w));
  }
};

// Blocks of kPanelTokens: [k_padded / 2 pairs][nt][2] bf16.
std::int64_t activation_bytes(const Activations& a) {
  return (a.m + kPanelTokens - 1) / kPanelTokens * align64(a.k_padded * kPanelTokens * 2);
}

void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t stride = align64(a.k_padded * kPanelTokens * 2);
  const __m256i order = _mm256_set_epi16(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t block = t / kPanelTokens;
    const std::int64_t left = a.m - block * kPanelTokens;
    const std::int64_t nt = left < kPanelTokens ? left : kPanelTokens;
    std::byte* to = a.data + block * stride + (t - block * kPanelTokens) * 4;
    for (std::int64_t k = 0; k < a.k_padded; k += 16) {
      const __m512 x = load16(tokens.x, tokens.dtype, t * tokens.stride + k, a.k - k);
      const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
      alignas(32) std::uint32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm256_permutexvar_epi16(order, bits));
      for (int i = 0; i < 8; ++i) __builtin_memcpy(to + (k / 2 + i) * nt * 4, &pairs[i], 4);
    }
  }
}

template <Format F>
constexpr Path path(const char* name) {
  return {name,
          "avx512.bf16.t12",
          activation_bytes,
          prepare,
          float_scratch_bytes<Bf16Policy>,
          run_float_panel<Bf16Policy, F>,
          kPanelTiles,
          kPanelTokens,
          true};
}

constexpr Path kPaths[kFormatCount] = {
    path<Format::kSymInt4>("avx512bf16.bf16.panel.sym_int4"),
    path<Format::kAsymInt4>("avx512bf16.bf16.panel.asym_int4"),
    path<Format::kSymInt5>("avx512bf16.bf16.panel.sym_int5"),
    path<Format::kAsymInt5>("avx512bf16.bf16.panel.asym_int5"),
    path<Format::kSymInt8>("avx512bf16.bf16.panel.sym_int8"),
    path<Format::kNf3>("avx512bf16.bf16.panel.nf3"),
    path<Format::kNf4>("avx512bf16.bf16.panel.nf4"),
    path<Format::kFp4>("avx512bf16.bf16.panel.fp4"),
    path<Format::kFp8E4M3>("avx512bf16.bf16.panel.fp8_e4m3"),
    path<Format::kFp8E5M2>("avx512bf16.bf16.panel.fp8_e5m2"),
    path<Format::kFp16>("avx512bf16.bf16.panel.fp16"),
    path<Format::kBf16>("avx512bf16.bf16.panel.bf16"),
};

}  // namespace

namespace avx512 {

const Path* panel_bf16(Format format) {
  return &kPaths[static_cast<int>(format)];
}

}  // namespace avx512
}  // namespace lowbit::cpu
