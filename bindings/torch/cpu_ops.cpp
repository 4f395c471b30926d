// The operators on CPU tensors: checks, then the core. Python sees the schemas of schemas.cpp.
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "check.h"
#include "lowbit/dispatch.h"
#include "lowbit/pack.h"

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

  Tensor packed = empty_packed(stack.matrices * one.tiles, one.tile_bytes);
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

// Parts of packed matrices as tensors: which dtype and trailing sizes, and how many per matrix.
struct Parts {
  Layout layout;
  bool grouped, minima;
  std::int64_t codes, groups;

  explicit Parts(const Layout& made)
      : layout(made),
        grouped(format_info(made.format).grouped()),
        minima(format_info(made.format).scale_kind == ScaleKind::kGroupMinimum),
        codes(made.n * made.k),
        groups(made.n * made.groups) {}
  ScalarType scale_type() const { return grouped ? ScalarType::Half : ScalarType::Float; }
};

void check_part(const char* name, const Tensor& part, ScalarType type,
                const std::vector<std::int64_t>& shape) {
  LOWBIT_CHECK(part.scalar_type() == type, ErrorCode::kType, "pack_codes: ", name, " must be ",
               torch::headeronly::toString(type), ", got ",
               torch::headeronly::toString(part.scalar_type()));
  check_cpu("pack_codes", name, part);
  const auto sizes = part.sizes();
  LOWBIT_CHECK(
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), ErrorCode::kValue,
      "pack_codes: ", name, " must be of shape [",
      [&] {
        std::string text;
        for (const std::int64_t size : shape) {
          text += (text.empty() ? "" : ", ") + std::to_string(size);
        }
        return text;
      }(),
      "], got ", shape_text(part));
}

