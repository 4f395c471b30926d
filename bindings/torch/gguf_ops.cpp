// GGUF files and ggml's blocks as tensors.
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "lowbit/gguf.h"

namespace lowbit::binding {
namespace {

Tensor bytes_over(std::byte* data, std::size_t count, std::function<void(void*)> keep) {
  return torch::stable::from_blob(data, {static_cast<std::int64_t>(count)}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte, std::move(keep));
}

std::tuple<std::string, Tensor, std::vector<Tensor>> gguf_open(std::string path, bool mmap) {
  const GgufModel model = GgufModel::open(path, {.mmap = mmap});
  auto outline = std::make_shared<std::string>(outline_gguf(model.header()));
  std::vector<Tensor> blocks;
  for (const std::shared_ptr<GgufFile>& file : model.files()) {
    for (const GgufTensor& tensor : file->header().tensors) {
      const std::span<std::byte> data = file->data(tensor);
      blocks.push_back(bytes_over(data.data(), data.size(), [file](void*) { (void)file; }));
    }
  }
  return {describe_gguf(model.header()),
          bytes_over(reinterpret_cast<std::byte*>(outline->data()), outline->size(),
                     [outline](void*) { (void)outline; }),
          std::move(blocks)};
}

std::string types() {
  std::ostringstream text;
  for (const GgmlTypeInfo& type : ggml_types()) {
    text << type.number << ' ' << type.name << ' ' << type.block_elems << ' ' << type.block_bytes
         << ' ' << (type.exact ? static_cast<int>(*type.exact) : -1) << ' ' << type.exact_group_size
         << ' ' << type.has_values << '\n';
  }
  return text.str();
}

std::uint32_t checked_type(const char* op, std::int64_t type) {
  LOWBIT_CHECK(type >= 0 && type < (1 << 20), ErrorCode::kValue, op,
               ": type must be the number of a ggml type, got ", type);
  return ggml_type_info(static_cast<std::uint32_t>(type)).number;
}

GgmlMatrix matrix_of(const char* op, const Tensor& blocks, std::int64_t type, std::int64_t n,
                     std::int64_t k) {
  LOWBIT_CHECK(blocks.scalar_type() == ScalarType::Byte, ErrorCode::kType, op,
               ": blocks must be uint8, got ", torch::headeronly::toString(blocks.scalar_type()));
  check_cpu(op, "blocks", blocks);
  LOWBIT_CHECK(blocks.is_contiguous(), ErrorCode::kValue, op,
               ": blocks must be contiguous; call contiguous() on them");
  return {
      {static_cast<const std::byte*>(blocks.data_ptr()), static_cast<std::size_t>(blocks.numel())},
      checked_type(op, type),
      n,
      k};
}

std::span<const std::int64_t> rows_of(const char* op, const std::optional<Tensor>& rows) {
  if (!rows) {
    return {};
  }
  LOWBIT_CHECK(rows->scalar_type() == ScalarType::Long, ErrorCode::kType, op,
               ": rows must be int64, got ", torch::headeronly::toString(rows->scalar_type()));
  check_cpu(op, "rows", *rows);
  LOWBIT_CHECK(rows->dim() == 1 && rows->numel() > 0 && rows->is_contiguous(), ErrorCode::kValue,
               op, ": rows must be contiguous, with one dimension and at least one element, got ",
               shape_text(*rows));
  return {static_cast<const std::int64_t*>(rows->data_ptr()),
          static_cast<std::size_t>(rows->numel())};
}

Tensor dequantize(const Tensor& blocks, std::int64_t type, std::int64_t n, std::int64_t k,
                  std::optional<Tensor> rows, ScalarType dtype) {
  const DType out_dtype = float_dtype("ggml_dequantize", "dtype", dtype, /*allow_double=*/true);
  const GgmlMatrix matrix = matrix_of("ggml_dequantize", blocks, type, n, k);
  const std::span<const std::int64_t> chosen = rows_of("ggml_dequantize", rows);
  LOWBIT_CHECK(n >= 0 && k >= 0, ErrorCode::kValue,
               "ggml_dequantize: n and k must not be negative, got ", n, " and ", k);
  const std::int64_t sizes[] = {chosen.empty() ? n : static_cast<std::int64_t>(chosen.size()), k};
  LOWBIT_CHECK(k == 0 || sizes[0] <= (std::int64_t{1} << 56) / k, ErrorCode::kValue,
               "ggml_dequantize: ", sizes[0], " x ", k, " elements are too many");
  Tensor out = empty_cpu(sizes, 2, dtype);
  ggml_dequantize(matrix, chosen, {out.data_ptr(), out_dtype, sizes[0], k, k, 1}, torch_threads());
  return out;
}

std::tuple<Tensor, std::int64_t, bool> pack(const Tensor& blocks, std::int64_t type, std::int64_t n,
                                            std::int64_t k, std::optional<Tensor> rows) {
  const GgmlMatrix matrix = matrix_of("ggml_pack", blocks, type, n, k);
  const std::span<const std::int64_t> chosen = rows_of("ggml_pack", rows);
  const GgmlTypeInfo& info = ggml_type_info(matrix.type);
  LOWBIT_CHECK(info.exact.has_value(), ErrorCode::kValue, "ggml_pack: ", info.name,
               " has no exact counterpart among the formats; dequantize it");
  const Layout layout =
      make_layout(*info.exact, chosen.empty() ? n : static_cast<std::int64_t>(chosen.size()), k,
                  info.exact_group_size);
  const std::int64_t sizes[] = {layout.tiles, layout.tile_bytes};
  Tensor packed = empty_cpu(sizes, 2, ScalarType::Byte);
  const std::optional<int> exponent = ggml_pack(
      matrix, chosen, layout,
      {static_cast<std::byte*>(packed.data_ptr()), static_cast<std::size_t>(layout.bytes())},
      torch_threads());
  return {packed, exponent.value_or(0), exponent.has_value()};
}

std::tuple<Tensor, bool> unpack(const Tensor& packed, std::int64_t n, std::int64_t k,
                                std::int64_t format, std::int64_t group_size, std::int64_t exponent,
                                std::optional<Tensor> rows, std::int64_t type) {
  const Layout layout = make_layout(checked_format("ggml_unpack", format), n, k,
                                    checked_int("ggml_unpack", "group_size", group_size));
  std::optional<Tensor> holder;
  const std::byte* source = aligned_packed("ggml_unpack", packed, layout, holder);
  const std::span<const std::int64_t> chosen = rows_of("ggml_unpack", rows);
  const GgmlTypeInfo& info = ggml_type_info(checked_type("ggml_unpack", type));
  LOWBIT_CHECK(k % info.block_elems == 0, ErrorCode::kValue, "ggml_unpack: rows of ", k,
               " elements cannot be made of ", info.name, " blocks of ", info.block_elems);
  const std::int64_t sizes[] = {(chosen.empty() ? n : static_cast<std::int64_t>(chosen.size())) *
                                (k / info.block_elems) * info.block_bytes};
  Tensor blocks = empty_cpu(sizes, 1, ScalarType::Byte);
  const bool lossless =
      ggml_unpack({source, static_cast<std::size_t>(layout.bytes())}, layout,
                  checked_int("ggml_unpack", "exponent", exponent), chosen, info.number,
                  {static_cast<std::byte*>(blocks.data_ptr()), static_cast<std::size_t>(sizes[0])},
                  torch_threads());
  return {blocks, lossless};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("ggml_dequantize", LOWBIT_BOX(dequantize));
  m.impl("ggml_pack", LOWBIT_BOX(pack));
  m.impl("ggml_unpack", LOWBIT_BOX(unpack));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  m.impl("gguf_open", LOWBIT_BOX(gguf_open));
  m.impl("ggml_types", LOWBIT_BOX(types));
}

}  // namespace lowbit::binding
