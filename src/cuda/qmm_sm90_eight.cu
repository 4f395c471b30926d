// The wgmma kernel for fp8 weights as they are and activations in e4m3.
#include "cuda/qmm.cuh"

namespace lowbit::cuda {
LOWBIT_DEFINE_QMM_EIGHT(Kind::kE4M3Raw)
LOWBIT_DEFINE_QMM_EIGHT(Kind::kE5M2Raw)
}  // namespace lowbit::cuda
