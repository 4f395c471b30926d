// out = x W^T + bias in float64 with exact weights, rounded once: what kernels are compared with.
#include <vector>

#include "format/checks.h"
#include "lowbit/linear.h"
#include "reference/reference.h"

namespace lowbit::reference {

void linear(const LinearArgs& args) {
  check_linear(args);
  const Layout& layout = args.layout;
  const MatrixView x{args.x, args.x_dtype, args.m, layout.k, args.x_stride, 1};
  const MatrixView bias{args.bias, args.bias_dtype, 1, layout.n, layout.n, 1};
  const MutableMatrixView out{args.out, args.out_dtype, args.m, layout.n, args.out_stride, 1};
  std::vector<double> w(static_cast<std::size_t>(layout.k));
  for (std::int64_t n = 0; n < layout.n; ++n) {
    const std::byte* tile =
        static_cast<const std::byte*>(args.packed) + n / kTileRows * layout.tile_bytes;
    for (std::int64_t k = 0; k < layout.k; ++k) {
      w[static_cast<std::size_t>(k)] =
          weight_at(tile, layout, args.exponent, static_cast<int>(n % kTileRows), k);
    }
    for (std::int64_t m = 0; m < args.m; ++m) {
      double sum = 0;
      for (std::int64_t k = 0; k < layout.k; ++k) {
        sum += element(x, m, k) * w[static_cast<std::size_t>(k)];
      }
      if (args.bias != nullptr) sum += element(bias, 0, n);
      set_element(out, m, n, sum);
    }
  }
}

}  // namespace lowbit::reference
