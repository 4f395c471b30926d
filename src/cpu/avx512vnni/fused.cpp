#include "cpu/generic/fused_simd.h"

namespace lowbit::cpu {
namespace {

constexpr FusedKernels kKernels = kernels_named("avx512vnni");

}  // namespace

const FusedKernels& fused_kernels_avx512vnni() {
  return kKernels;
}

}  // namespace lowbit::cpu
