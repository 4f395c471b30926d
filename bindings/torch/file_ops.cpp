// Saved directories as tensors. Names, shapes and options cross as JSON text, which the core checks
// as strictly as a file; bytes cross as tensors.
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "lowbit/file.h"

namespace lowbit::binding {
namespace {

ScalarType scalar_type(FileDType dtype) {
  constexpr ScalarType types[kFileDTypeCount] = {
      ScalarType::Bool,        ScalarType::Byte,   ScalarType::Char,   ScalarType::Float8_e4m3fn,
      ScalarType::Float8_e5m2, ScalarType::UInt16, ScalarType::Short,  ScalarType::Half,
      ScalarType::BFloat16,    ScalarType::UInt32, ScalarType::Int,    ScalarType::Float,
      ScalarType::UInt64,      ScalarType::Long,   ScalarType::Double, ScalarType::ComplexFloat};
  return types[static_cast<std::size_t>(dtype)];
}

// A tensor over the file's memory, which lives as long as any tensor over it.
Tensor tensor_over(const std::shared_ptr<TensorFile>& file, const FileTensor& entry) {
  std::vector<std::int64_t> strides(entry.shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = strides.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= entry.shape[i] > 0 ? entry.shape[i] : 1;
  }
  if (entry.bytes == 0) {  // an address at the very end of a mapping belongs to nobody
    return empty_cpu(entry.shape.data(), static_cast<std::int64_t>(entry.shape.size()),
                     scalar_type(entry.dtype));
  }
  std::byte* data = file->data(entry).data();
  Tensor tensor = torch::stable::from_blob(
      data, entry.shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      scalar_type(entry.dtype), [keep = file](void*) { (void)keep; });
  // The header's end moves with the file's maker: what is not ours may start anywhere.
  const auto size = static_cast<std::uintptr_t>(file_dtype_info(entry.dtype).bytes);
  return reinterpret_cast<std::uintptr_t>(data) % size == 0 ? tensor : torch::stable::clone(tensor);
}

std::tuple<std::string, std::vector<Tensor>> file_open(std::string directory, bool mmap,
                                                       bool verify) {
  const SavedDirectory saved =
      open_saved(directory, {.mmap = mmap, .verify = verify}, torch_threads());
  std::vector<Tensor> tensors;
  tensors.reserve(saved.stored.size());
  for (std::size_t i = 0; i < saved.stored.size(); ++i) {
    tensors.push_back(tensor_over(saved.files[saved.manifest.tensors[i].file], *saved.stored[i]));
  }
  return {write_manifest(saved.manifest), std::move(tensors)};
}

// Any safetensors file: names and tensors in the order of their bytes.
std::tuple<std::vector<std::string>, std::vector<Tensor>> safetensors_open(std::string path,
                                                                           bool mmap) {
  const std::shared_ptr<TensorFile> file = TensorFile::open(path, {.mmap = mmap}, torch_threads());
  std::vector<std::string> names;
  std::vector<Tensor> tensors;
  for (const FileTensor& entry : file->header().tensors) {
    names.push_back(entry.name);
    tensors.push_back(tensor_over(file, entry));
  }
  return {std::move(names), std::move(tensors)};
}

// Saves in progress. A handle rather than an object: the stable ABI has no custom classes. It is
// drawn before the save begins, so that whoever is interrupted meanwhile can still abort it.
struct Saves {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<SaveWriter>> writers;
  std::int64_t next = 1;

  std::shared_ptr<SaveWriter> find(std::int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto it = writers.find(handle);
    check(it != writers.end(), ErrorCode::kValue, "save: no save has the handle ", handle);
    return it->second;
  }
  std::shared_ptr<SaveWriter> take(std::int64_t handle) {
    std::shared_ptr<SaveWriter> writer = take_if_any(handle);
    check(writer != nullptr, ErrorCode::kValue, "save: no save has the handle ", handle);
    return writer;
  }
  std::shared_ptr<SaveWriter> take_if_any(std::int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto node = writers.extract(handle);
    return node.empty() ? nullptr : node.mapped();
  }
};

Saves& saves() {
  static Saves all;
  return all;
}

std::span<const std::byte> bytes_of(const Tensor& tensor) {
  check_cpu("save", "data", tensor);
  check(tensor.is_contiguous(), ErrorCode::kValue, "save: data must be contiguous");
  return {
      static_cast<const std::byte*>(tensor.data_ptr()),
      static_cast<std::size_t>(tensor.numel()) * static_cast<std::size_t>(tensor.element_size())};
}

std::int64_t file_save_handle() {
  const std::lock_guard<std::mutex> lock(saves().mutex);
  return saves().next++;
}

std::vector<std::string> file_save_begin(std::int64_t handle, std::string directory,
                                         std::string request, std::int64_t max_shard_bytes,
                                         std::vector<std::string> extra_names,
                                         std::vector<Tensor> extra_contents) {
  check(max_shard_bytes > 0, ErrorCode::kValue, "save: max_shard_size must be positive, got ",
        max_shard_bytes);
  check(extra_names.size() == extra_contents.size(), ErrorCode::kValue,
        "save: ", extra_names.size(), " extra names for ", extra_contents.size(), " contents");
  SaveRequest save{.directory = std::move(directory),
                   .max_shard_bytes = static_cast<std::uint64_t>(max_shard_bytes),
                   .manifest = parse_save_request(request, "save request"),
                   .extra_files = {},
                   .resume_key = {}};
  for (std::size_t i = 0; i < extra_names.size(); ++i) {
    const std::span<const std::byte> bytes = bytes_of(extra_contents[i]);
    save.extra_files.emplace_back(
        extra_names[i], std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  auto writer = std::make_shared<SaveWriter>(std::move(save));
  std::vector<std::string> order;
  for (std::size_t index : writer->order()) order.push_back(writer->tensors()[index].name);
  const std::lock_guard<std::mutex> lock(saves().mutex);
  const bool is_new = saves().writers.emplace(handle, std::move(writer)).second;
  check(is_new, ErrorCode::kValue, "save: a save with the handle ", handle, " has begun");
  return order;
}

void file_save_write(std::int64_t handle, const Tensor& data) {
  saves().find(handle)->write(bytes_of(data));
}

std::string file_save_commit(std::int64_t handle) {
  return write_manifest(saves().take(handle)->commit());
}

// A save that has not begun, or is finished, is none.
void file_save_abort(std::int64_t handle) {
  saves().take_if_any(handle);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  m.impl("file_open", LOWBIT_BOX(file_open));
  m.impl("safetensors_open", LOWBIT_BOX(safetensors_open));
  m.impl("file_save_handle", LOWBIT_BOX(file_save_handle));
  m.impl("file_save_begin", LOWBIT_BOX(file_save_begin));
  m.impl("file_save_write", LOWBIT_BOX(file_save_write));
  m.impl("file_save_commit", LOWBIT_BOX(file_save_commit));
  m.impl("file_save_abort", LOWBIT_BOX(file_save_abort));
}

}  // namespace lowbit::binding
