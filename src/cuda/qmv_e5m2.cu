// The decode kernel for one kind of code: a file each, so that they compile in parallel.
#include "cuda/qmv.cuh"

namespace lowbit::cuda {
LOWBIT_DEFINE_QMV(Kind::kE5M2)
}  // namespace lowbit::cuda
