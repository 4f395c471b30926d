// Many tokens, exact weights and activations: float32 multiply-adds.
#include "cpu/generic/avx512_panel_float.h"
#include "cpu/generic/avx512_paths.h"
#include "cpu/generic/avx512_prepare.h"

namespace lowbit::cpu {
namespace {

struct F32Policy {
  static constexpr int kQuadBytes = 256;  // panel bytes of four inputs x 16 rows
  // to: [input][tile] vectors
  LOWBIT_INLINE static void put(std::byte* to, const __m512 (&weights)[4]) {
    unroll<4>([&](auto k) LOWBIT_LAMBDA { _mm512_store_ps(to + k * 128, weights[k]); });
  }
  LOWBIT_INLINE static __m512 multiply_add(__m512 x, __m512 w, __m512 sum) {
    return _mm512_fmadd_ps(x, w, sum);
  }
};

template <Format F>
constexpr Path path(const char* name) {
  return {name,
          "avx512.f32.t12",
          f32_block_bytes<kPanelTokens>,
          prepare_f32_blocks<kPanelTokens>,
          float_scratch_bytes<F32Policy>,
          run_float_panel<F32Policy, F>,
          kPanelTiles,
          kPanelTokens,
          true};
}

constexpr Path kPaths[kFormatCount] = {
    path<Format::kSymInt4>("avx512vnni.fp32.panel.sym_int4"),
    path<Format::kAsymInt4>("avx512vnni.fp32.panel.asym_int4"),
    path<Format::kSymInt5>("avx512vnni.fp32.panel.sym_int5"),
    path<Format::kAsymInt5>("avx512vnni.fp32.panel.asym_int5"),
    path<Format::kSymInt8>("avx512vnni.fp32.panel.sym_int8"),
    path<Format::kNf3>("avx512vnni.fp32.panel.nf3"),
    path<Format::kNf4>("avx512vnni.fp32.panel.nf4"),
    path<Format::kFp4>("avx512vnni.fp32.panel.fp4"),
    path<Format::kFp8E4M3>("avx512vnni.fp32.panel.fp8_e4m3"),
    path<Format::kFp8E5M2>("avx512vnni.fp32.panel.fp8_e5m2"),
    path<Format::kFp16>("avx512vnni.fp32.panel.fp16"),
    path<Format::kBf16>("avx512vnni.fp32.panel.bf16"),
};

}  // namespace

namespace avx512 {

const Path* panel_f32(Format format) {
  return &kPaths[static_cast<int>(format)];
}

}  // namespace avx512
}  // namespace lowbit::cpu
