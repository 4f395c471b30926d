// The wgmma kernel for one kind of code: a file each, so that they compile in parallel.
#include "cuda/qmm.cuh"

namespace lowbit::cuda {
LOWBIT_DEFINE_QMM(Kind::kInt8)
}  // namespace lowbit::cuda
