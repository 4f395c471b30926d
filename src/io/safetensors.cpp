// Reading and laying out one safetensors file:
//
//   8 bytes little-endian: header length H | H bytes of JSON | data
//
// The JSON maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end)} within the
// data. The format itself forbids gaps and overlaps, which is why every byte of a file belongs to
// exactly one tensor: no polyglot files, and no file that asks for more memory than it has.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "io/json.h"
#include "io/os.h"
#include "lowbit/error.h"
#include "lowbit/file.h"

namespace lowbit {
namespace {

constexpr std::array<FileDTypeInfo, kFileDTypeCount> kDTypes = {{
    {FileDType::kBool, "BOOL", "bool", 1},
    {FileDType::kU8, "U8", "uint8", 1},
    {FileDType::kI8, "I8", "int8", 1},
    {FileDType::kF8E4M3, "F8_E4M3", "float8_e4m3fn", 1},
    {FileDType::kF8E5M2, "F8_E5M2", "float8_e5m2", 1},
    {FileDType::kU16, "U16", "uint16", 2},
    {FileDType::kI16, "I16", "int16", 2},
    {FileDType::kF16, "F16", "float16", 2},
    {FileDType::kBF16, "BF16", "bfloat16", 2},
    {FileDType::kU32, "U32", "uint32", 4},
    {FileDType::kI32, "I32", "int32", 4},
    {FileDType::kF32, "F32", "float32", 4},
    {FileDType::kU64, "U64", "uint64", 8},
    {FileDType::kI64, "I64", "int64", 8},
    {FileDType::kF64, "F64", "float64", 8},
    {FileDType::kC64, "C64", "complex64", 8},
}};

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kDataAlignment = 4096;  // pages: mapped tensors keep their alignment

[[noreturn]] void corrupt(std::string_view who, const std::string& what) {
  throw Error(ErrorCode::kCorrupt, std::string(who) + ": " + what);
}

std::uint64_t read_length(std::span<const std::byte> start) {
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | std::to_integer<std::uint64_t>(start[i]);
  return length;
}

const json::Value& field(const json::Object& entry, std::string_view key, const std::string& who) {
  for (const auto& item : entry)
    if (item.first == key) return item.second;
  corrupt(who, "has no '" + std::string(key) + "'");
}

FileTensor parse_entry(const std::string& name, const json::Value& value, std::string_view file,
                       std::uint64_t data_start, std::uint64_t data_bytes) {
  const std::string who = std::string(file) + ": tensor " + json::quote(name);
  if (name.empty()) corrupt(who, "a tensor needs a name");
  if (name.find('\0') != std::string::npos) corrupt(who, "the name holds a NUL character");
  const json::Object* entry = value.object();
  if (!entry) corrupt(who, std::string("expected an object, got ") + value.kind());
  for (const auto& item : *entry)
    if (item.first != "dtype" && item.first != "shape" && item.first != "data_offsets")
      corrupt(who, "unknown key " + json::quote(item.first));

  FileTensor tensor;
  tensor.name = name;
  const std::string* dtype = field(*entry, "dtype", who).string();
  if (!dtype) corrupt(who, "'dtype' is not a string");
  auto info = std::find_if(kDTypes.begin(), kDTypes.end(),
                           [&](const FileDTypeInfo& row) { return row.name == *dtype; });
  if (info == kDTypes.end()) corrupt(who, "unknown dtype " + json::quote(*dtype));
  tensor.dtype = info->dtype;

  const json::Array* shape = field(*entry, "shape", who).array();
  if (!shape) corrupt(who, "'shape' is not an array");
  if (shape->size() > kMaxRank)
    corrupt(who, "has " + std::to_string(shape->size()) + " dimensions, at most " +
                     std::to_string(kMaxRank) + " are read");
  for (const json::Value& size : *shape) {
    if (!size.integer() || *size.integer() < 0)
      corrupt(who, "'shape' must hold integers of at least 0");
    tensor.shape.push_back(*size.integer());
  }
  std::optional<std::uint64_t> bytes = tensor_bytes(tensor.dtype, tensor.shape);
  if (!bytes) corrupt(who, "the byte count of its shape leaves 63 bits");

  const json::Array* offsets = field(*entry, "data_offsets", who).array();
  if (!offsets || offsets->size() != 2 || !(*offsets)[0].integer() || !(*offsets)[1].integer())
    corrupt(who, "'data_offsets' must be two integers");
  std::int64_t begin = *(*offsets)[0].integer(), end = *(*offsets)[1].integer();
  std::string range = "offsets [" + std::to_string(begin) + ", " + std::to_string(end) + ")";
  if (begin < 0 || end < begin) corrupt(who, range + " are no range");
  if (static_cast<std::uint64_t>(end) > data_bytes)
    corrupt(who, range + " but the file holds " + std::to_string(data_bytes) +
                     " bytes of data; is the file complete?");
  if (static_cast<std::uint64_t>(end - begin) != *bytes) {
    std::string text = range + " but " + *dtype + " [";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i)
      text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
    corrupt(who, text + "] needs " + std::to_string(*bytes) + " bytes");
  }
  tensor.offset = data_start + static_cast<std::uint64_t>(begin);
  tensor.bytes = *bytes;
  return tensor;
}

}  // namespace