Tensor pack_codes(const Tensor& codes_given, const Tensor& scales_given,
                  std::optional<Tensor> minima_given, std::int64_t format,
                  std::int64_t group_size) {
  const Stack stack =
      stack_of("pack_codes", "codes", codes_given.sizes().data(), codes_given.dim());
  const Parts parts(make_layout(checked_format("pack_codes", format), stack.n, stack.k,
                                checked_int("pack_codes", "group_size", group_size)));
  const Layout& layout = parts.layout;
  const auto sizes = codes_given.sizes();
  std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
  check_part("codes", codes_given, ScalarType::Byte, shape);
  shape.pop_back();
  if (parts.grouped) {
    shape.push_back(layout.groups);
  }
  check_part("scales", scales_given, parts.scale_type(), shape);
  LOWBIT_CHECK(minima_given.has_value() == parts.minima, ErrorCode::kValue,
               "pack_codes: ", format_info(layout.format).name,
               parts.minima ? " needs minima" : " has no minima", "; ",
               parts.minima ? "pass them" : "pass none");
  const Tensor codes = torch::stable::contiguous(codes_given);
  const Tensor scales = torch::stable::contiguous(scales_given);
  std::optional<Tensor> minima;
  if (minima_given) {
    check_part("minima", *minima_given, ScalarType::Half, shape);
    minima = torch::stable::contiguous(*minima_given);
  }

  Tensor packed = empty_packed(stack.matrices * layout.tiles, layout.tile_bytes);
  const auto part_of = [](const Tensor& tensor, auto* type, std::int64_t matrix,
                          std::int64_t count) {
    using T = std::remove_pointer_t<decltype(type)>;
    return std::span<const T>(static_cast<const T*>(tensor.data_ptr()) + matrix * count,
                              static_cast<std::size_t>(count));
  };
  for (std::int64_t i = 0; i < (layout.bytes() > 0 ? stack.matrices : 0); ++i) {
    CodesView view;
    view.codes = part_of(codes, static_cast<std::uint8_t*>(nullptr), i, parts.codes);
    if (parts.grouped) {
      view.scales = part_of(scales, static_cast<std::uint16_t*>(nullptr), i, parts.groups);
    } else {
      view.row_scales = part_of(scales, static_cast<float*>(nullptr), i, layout.n);
    }
    if (minima) {
      view.minima = part_of(*minima, static_cast<std::uint16_t*>(nullptr), i, parts.groups);
    }
    lowbit::pack_codes(view, layout,
                       {static_cast<std::byte*>(packed.data_ptr()) + i * layout.bytes(),
                        static_cast<std::size_t>(layout.bytes())},
                       torch_threads());
  }
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_codes(const Tensor& packed,
                                                std::vector<std::int64_t> shape,
                                                std::int64_t format, std::int64_t group_size) {
  const Stack stack =
      stack_of("unpack_codes", "shape", shape.data(), static_cast<std::int64_t>(shape.size()));
  const Parts parts(make_layout(checked_format("unpack_codes", format), stack.n, stack.k,
                                checked_int("unpack_codes", "group_size", group_size)));
  const Layout& layout = parts.layout;
  std::optional<Tensor> holder;
  const std::byte* source = aligned_packed("unpack_codes", packed, layout, holder, stack.matrices);
  const auto dim = static_cast<std::int64_t>(shape.size());
  Tensor codes = empty_cpu(shape.data(), dim, ScalarType::Byte);
  shape.back() = layout.groups;
  Tensor scales = empty_cpu(shape.data(), parts.grouped ? dim : dim - 1, parts.scale_type());
  shape.back() = parts.minima ? layout.groups : 0;
  Tensor minima = empty_cpu(shape.data(), dim, ScalarType::Half);
  for (std::int64_t i = 0; i < (layout.bytes() > 0 ? stack.matrices : 0); ++i) {
    const auto groups = static_cast<std::size_t>(parts.groups);
    MutableCodesView view;
    view.codes = {static_cast<std::uint8_t*>(codes.data_ptr()) + i * parts.codes,
                  static_cast<std::size_t>(parts.codes)};
    if (parts.grouped) {
      view.scales = {static_cast<std::uint16_t*>(scales.data_ptr()) + i * parts.groups, groups};
    } else {
      view.row_scales = {static_cast<float*>(scales.data_ptr()) + i * layout.n,
                         static_cast<std::size_t>(layout.n)};
    }
    if (parts.minima) {
      view.minima = {static_cast<std::uint16_t*>(minima.data_ptr()) + i * parts.groups, groups};
    }
    lowbit::unpack_codes({source + i * layout.bytes(), static_cast<std::size_t>(layout.bytes())},
                         layout, view, torch_threads());
  }
  return {codes, scales, minima};
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
  LOWBIT_CHECK(dim < 64, ErrorCode::kValue, "embedding: ids may have 63 dimensions, got ", dim);
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

Tensor copy_packed(const Tensor& packed) {
  const char* op = "copy_packed";
  check_cpu(op, "packed", packed);
  LOWBIT_CHECK(packed.scalar_type() == ScalarType::Byte, ErrorCode::kType, op,
               ": packed must be uint8, got ", torch::headeronly::toString(packed.scalar_type()));
  LOWBIT_CHECK(packed.dim() == 2 && packed.is_contiguous(), ErrorCode::kValue, op,
               ": packed must be contiguous [tiles, tile_bytes], got ", shape_text(packed));
  Tensor copied = empty_packed(packed.size(0), packed.size(1));
  const auto bytes = static_cast<std::size_t>(packed.size(0) * packed.size(1));
  if (bytes > 0) std::memcpy(copied.data_ptr(), packed.data_ptr(), bytes);
  return copied;
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
  m.impl("copy_packed", LOWBIT_BOX(copy_packed));
  m.impl("dequantize", LOWBIT_BOX(dequantize));
  m.impl("pack_codes", LOWBIT_BOX(pack_codes));
  m.impl("unpack_codes", LOWBIT_BOX(unpack_codes));
  m.impl("embedding", LOWBIT_BOX(embedding));
  m.impl("first_nonfinite", LOWBIT_BOX(first_nonfinite));
}

// Operators without tensor arguments have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  using namespace lowbit::binding;
  m.impl("format_table", LOWBIT_BOX(format_table));
  m.impl("return_freed_memory", LOWBIT_BOX(lowbit::return_freed_memory));
  m.impl("isa", LOWBIT_BOX(isa));
  m.impl("describe_isa", LOWBIT_BOX(lowbit::describe_isa));
  m.impl("available_isas", LOWBIT_BOX(available));
  m.impl("force_isa", LOWBIT_BOX(force));
}
