#include "cpu/generic/fused_simd.h"

namespace lowbit::cpu {
namespace {

constexpr FusedKernels kKernels = kernels_named("avx2");

}  // namespace

const FusedKernels& fused_kernels_avx2() {
  return kKernels;
}

}  // namespace lowbit::cpu
