#include "fused/work.h"

#include <span>

namespace lowbit::fused {

void require(bool ok, const std::string& text) {
  if (!ok) throw Error(ErrorCode::kValue, "fused block: " + text);
}

std::int64_t columns_of(const std::vector<PackedMatrix>& matrices) {
  std::int64_t columns = 0;
  for (const PackedMatrix& matrix : matrices) columns += matrix.layout.n;
  return columns;
}

void multiply(const Work& work, const std::vector<PackedMatrix>& matrices, const float* x,
              std::int64_t tokens, std::int64_t k, float* out, std::int64_t out_stride,
              const MakeRow& make) {
  constexpr std::size_t kMaxMatrices = 8;
  require(matrices.size() <= kMaxMatrices, "at most 8 projections of one input");
  cpu::RowBlock blocks[kMaxMatrices];
  std::int64_t column = 0;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const PackedMatrix& m = matrices[i];
    blocks[i] = {m.packed,     m.layout,     m.exponent,      m.bias,
                 m.bias_dtype, out + column, DType::kFloat32, out_stride};
    column += m.layout.n;
  }
  cpu::MakeRows rows;
  if (make) {
    rows = [&make](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) make(t);
    };
  }
  cpu::linear_multi({x, DType::kFloat32, k, tokens, k}, work.call.precision,
                    std::span(blocks, matrices.size()), work.threads, rows);
}

}  // namespace lowbit::fused
