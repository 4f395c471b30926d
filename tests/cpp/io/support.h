// Shared by the tests of files: a directory that goes away, bytes, and a small save.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "lowbit/error.h"
#include "lowbit/file.h"

namespace lowbit::test {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::random_device device;
    std::error_code code;
    do {
      path_ = (std::filesystem::temp_directory_path() /
               ("lowbit-io-" + std::to_string(device()) + std::to_string(device())))
                  .string();
    } while (!std::filesystem::create_directory(path_, code));
  }
  ~TemporaryDirectory() {
    std::error_code code;
    std::filesystem::remove_all(path_, code);
  }
  std::string operator/(const std::string& name) const {
    return (std::filesystem::path(path_) / name).string();
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

// Runs `body` and returns the error it must throw.
template <class Body>
Error caught(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no lowbit::Error was thrown";
  return Error(ErrorCode::kValue, "");
}

// A safetensors file: header text and data.
inline std::string tensor_file(const std::string& header, const std::string& data = "") {
  std::string bytes;
  for (int i = 0; i < 8; ++i)
    bytes.push_back(static_cast<char>(static_cast<std::uint64_t>(header.size()) >> (8 * i)));
  return bytes + header + data;
}

// Three packed tensors, plain ones of every alignment, a tie. `seed` changes the contents only.
inline SaveRequest small_request(const std::string& directory) {
  SaveRequest request;
  request.directory = directory;
  std::vector<SavedTensor>& tensors = request.manifest.tensors;
  auto add = [&](const char* name, FileDType dtype,
                 std::vector<std::int64_t> shape) -> SavedTensor& {
    SavedTensor& tensor = tensors.emplace_back();
    tensor.name = name;
    tensor.dtype = dtype;
    tensor.shape = std::move(shape);
    return tensor;
  };
  add("z.weight", FileDType::kBF16, {20, 70}).format = Format::kSymInt4;
  add("a.weight", FileDType::kF32, {3, 17, 33}).format = Format::kNf3;
  SavedTensor& conv = add("conv.weight", FileDType::kF16, {16, 4, 3, 3});
  conv.format = Format::kFp8E4M3;
  conv.stored_shape = {16, 36};
  add("norm.weight", FileDType::kF32, {32});
  add("flag", FileDType::kBool, {3});
  add("steps", FileDType::kI64, {});
  add("odd", FileDType::kBF16, {5});
  add("empty", FileDType::kF32, {0, 4});
  request.manifest.ties = {{"head.weight", "z.weight"}};
  request.manifest.options = R"({"low_bit": "sym_int4"})";
  request.extra_files = {{"config.json", "{}\n"}};
  return request;
}

inline std::string content(const std::string& name, std::size_t bytes, unsigned seed) {
  // The same on every system: std::mt19937 is, std::hash is not.
  std::mt19937 random(static_cast<unsigned>(digest(std::as_bytes(std::span(name))).low) + seed);
  std::string text(bytes, '\0');
  for (char& c : text) c = static_cast<char>(random());
  if (name == "flag")
    for (char& c : text) c &= 1;
  return text;
}

inline std::uint64_t stored_bytes(const SavedTensor& tensor) {
  return tensor.format ? packed_shape(tensor).bytes() : *tensor_bytes(tensor.dtype, tensor.shape);
}

// Writes what small_request asks for, in pieces of odd sizes.
inline Manifest save_small(const std::string& directory, unsigned seed = 0,
                           std::uint64_t max_shard_bytes = 4'000'000'000) {
  SaveRequest request = small_request(directory);
  request.max_shard_bytes = max_shard_bytes;
  SaveWriter writer(std::move(request));
  for (std::size_t index : writer.order()) {
    const SavedTensor& tensor = writer.tensors()[index];
    std::string bytes = content(tensor.name, stored_bytes(tensor), seed);
    for (std::size_t at = 0; at < bytes.size(); at += 777)
      writer.write(std::as_bytes(
          std::span(bytes).subspan(at, std::min<std::size_t>(777, bytes.size() - at))));
    if (tensor.name == "z.weight") writer.set_exponent(index, -3);
  }
  return writer.commit();
}

// Whether the directory holds exactly what save_small(directory, seed) wrote.
inline bool holds_small(const std::string& directory, unsigned seed) {
  SavedDirectory saved = open_saved(directory);
  for (std::size_t i = 0; i < saved.manifest.tensors.size(); ++i) {
    const SavedTensor& tensor = saved.manifest.tensors[i];
    std::span<std::byte> data = saved.data(i);
    std::string_view bytes(reinterpret_cast<const char*>(data.data()), data.size());
    if (bytes != content(tensor.name, stored_bytes(tensor), seed)) return false;
  }
  return true;
}

}  // namespace lowbit::test
