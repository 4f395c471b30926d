// Which instruction set's fused kernels run.
#include "cpu/fused_kernels.h"
#include "cpu/select.h"

namespace lowbit::cpu {

const FusedKernels& fused_kernels() {
  for (Isa isa = active_level();; isa = isa_info(isa).fallback) {
    switch (isa) {
#if defined(LOWBIT_HAVE_AVX2)
      case Isa::kAvx2:
        return fused_kernels_avx2();
#endif
#if defined(LOWBIT_HAVE_AVX512VNNI)
      case Isa::kAvx512Vnni:
        return fused_kernels_avx512vnni();
#endif
      case Isa::kScalar:
        return fused_kernels_scalar();
      default:
        break;
    }
  }
}

const ManyRows* many_rows() {
  switch (active_level()) {
#if defined(LOWBIT_HAVE_AMX)
    case Isa::kAmx:
      return &many_rows_amx();
#endif
#if defined(LOWBIT_HAVE_AVX512BF16)
    case Isa::kAvx512Bf16:
      return &many_rows_avx512bf16();
#endif
    default:
      return nullptr;
  }
}

const FewRows* few_rows() {
#if defined(LOWBIT_HAVE_AMX)
  if (active_level() == Isa::kAmx) return &few_rows_amx();
#endif
  return nullptr;
}

}  // namespace lowbit::cpu
