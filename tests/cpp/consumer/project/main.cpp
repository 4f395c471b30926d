// What a user of the library writes: quantize a matrix, read it back, print the largest error.
#include <lowbit/linear.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <new>
#include <vector>

int main() {
  using namespace lowbit;
  const Layout layout = make_layout(parse_format("sym_int8"), 32, 64);
  const auto bytes = static_cast<std::size_t>(layout.bytes());
  auto* packed = static_cast<std::byte*>(::operator new(bytes, std::align_val_t(64)));
  std::vector<float> weight(32 * 64), back(32 * 64), x(64, 1.0f), out(32);
  for (std::size_t i = 0; i < weight.size(); ++i)
    weight[i] = std::sin(0.1f * static_cast<float>(i));
  const int e = quantize({weight.data(), DType::kFloat32, 32, 64, 64, 1}, layout, {packed, bytes});
  dequantize({packed, bytes}, layout, e, {back.data(), DType::kFloat32, 32, 64, 64, 1});
  linear({x.data(), DType::kFloat32, 64, packed, layout, e, nullptr, DType::kFloat32, out.data(),
          DType::kFloat32, 32, 1, Precision::kFp32});
  float worst = 0, sum = 0, row = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) {
    worst = std::max(worst, std::fabs(weight[i] - back[i]));
  }
  for (std::size_t i = 0; i < 64; ++i) row += back[i];
  sum = std::fabs(out[0] - row);
  std::printf("largest error %.4f, linear off by %.2g\n", worst, sum);
  ::operator delete(packed, std::align_val_t(64));
  return worst < 0.005f && sum < 0.01f ? 0 : 1;
}