std::span<const FileDTypeInfo> file_dtypes() {
  return kDTypes;
}

const FileDTypeInfo& file_dtype_info(FileDType dtype) {
  return kDTypes[static_cast<std::size_t>(dtype)];
}

std::optional<std::uint64_t> tensor_bytes(FileDType dtype, std::span<const std::int64_t> shape) {
  constexpr std::uint64_t limit = std::uint64_t{1} << 63;
  std::uint64_t bytes = static_cast<std::uint64_t>(file_dtype_info(dtype).bytes);
  bool empty = false;
  for (std::int64_t size : shape) {
    if (size < 0) return std::nullopt;
    if (size == 0) empty = true;
  }
  // An empty tensor takes no bytes, but its other sizes must still multiply to something that the
  // reader of strides can hold.
  for (std::int64_t size : shape) {
    std::uint64_t factor = static_cast<std::uint64_t>(std::max<std::int64_t>(size, 1));
    if (bytes > (limit - 1) / factor) return std::nullopt;
    bytes *= factor;
  }
  return empty ? 0 : bytes;
}

FileHeader parse_file_header(std::span<const std::byte> start, std::uint64_t file_bytes,
                             std::string_view who) {
  if (file_bytes < kLengthBytes || start.size() < kLengthBytes)
    corrupt(who, "has " + std::to_string(file_bytes) +
                     " bytes, too few for a safetensors header; is the file complete?");
  std::uint64_t length = read_length(start);
  if (length > kMaxHeaderBytes)
    corrupt(who, "header of " + std::to_string(length) + " bytes, at most " +
                     std::to_string(kMaxHeaderBytes) + " are read; is this a safetensors file?");
  if (length > file_bytes - kLengthBytes)
    corrupt(who, "header of " + std::to_string(length) + " bytes but the file ends after " +
                     std::to_string(file_bytes - kLengthBytes) + "; is the file complete?");
  if (start.size() - kLengthBytes < length)
    throw Error(ErrorCode::kValue, std::string(who) + ": " + std::to_string(length) +
                                       " bytes of header expected, got " +
                                       std::to_string(start.size() - kLengthBytes));
  std::string_view text(reinterpret_cast<const char*>(start.data()) + kLengthBytes,
                        static_cast<std::size_t>(length));
  if (!text.starts_with('{')) corrupt(who, "the header does not start with '{'");
  json::Value value = json::parse(text, who);

  FileHeader header;
  header.bytes = kLengthBytes + length;
  std::uint64_t data_bytes = file_bytes - header.bytes;
  if (value.object()->size() > kMaxTensors)
    corrupt(who, "more than " + std::to_string(kMaxTensors) + " tensors");
  for (const auto& [name, entry] : *value.object()) {
    if (name != "__metadata__") {
      header.tensors.push_back(parse_entry(name, entry, who, header.bytes, data_bytes));
      continue;
    }
    if (!entry.object()) corrupt(who, "'__metadata__' is not an object");
    for (const auto& [key, text_value] : *entry.object()) {
      if (!text_value.string()) corrupt(who, "'__metadata__' may hold strings only");
      header.metadata.emplace_back(key, *text_value.string());
    }
  }

  // Empty tensors share their offset with the tensor after them: shorter first.
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const FileTensor& a, const FileTensor& b) {
                     return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
                   });
  std::uint64_t expected = header.bytes;
  for (const FileTensor& tensor : header.tensors) {
    if (tensor.offset != expected)
      corrupt(who, "tensor " + json::quote(tensor.name) + ": starts at data byte " +
                       std::to_string(tensor.offset - header.bytes) + " but the tensor before " +
                       "ends at " + std::to_string(expected - header.bytes) +
                       (tensor.offset < expected ? ": they overlap" : ": a gap"));
    expected = tensor.offset + tensor.bytes;
  }
  if (expected != file_bytes)
    corrupt(who, std::to_string(file_bytes - expected) + " bytes after the last tensor");
  return header;
}

