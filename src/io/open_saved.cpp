// Opening a saved directory: manifest, files, agreement of the two, digests; all before a caller
// sees a byte.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <unordered_map>

#include "io/json.h"
#include "io/os.h"
#include "lowbit/error.h"
#include "lowbit/file.h"

namespace lowbit {
namespace {

// A manifest of a million tensors takes about 200 bytes for each.
constexpr std::uint64_t kMaxManifestBytes = 256'000'000;
// Each try means that a saver replaced the whole directory while its manifest was being read.
constexpr int kMaxTries = 8;
// A missing file under an unchanged manifest is missing for good, unless two savers have been here
// meanwhile: away from this content and back to it.
constexpr int kMaxUnchanged = 3;

[[noreturn]] void corrupt(const std::string& who, const std::string& what) {
  throw Error(ErrorCode::kCorrupt, who + ": " + what);
}

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string read_manifest_text(const std::string& directory) {
  std::string path = os::join(directory, kManifestName);
  if (os::exists(path)) return os::read_text(path, kMaxManifestBytes);
  if (!os::exists(directory))
    throw Error(ErrorCode::kNotFound, directory +
                                          ": does not exist; give the directory that "
                                          "save_low_bit wrote");
  std::string hint = "give the directory that save_low_bit wrote";
  if (os::exists(os::join(directory, "bigdl_config.json"))) {
    hint = "this is a save of the archived ipex-llm: convert the original model again";
  } else if (os::exists(os::join(directory, "config.json"))) {
    hint = "this may be a float model: load it and call optimize_model";
  }
  throw Error(ErrorCode::kNotFound,
              directory + ": holds no " + std::string(kManifestName) + "; " + hint);
}

// What a tensor's entry in its file must say, given the manifest.
std::vector<std::int64_t> stored_shape(const SavedTensor& tensor) {
  if (!tensor.format) return tensor.shape;
  PackedShape packed = packed_shape(tensor);
  return {packed.rows(), packed.layout.tile_bytes};
}

void match(SavedDirectory& saved, const std::string& directory) {
  const Manifest& manifest = saved.manifest;
  std::vector<std::unordered_map<std::string_view, const FileTensor*>> entries(saved.files.size());
  std::size_t count = 0;
  for (std::size_t i = 0; i < saved.files.size(); ++i) {
    const TensorFile& file = *saved.files[i];
    if (file.bytes() != manifest.files[i].bytes)
      corrupt(file.path(), "has " + std::to_string(file.bytes()) + " bytes, the manifest says " +
                               std::to_string(manifest.files[i].bytes) +
                               "; is the file complete? Copy the directory anew");
    if (digest(file.header_data()) != manifest.files[i].header)
      corrupt(file.path(),
              "the digest of its header does not match: the file was damaged; copy "
              "the directory anew");
    for (const FileTensor& entry : file.header().tensors) entries[i].emplace(entry.name, &entry);
    count += file.header().tensors.size();
  }
  for (const SavedTensor& tensor : manifest.tensors) {
    const TensorFile& file = *saved.files[tensor.file];
    auto it = entries[tensor.file].find(tensor.name);
    if (it == entries[tensor.file].end())
      corrupt(file.path(), "has no tensor " + json::quote(tensor.name) + ", the manifest says so");
    const FileTensor& entry = *it->second;
    FileDType dtype = tensor.format ? FileDType::kU8 : tensor.dtype;
    std::vector<std::int64_t> shape = stored_shape(tensor);
    if (entry.dtype != dtype || entry.shape != shape)
      corrupt(file.path(), "tensor " + json::quote(tensor.name) + " is " +
                               std::string(file_dtype_info(entry.dtype).name) + " " +
                               shape_text(entry.shape) + ", the manifest asks for " +
                               std::string(file_dtype_info(dtype).name) + " " + shape_text(shape));
    if (tensor.format && entry.offset % kUnitBytes != 0)
      corrupt(file.path(), "tensor " + json::quote(tensor.name) + " starts at byte " +
                               std::to_string(entry.offset) + ", expected a multiple of " +
                               std::to_string(kUnitBytes));
    if (entry.dtype == FileDType::kBool)
      for (std::byte byte : file.data(entry))
        if (byte > std::byte{1})
          corrupt(file.path(), "tensor " + json::quote(tensor.name) + ": a boolean of value " +
                                   std::to_string(std::to_integer<int>(byte)));
    saved.stored.push_back(&entry);
  }
  if (count != manifest.tensors.size())
    corrupt(directory, "its weight files hold " + std::to_string(count) +
                           " tensors, the manifest lists " +
                           std::to_string(manifest.tensors.size()));
}

void verify(const SavedDirectory& saved, const Threads& threads) {
  const std::vector<SavedTensor>& tensors = saved.manifest.tensors;
  // Largest first, each thread taking the next: the last one to finish is then never far behind.
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return saved.stored[a]->bytes > saved.stored[b]->bytes;
  });
  std::atomic<std::size_t> next{0};
  std::atomic<std::size_t> bad{tensors.size()};  // the first in manifest order that differs
  threads.run(threads.count(), [&](std::int64_t) {
    for (std::size_t i; (i = next.fetch_add(1)) < order.size();) {
      std::size_t tensor = order[i];
      if (digest(saved.data(tensor)) == tensors[tensor].digest) continue;
      std::size_t seen = bad.load();
      while (tensor < seen && !bad.compare_exchange_weak(seen, tensor)) {
      }
    }
  });
  if (bad == tensors.size()) return;
  const SavedTensor& tensor = tensors[bad];
  corrupt(saved.files[tensor.file]->path(), "tensor " + json::quote(tensor.name) +
                                                ": its digest does not match: the file was "
                                                "damaged; copy the directory anew");
}

}  // namespace

SavedDirectory open_saved(const std::string& directory, const OpenOptions& options,
                          const Threads& threads) {
  std::string text = read_manifest_text(directory);
  SavedDirectory saved;
  int unchanged = 0;
  for (int tries = 0;; ++tries) {
    saved = SavedDirectory();
    saved.manifest = parse_manifest(text, os::join(directory, kManifestName));
    try {
      for (const SavedFile& file : saved.manifest.files)
        saved.files.push_back(
            TensorFile::open(os::join(directory, file.name), {.mmap = options.mmap}, threads));
      break;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound) throw;
      // Another program may have saved here since the manifest was read, removing what it named.
      std::string again = read_manifest_text(directory);
      unchanged = again == text ? unchanged + 1 : 0;
      if (unchanged == kMaxUnchanged || tries == kMaxTries)
        throw Error(ErrorCode::kNotFound, std::string(error.what()) +
                                              "; the manifest names this file: copy the " +
                                              "directory anew, all of it");
      text = std::move(again);
    }
  }
  match(saved, directory);
  if (options.verify) verify(saved, threads);
  return saved;
}

}  // namespace lowbit
