#include "cpu/generic/fused_simd.h"

namespace lowbit::cpu {
namespace {

constexpr FusedKernels kKernels = kernels_named("scalar");

}  // namespace

const FusedKernels& fused_kernels_scalar() {
  return kKernels;
}

}  // namespace lowbit::cpu