std::string make_file_header(std::span<const FileTensor> tensors) {
  // The name keeps transformers from loading the file on its own: it wants "pt" here.
  std::string text = R"({"__metadata__":{"format":"lowbit"})";
  std::uint64_t at = 0;
  for (const FileTensor& tensor : tensors) {
    text += "," + json::quote(tensor.name) + ":{\"dtype\":\"";
    text += file_dtype_info(tensor.dtype).name;
    text += "\",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i)
      text += (i ? "," : "") + std::to_string(tensor.shape[i]);
    text += "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + tensor.bytes) +
            "]}";
    at += tensor.bytes;
  }
  text += "}";
  std::uint64_t total = kLengthBytes + text.size();
  text.append((kDataAlignment - total % kDataAlignment) % kDataAlignment, ' ');
  if (text.size() > kMaxHeaderBytes)
    throw Error(ErrorCode::kValue, "a safetensors header of " + std::to_string(text.size()) +
                                       " bytes could not be read back (at most " +
                                       std::to_string(kMaxHeaderBytes) +
                                       "); use a smaller max_shard_size");
  std::string header;
  for (int i = 0; i < 8; ++i) header.push_back(static_cast<char>(text.size() >> (8 * i) & 0xFF));
  return header + text;
}

// ---- TensorFile ---------------------------------------------------------------------------------

struct TensorFile::Memory {
  os::Memory pages;
};

TensorFile::TensorFile(std::string path, std::unique_ptr<Memory> memory)
    : path_(std::move(path)), memory_(std::move(memory)) {
  header_ = parse_file_header(std::span(memory_->pages.data(), memory_->pages.size()),
                              memory_->pages.size(), path_);
}

TensorFile::~TensorFile() = default;

std::shared_ptr<TensorFile> TensorFile::open(const std::string& path, const FileOptions& options,
                                             const Threads& threads) {
  os::ReadFile file(path);
  if (file.size() < kLengthBytes)
    corrupt(path, "has " + std::to_string(file.size()) +
                      " bytes, too few for a safetensors header; is the file complete?");
  auto memory = std::make_unique<Memory>();
  if (options.mmap) {
    memory->pages = file.map();
  } else {
    memory->pages = os::Memory::anonymous(file.size());
    constexpr std::uint64_t chunk = 16 << 20;  // long enough that calls cost nothing
    std::int64_t chunks = static_cast<std::int64_t>((file.size() + chunk - 1) / chunk);
    // A task must not throw: the first failure is kept and thrown here.
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(chunks));
    threads.run(chunks, [&](std::int64_t i) {
      try {
        std::uint64_t begin = static_cast<std::uint64_t>(i) * chunk;
        std::uint64_t count = std::min(chunk, file.size() - begin);
        file.read(begin, std::span(memory->pages.data() + begin, count));
      } catch (...) {
        failures[static_cast<std::size_t>(i)] = std::current_exception();
      }
    });
    for (const std::exception_ptr& failure : failures)
      if (failure) std::rethrow_exception(failure);
  }
  return std::shared_ptr<TensorFile>(new TensorFile(path, std::move(memory)));
}

const FileTensor* TensorFile::find(std::string_view name) const {
  for (const FileTensor& tensor : header_.tensors)
    if (tensor.name == name) return &tensor;
  return nullptr;
}

std::uint64_t TensorFile::bytes() const {
  return memory_->pages.size();
}

std::span<std::byte> TensorFile::data(const FileTensor& tensor) const {
  return {memory_->pages.data() + tensor.offset, static_cast<std::size_t>(tensor.bytes)};
}

void TensorFile::release(std::span<const std::byte> bytes) const {
  memory_->pages.release(static_cast<std::uint64_t>(bytes.data() - memory_->pages.data()),
                         bytes.size());
}

std::span<const std::byte> TensorFile::header_data() const {
  return {memory_->pages.data(), static_cast<std::size_t>(header_.bytes)};
}

}  // namespace lowbit
