// The operators on CPU tensors: checks, then the core. Python sees the schemas of schemas.cpp.
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "lowbit/dispatch.h"

namespace lowbit::binding {
namespace {

// ---- linear -----------------------------------------------------------------------------------

// The rows of `x` as a matrix with one stride between rows, or nothing if its leading dimensions
// do not collapse (a transposed activation, say).
struct RowView {
  std::int64_t rows;
  std::int64_t stride;
};

std::optional<RowView> rows_of(const Tensor& x) {
  const std::int64_t dim = x.dim();
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const std::int64_t k = sizes[dim - 1];
  if (k > 1 && strides[dim - 1] != 1) {
    return std::nullopt;
  }
  std::int64_t rows = 1;
  std::int64_t stride = k;  // of a single row: unused
  for (std::int64_t d = 0; d < dim - 1; ++d) {
    if (sizes[d] == 0) {
      return RowView{0, stride};
    }
  }
  for (std::int64_t d = dim - 2; d >= 0; --d) {
    if (sizes[d] == 1) {
      continue;
    }
    if (rows == 1) {
      stride = strides[d];
    } else if (strides[d] != rows * stride) {
      return std::nullopt;
    }
    rows *= sizes[d];
  }
  return RowView{rows, stride};
}

Tensor linear(const Tensor& x_given, const Tensor& packed, const std::optional<Tensor>& bias,
              std::int64_t n, std::int64_t k, std::int64_t format, std::int64_t group_size,
              std::int64_t exponent, std::int64_t precision) {
  const DType x_dtype = float_dtype("linear", "x", x_given.scalar_type(), /*allow_double=*/false);
  check_cpu("linear", "x", x_given);
  const Layout layout = make_layout(checked_format("linear", format), n, k,
                                    checked_int("linear", "group_size", group_size));
  std::optional<Tensor> holder;
  const std::byte* weight = aligned_packed("linear", packed, layout, holder);

  const std::int64_t dim = x_given.dim();
  LOWBIT_CHECK(dim >= 1 && x_given.size(dim - 1) == k, ErrorCode::kValue,
               "linear: the last dimension of x must be ", k, " to go with a weight of ", n, " x ",
               k, ", got x ", shape_text(x_given));
  Tensor x = x_given;
  std::optional<RowView> view = rows_of(x);
  if (!view) {
    x = torch::stable::contiguous(x);
    view = rows_of(x);
  }

  LinearArgs args{};
  if (bias) {
    args.bias_dtype = float_dtype("linear", "bias", bias->scalar_type(), /*allow_double=*/false);
    check_cpu("linear", "bias", *bias);
    LOWBIT_CHECK(bias->dim() == 1 && bias->size(0) == n, ErrorCode::kValue,
                 "linear: bias must be [", n, "], got ", shape_text(*bias));
    LOWBIT_CHECK(n <= 1 || bias->stride(0) == 1, ErrorCode::kValue,
                 "linear: bias must be contiguous; call contiguous() on it");
    args.bias = bias->data_ptr();
  }

  std::array<std::int64_t, 64> sizes;
  const auto x_sizes = x.sizes();
  std::copy(x_sizes.begin(), x_sizes.end(), sizes.begin());
  sizes[dim - 1] = n;
  Tensor out = empty_cpu(sizes.data(), dim, scalar_type(x_dtype));

  args.x = x.data_ptr();
  args.x_dtype = x_dtype;
  args.x_stride = view->stride;
  args.packed = weight;
  args.layout = layout;
  args.exponent = checked_int("linear", "exponent", exponent);
  args.out = out.data_ptr();
  args.out_dtype = x_dtype;
  args.out_stride = n;
  args.m = view->rows;
  args.precision = checked_precision("linear", precision);
  if (args.m > 0 && n > 0) {
    lowbit::linear(args, torch_threads());
  }
  return out;
}

// ---- quantize, dequantize, embedding ------------------------------------------------------------

// A tensor [..., n, k] as a stack of matrices.
struct Stack {
  std::int64_t matrices, n, k;
};

Stack stack_of(const char* op, const char* argument, const std::int64_t* sizes, std::int64_t dim) {
  LOWBIT_CHECK(dim >= 2, ErrorCode::kValue, op, ": ", argument,
               " must have at least two dimensions, got ", dim);
  Stack stack{1, sizes[dim - 2], sizes[dim - 1]};
  for (std::int64_t d = 0; d < dim - 2; ++d) {
    LOWBIT_CHECK(!__builtin_mul_overflow(stack.matrices, sizes[d], &stack.matrices),
                 ErrorCode::kValue, op, ": ", argument, " has too many elements");
  }
  return stack;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight_given, std::int64_t format,
                                    std::int64_t group_size) {
  const DType dtype =
      float_dtype("quantize", "weight", weight_given.scalar_type(), /*allow_double=*/true);
  check_cpu("quantize", "weight", weight_given);
  const Stack stack =
      stack_of("quantize", "weight", weight_given.sizes().data(), weight_given.dim());
  const int group = checked_int("quantize", "group_size", group_size);
  const Layout one = make_layout(checked_format("quantize", format), stack.n, stack.k, group);

  // A stack is packed as one matrix of all rows, which has the same bytes and gives the tensor its
  // one exponent. That needs n to be a multiple of the tile's rows; rows of zeros make it one, and
  // pack to what padded rows are.
  Tensor weight = weight_given;
  const std::int64_t rows_padded = one.tiles * kTileRows;
  std::int64_t row_stride, col_stride;
  if (weight.dim() == 2) {
    row_stride = weight.stride(0);
    col_stride = weight.stride(1);
  } else {
    if (stack.n != rows_padded) {
      weight = torch::stable::pad(weight, {0, 0, 0, rows_padded - stack.n});
    }
    weight = torch::stable::contiguous(weight);
    row_stride = stack.k;
    col_stride = 1;
  }
  const std::int64_t rows = weight.dim() == 2 ? stack.n : stack.matrices * rows_padded;
  const Layout layout = make_layout(one.format, rows, stack.k, group);

  const std::int64_t packed_sizes[] = {stack.matrices * one.tiles, one.tile_bytes};
  Tensor packed = empty_cpu(packed_sizes, 2, ScalarType::Byte);
  int exponent = 0;
  if (layout.bytes() > 0) {
    const MatrixView view{weight.data_ptr(), dtype, rows, stack.k, row_stride, col_stride};
    const std::span<std::byte> bytes(static_cast<std::byte*>(packed.data_ptr()),
                                     static_cast<std::size_t>(layout.bytes()));
    exponent = lowbit::quantize(view, layout, bytes, torch_threads());
  }
  Tensor exponent_tensor = empty_cpu(nullptr, 0, ScalarType::Long);
  *static_cast<std::int64_t*>(exponent_tensor.data_ptr()) = exponent;
  return {packed, exponent_tensor};
}

Tensor dequantize(const Tensor& packed, const std::vector<std::int64_t>& shape, std::int64_t format,
                  std::int64_t group_size, std::int64_t exponent, ScalarType dtype) {
  const DType out_dtype = float_dtype("dequantize", "dtype", dtype, /*allow_double=*/true);
  const Stack stack =
      stack_of("dequantize", "shape", shape.data(), static_cast<std::int64_t>(shape.size()));
  const Layout layout = make_layout(checked_format("dequantize", format), stack.n, stack.k,
                                    checked_int("dequantize", "group_size", group_size));
  std::optional<Tensor> holder;
  const std::byte* source = aligned_packed("dequantize", packed, layout, holder, stack.matrices);
  const int e = checked_int("dequantize", "exponent", exponent);
  Tensor out = empty_cpu(shape.data(), static_cast<std::int64_t>(shape.size()), dtype);
  auto* target = static_cast<std::byte*>(out.data_ptr());
  const auto matrix_bytes = static_cast<std::size_t>(stack.n * stack.k) * dtype_bytes(out_dtype);
  if (matrix_bytes > 0) {
    for (std::int64_t i = 0; i < stack.matrices; ++i) {
      lowbit::dequantize(
          {source + i * layout.bytes(), static_cast<std::size_t>(layout.bytes())}, layout, e,
          {target + i * matrix_bytes, out_dtype, stack.n, stack.k, stack.k, 1}, torch_threads());
    }
  }
  return out;
}

Tensor embedding(const Tensor& packed, const Tensor& ids_given, std::int64_t n, std::int64_t k,
                 std::int64_t format, std::int64_t group_size, std::int64_t exponent,
                 ScalarType dtype) {
  const DType out_dtype = float_dtype("embedding", "dtype", dtype, /*allow_double=*/true);
  const ScalarType ids_type = ids_given.scalar_type();
  LOWBIT_CHECK(ids_type == ScalarType::Long || ids_type == ScalarType::Int, ErrorCode::kType,
               "embedding: ids must be int64 or int32, got ",
               torch::headeronly::toString(ids_type));
  check_cpu("embedding", "ids", ids_given);
  const Layout layout = make_layout(checked_format("embedding", format), n, k,
                                    checked_int("embedding", "group_size", group_size));
  std::optional<Tensor> holder;
  const std::byte* source = aligned_packed("embedding", packed, layout, holder);
  const Tensor ids = torch::stable::contiguous(ids_given);

  const std::int64_t dim = ids.dim();
  LOWBIT_CHECK(dim < 64, ErrorCode::kValue, "embedding: ids have too many dimensions: ", dim);
  std::array<std::int64_t, 64> sizes;
  const auto ids_sizes = ids.sizes();
  std::copy(ids_sizes.begin(), ids_sizes.end(), sizes.begin());
  sizes[dim] = k;
  Tensor out = empty_cpu(sizes.data(), dim + 1, dtype);

  const std::int64_t count = ids.numel();
  std::vector<std::int64_t> widened;
  std::span<const std::int64_t> rows;
  if (ids_type == ScalarType::Int) {
    const auto* narrow = static_cast<const std::int32_t*>(ids.data_ptr());
    widened.assign(narrow, narrow + count);
    rows = widened;
  } else {
    rows = {static_cast<const std::int64_t*>(ids.data_ptr()), static_cast<std::size_t>(count)};
  }
  if (count > 0 && k > 0) {
    lowbit::dequantize_rows({source, static_cast<std::size_t>(layout.bytes())}, layout,
                            checked_int("embedding", "exponent", exponent), rows,
                            {out.data_ptr(), out_dtype, count, k, k, 1}, torch_threads());
  }
  return out;
}

std::int64_t first_nonfinite(const Tensor& x_given) {
  const DType dtype = float_dtype("first_nonfinite", "x", x_given.scalar_type(), true);
  check_cpu("first_nonfinite", "x", x_given);
  if (x_given.numel() == 0) {
    return -1;
  }
  if (x_given.dim() == 2) {  // any strides: no copy of a transposed weight
    return lowbit::first_nonfinite({x_given.data_ptr(), dtype, x_given.size(0), x_given.size(1),
                                    x_given.stride(0), x_given.stride(1)},
                                   torch_threads());
  }
  const Tensor x = torch::stable::contiguous(x_given);
  const std::int64_t cols = x.dim() == 0 ? 1 : x.size(x.dim() - 1);
  return lowbit::first_nonfinite({x.data_ptr(), dtype, x.numel() / cols, cols, cols, 1},
                                 torch_threads());
}

// ---- what the library is and has
// ------------------------------------------------------------------

std::string format_table() {
  std::ostringstream text;
  text.precision(9);  // every float comes back exactly
  for (const FormatInfo& info : formats()) {
    text << info.name << ' ' << info.bits << ' ' << static_cast<int>(info.code_kind) << ' '
         << static_cast<int>(info.scale_kind) << ' ' << info.zero_point << ' ' << info.padding_code;
    for (const float value : info.codebook) {
      text << ' ' << value;
    }
    text << '\n';
  }
  return text.str();
}

std::string isa() {
  return std::string(active_isa());
}

std::string available() {
  std::ostringstream text;
  for (const std::string_view name : available_isas()) {
    text << name << ' ';
  }
  return text.str();
}

void force(const std::string& name) {
  force_isa(name);
}

}  // namespace
}  // namespace lowbit::binding

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  using namespace lowbit::binding;
  m.impl("linear", LOWBIT_BOX(linear));
  m.impl("linear_forward", LOWBIT_BOX(linear));
  m.impl("quantize", LOWBIT_BOX(quantize));
  m.impl("dequantize", LOWBIT_BOX(dequantize));
  m.impl("embedding", LOWBIT_BOX(embedding));
  m.impl("first_nonfinite", LOWBIT_BOX(first_nonfinite));
}

// Operators without tensor arguments have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  using namespace lowbit::binding;
  m.impl("format_table", LOWBIT_BOX(format_table));
  m.impl("isa", LOWBIT_BOX(isa));
  m.impl("describe_isa", LOWBIT_BOX(lowbit::describe_isa));
  m.impl("available_isas", LOWBIT_BOX(available));
  m.impl("force_isa", LOWBIT_BOX(force));
}
