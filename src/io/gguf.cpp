// The GGUF header: magic, version, counts, metadata, tensor table, padding to the alignment; then
// the tensors, each padded to the alignment. All little-endian.
#include "lowbit/gguf.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <unordered_set>

#include "io/json.h"
#include "io/os.h"
#include "lowbit/error.h"

namespace lowbit {
namespace {

enum : std::uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
  kTypeCount,
};
constexpr int kTypeBytes[kTypeCount] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

[[noreturn]] void corrupt(std::string_view who, const std::string& text) {
  throw Error(ErrorCode::kCorrupt, std::string(who) + ": " + text);
}

std::uint64_t round_up(std::uint64_t value, std::uint64_t step) {
  return (value + step - 1) / step * step;
}

// Reads forward; every length is checked against what is left before anything is taken.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, std::string_view who) : bytes_(bytes), who_(who) {}

  std::uint64_t at() const { return at_; }
  std::uint64_t left() const { return bytes_.size() - at_; }

  std::uint64_t number(int bytes, const std::string& what) {
    need(static_cast<std::uint64_t>(bytes), what);
    std::uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      value |= std::to_integer<std::uint64_t>(bytes_[at_ + static_cast<std::uint64_t>(i)])
               << (8 * i);
    }
    at_ += static_cast<std::uint64_t>(bytes);
    return value;
  }
  std::uint32_t number32(const std::string& what) {
    return static_cast<std::uint32_t>(number(4, what));
  }

  std::string text(std::uint64_t cap, const std::string& what) {
    const std::uint64_t length = number(8, what);
    if (length > cap)
      corrupt(who_, what + " is " + std::to_string(length) + " bytes long, at most " +
                        std::to_string(cap) + " are read");
    need(length, what);
    std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + at_,
                          static_cast<std::size_t>(length));
    if (!json::valid_utf8(text)) corrupt(who_, what + " is not UTF-8");
    at_ += length;
    return std::string(text);
  }

  // A key or the name of a tensor.
  std::string name(const std::string& what) {
    std::string text = this->text(kMaxGgufName, what);
    if (text.empty()) corrupt(who_, what + " is empty");
    if (text.find('\0') != std::string::npos) corrupt(who_, what + " holds a NUL");
    return text;
  }

 private:
  void need(std::uint64_t bytes, const std::string& what) const {
    if (bytes > left())
      corrupt(who_, what + " needs " + std::to_string(bytes) + " bytes but the file ends after " +
                        std::to_string(left()) + "; is the file complete?");
  }

  std::span<const std::byte> bytes_;
  std::uint64_t at_ = 0;
  std::string_view who_;
};

// Metadata values; counts them all, those in arrays too.
class Values {
 public:
  Values(Cursor& cursor, std::string_view who) : cursor_(cursor), who_(who) {}

  GgufValue read(std::uint32_t type, const std::string& what, int depth = 0) {
    if (++count_ > kMaxGgufValues)
      corrupt(who_, "more than " + std::to_string(kMaxGgufValues) + " metadata values");
    switch (type) {
      case kString:
        return {cursor_.text(kMaxGgufString, what)};
      case kArray:
        return {array(what, depth + 1)};
      default:
        break;
    }
    if (type >= kTypeCount)
      corrupt(who_, what + " has the unknown value type " + std::to_string(type));
    const std::uint64_t bits = cursor_.number(kTypeBytes[type], what);
    switch (type) {
      case kInt8:
        return {std::int64_t{static_cast<std::int8_t>(bits)}};
      case kInt16:
        return {std::int64_t{static_cast<std::int16_t>(bits)}};
      case kInt32:
        return {std::int64_t{static_cast<std::int32_t>(bits)}};
      case kInt64:
        return {static_cast<std::int64_t>(bits)};
      case kFloat32:
        return {double{std::bit_cast<float>(static_cast<std::uint32_t>(bits))}};
      case kFloat64:
        return {std::bit_cast<double>(bits)};
      case kBool:
        if (bits > 1) corrupt(who_, what + " is a boolean that is neither 0 nor 1");
        return {bits == 1};
      default:
        return {bits};
    }
  }

 private:
  GgufArray array(const std::string& what, int depth) {
    if (depth > kMaxGgufDepth)
      corrupt(who_, what + " nests arrays more than " + std::to_string(kMaxGgufDepth) + " deep");
    GgufArray array{cursor_.number32(what), {}};
    if (array.type >= kTypeCount)
      corrupt(who_, what + " is an array of the unknown value type " + std::to_string(array.type));
    const std::uint64_t length = cursor_.number(8, what);
    // The least that an element takes: a length or an empty array where it has no fixed size.
    const auto least = static_cast<std::uint64_t>(array.type == kString  ? 8
                                                  : array.type == kArray ? 12
                                                                         : kTypeBytes[array.type]);
    if (length > cursor_.left() / least)
      corrupt(who_, what + " is an array of " + std::to_string(length) +
                        " elements but the file ends before; is the file complete?");
    if (length > kMaxGgufValues - count_)
      corrupt(who_, "more than " + std::to_string(kMaxGgufValues) + " metadata values");
    array.values.reserve(static_cast<std::size_t>(length));
    for (std::uint64_t i = 0; i < length; ++i)
      array.values.push_back(read(array.type, what, depth));
    return array;
  }

  Cursor& cursor_;
  std::string_view who_;
  std::uint64_t count_ = 0;
};

GgufTensor read_tensor(Cursor& cursor, std::string_view who, std::uint64_t index) {
  GgufTensor tensor;
  tensor.name = cursor.name("the name of tensor " + std::to_string(index));
  const std::string what = "tensor " + json::quote(tensor.name);
  const std::uint32_t rank = cursor.number32(what);
  if (rank == 0 || rank > kMaxGgufRank)
    corrupt(who, what + " has " + std::to_string(rank) + " dimensions, 1 to " +
                     std::to_string(kMaxGgufRank) + " are read");
  std::uint64_t elements = 1;
  for (std::uint32_t d = 0; d < rank; ++d) {
    const std::uint64_t size = cursor.number(8, what);
    if (size == 0) corrupt(who, what + " has a dimension of size 0");
    // 2^56 elements: no byte count of any type overflows.
    if (size > (std::uint64_t{1} << 56) / elements)
      corrupt(who, what + " has more than 2^56 elements");
    elements *= size;
    tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
  }
  tensor.type = cursor.number32(what);
  const GgmlTypeInfo* type = find_ggml_type(tensor.type);
  if (type == nullptr)
    corrupt(who, what + " has the unknown type " + std::to_string(tensor.type) +
                     "; was it written by a newer llama.cpp?");
  const auto block = static_cast<std::uint64_t>(type->block_elems);
  if (static_cast<std::uint64_t>(tensor.shape.back()) % block != 0)
    corrupt(who, what + " has rows of " + std::to_string(tensor.shape.back()) +
                     " elements, no multiple of the " + std::to_string(block) + " of a " +
                     std::string(type->name) + " block");
  tensor.bytes = elements / block * static_cast<std::uint64_t>(type->block_bytes);
  tensor.offset = cursor.number(8, what);  // from the start of the data, for now
  return tensor;
}

std::uint32_t alignment_of(const GgufHeader& header, std::string_view who) {
  const GgufValue* value = header.find("general.alignment");
  if (value == nullptr) return 32;
  const auto* alignment = std::get_if<std::uint64_t>(&value->value);
  if (alignment == nullptr || *alignment < 8 || *alignment > kMaxGgufAlignment ||
      !std::has_single_bit(*alignment))
    corrupt(who, "general.alignment must be a power of two from 8 to " +
                     std::to_string(kMaxGgufAlignment));
  return static_cast<std::uint32_t>(*alignment);
}

// Offsets become those in the file; every byte after the header belongs to one tensor or is
// padding.
void place_tensors(GgufHeader& header, std::uint64_t header_end, std::uint64_t file_bytes,
                   std::string_view who) {
  header.bytes = round_up(header_end, header.alignment);
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const GgufTensor& a, const GgufTensor& b) { return a.offset < b.offset; });
  std::uint64_t expected = 0, end = 0;
  for (GgufTensor& tensor : header.tensors) {
    const std::string what = "tensor " + json::quote(tensor.name);
    if (tensor.offset % header.alignment != 0)
      corrupt(who, what + " starts at data byte " + std::to_string(tensor.offset) +
                       ", no multiple of the alignment " + std::to_string(header.alignment));
    if (tensor.offset != expected)
      corrupt(who, what + " starts at data byte " + std::to_string(tensor.offset) +
                       " but the tensor before ends at " + std::to_string(end) +
                       (tensor.offset < expected ? ": they overlap" : ": a gap"));
    const std::uint64_t data = file_bytes < header.bytes ? 0 : file_bytes - header.bytes;
    if (tensor.bytes > data || tensor.offset > data - tensor.bytes)
      corrupt(who, what + " ends at data byte " + std::to_string(tensor.offset + tensor.bytes) +
                       " but the file holds " + std::to_string(data) +
                       " bytes of data; is the file complete?");
    end = tensor.offset + tensor.bytes;
    expected = round_up(end, header.alignment);
    tensor.offset += header.bytes;
  }
  // The last padding may be left out.
  if (file_bytes > header.bytes + expected)
    corrupt(who,
            std::to_string(file_bytes - header.bytes - expected) + " bytes after the last tensor");
}

}  // namespace

const GgufValue* GgufHeader::find(std::string_view key) const {
  for (const auto& [name, value] : metadata)
    if (name == key) return &value;
  return nullptr;
}

GgufHeader parse_gguf_header(std::span<const std::byte> start, std::uint64_t file_bytes,
                             std::string_view who) {
  Cursor cursor(start.first(std::min<std::uint64_t>(start.size(), kMaxGgufHeaderBytes)), who);
  if (cursor.number32("the magic number") != 0x46554747)  // "GGUF"
    corrupt(who, "does not start with 'GGUF'; is this a GGUF file?");
  GgufHeader header;
  header.version = cursor.number32("the version");
  if ((header.version & 0xffff) == 0)
    throw Error(ErrorCode::kValue, std::string(who) +
                                       ": a big-endian GGUF file; convert it with "
                                       "gguf_convert_endian of the gguf package");
  if (header.version < kOldestGguf || header.version > kNewestGguf)
    throw Error(ErrorCode::kValue,
                std::string(who) + ": GGUF version " + std::to_string(header.version) +
                    ", versions " + std::to_string(kOldestGguf) + " and " +
                    std::to_string(kNewestGguf) + " are read; " +
                    (header.version > kNewestGguf ? "update this library" : "convert it anew"));
  const std::uint64_t tensors = cursor.number(8, "the number of tensors");
  const std::uint64_t entries = cursor.number(8, "the number of metadata entries");
  if (tensors > kMaxTensors)
    corrupt(who, std::to_string(tensors) + " tensors, at most " + std::to_string(kMaxTensors) +
                     " are read");
  if (entries > kMaxGgufEntries)
    corrupt(who, std::to_string(entries) + " metadata entries, at most " +
                     std::to_string(kMaxGgufEntries) + " are read");

  Values values(cursor, who);
  std::unordered_set<std::string> seen;
  for (std::uint64_t i = 0; i < entries; ++i) {
    std::string key = cursor.name("the key of metadata entry " + std::to_string(i));
    const std::string what = "metadata " + json::quote(key);
    if (!seen.insert(key).second) corrupt(who, what + " appears twice");
    const std::uint32_t type = cursor.number32(what);
    header.metadata.emplace_back(std::move(key), values.read(type, what));
  }
  header.alignment = alignment_of(header, who);
  seen.clear();
  for (std::uint64_t i = 0; i < tensors; ++i) {
    header.tensors.push_back(read_tensor(cursor, who, i));
    if (!seen.insert(header.tensors.back().name).second)
      corrupt(who, "tensor " + json::quote(header.tensors.back().name) + " appears twice");
  }
  place_tensors(header, cursor.at(), file_bytes, who);
  return header;
}

namespace {

std::string value_text(const GgufValue& value) {
  if (const auto* text = std::get_if<std::string>(&value.value)) return json::quote(*text);
  if (const auto* flag = std::get_if<bool>(&value.value)) return *flag ? "true" : "false";
  if (const auto* number = std::get_if<std::uint64_t>(&value.value)) return std::to_string(*number);
  if (const auto* number = std::get_if<std::int64_t>(&value.value)) return std::to_string(*number);
  if (const auto* number = std::get_if<double>(&value.value)) {
    if (!std::isfinite(*number)) return "null";
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", *number);
    return text;
  }
  const auto& array = std::get<GgufArray>(value.value);
  return "{\"array\": " + std::to_string(array.type) +
         ", \"length\": " + std::to_string(array.values.size()) + "}";
}

}  // namespace

std::string describe_gguf(const GgufHeader& header) {
  std::string text = "{\"version\": " + std::to_string(header.version) +
                     ", \"alignment\": " + std::to_string(header.alignment) + ", \"metadata\": {";
  const char* between = "";
  for (const auto& [key, value] : header.metadata) {
    text += between + json::quote(key) + ": " + value_text(value);
    between = ", ";
  }
  text += "}, \"tensors\": {";
  between = "";
  for (const GgufTensor& tensor : header.tensors) {
    text += between + json::quote(tensor.name) + ": {\"type\": \"" +
            std::string(ggml_type_info(tensor.type).name) +
            "\", \"number\": " + std::to_string(tensor.type) + ", \"shape\": [";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i)
      text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
    text += "], \"bytes\": " + std::to_string(tensor.bytes) + "}";
    between = ", ";
  }
  return text + "}}";
}

// ---- outline -----------------------------------------------------------------------------------

namespace {

void put(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

void put_text(std::string& out, std::string_view text) {
  put(out, text.size(), 8);
  out += text;
}

// The widest type that holds the values of `type`.
std::uint32_t widest(std::uint32_t type) {
  switch (type) {
    case kUint8:
    case kUint16:
    case kUint32:
      return kUint64;
    case kInt8:
    case kInt16:
    case kInt32:
      return kInt64;
    case kFloat32:
      return kFloat64;
    default:
      return type;
  }
}

std::uint32_t type_of(const GgufValue& value) {
  constexpr std::uint32_t types[] = {kUint64, kInt64, kFloat64, kBool, kString, kArray};
  return types[value.value.index()];
}

void put_value(std::string& out, const GgufValue& value, std::size_t most) {
  if (const auto* text = std::get_if<std::string>(&value.value)) return put_text(out, *text);
  if (const auto* flag = std::get_if<bool>(&value.value)) return put(out, *flag ? 1 : 0, 1);
  if (const auto* number = std::get_if<std::uint64_t>(&value.value)) return put(out, *number, 8);
  if (const auto* number = std::get_if<std::int64_t>(&value.value))
    return put(out, static_cast<std::uint64_t>(*number), 8);
  if (const auto* number = std::get_if<double>(&value.value))
    return put(out, std::bit_cast<std::uint64_t>(*number), 8);
  const auto& array = std::get<GgufArray>(value.value);
  const std::size_t count = std::min(array.values.size(), most);
  put(out, widest(array.type), 4);
  put(out, count, 8);
  for (std::size_t i = 0; i < count; ++i) put_value(out, array.values[i], most);
}

}  // namespace

std::string outline_gguf(const GgufHeader& header) {
  constexpr std::string_view alignment_key = "general.alignment";
  constexpr std::uint32_t alignment = 32;  // where nothing else is said
  const bool aligned = header.find(alignment_key) != nullptr;
  std::string out = "GGUF";
  put(out, kNewestGguf, 4);
  put(out, header.tensors.size(), 8);
  put(out, header.metadata.size() - (aligned ? 1 : 0), 8);
  for (const auto& [key, value] : header.metadata) {
    if (key == alignment_key) continue;
    put_text(out, key);
    put(out, type_of(value), 4);
    put_value(out, value, key.starts_with("tokenizer.") ? kOutlineElements : SIZE_MAX);
  }
  std::uint64_t offset = 0;
  for (const GgufTensor& tensor : header.tensors) {
    put_text(out, tensor.name);
    put(out, 1, 4);  // dimensions
    put(out, 1, 8);  // elements
    put(out, 0, 4);  // F32
    put(out, offset, 8);
    offset += alignment;
  }
  out.resize(round_up(out.size(), alignment) + offset, '\0');
  return out;
}

// ---- GgufFile ----------------------------------------------------------------------------------

struct GgufFile::Memory {
  os::Memory pages;
};

GgufFile::GgufFile(std::string path, std::unique_ptr<Memory> memory)
    : path_(std::move(path)), memory_(std::move(memory)) {
  header_ = parse_gguf_header(std::span(memory_->pages.data(), memory_->pages.size()),
                              memory_->pages.size(), path_);
}

GgufFile::~GgufFile() = default;

std::shared_ptr<GgufFile> GgufFile::open(const std::string& path, const FileOptions& options) {
  os::ReadFile file(path);
  if (file.size() < 24)
    corrupt(path, "has " + std::to_string(file.size()) +
                      " bytes, too few for a GGUF header; is the file complete?");
  auto memory = std::make_unique<Memory>();
  if (options.mmap) {
    memory->pages = file.map();
  } else {
    memory->pages = os::Memory::anonymous(file.size());
    file.read(0, std::span(memory->pages.data(), static_cast<std::size_t>(file.size())));
  }
  return std::shared_ptr<GgufFile>(new GgufFile(path, std::move(memory)));
}

std::uint64_t GgufFile::bytes() const {
  return memory_->pages.size();
}

std::span<std::byte> GgufFile::data(const GgufTensor& tensor) const {
  return {memory_->pages.data() + tensor.offset, static_cast<std::size_t>(tensor.bytes)};
}

// ---- several files ------------------------------------------------------------------------------

namespace {

std::optional<std::uint64_t> number_of(const GgufHeader& header, std::string_view key,
                                       std::string_view who) {
  const GgufValue* value = header.find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* number = std::get_if<std::uint64_t>(&value->value)) return *number;
  if (const auto* number = std::get_if<std::int64_t>(&value->value); number && *number >= 0)
    return static_cast<std::uint64_t>(*number);
  corrupt(who, std::string(key) + " is no number of at least 0");
}

// "-00002-of-00003.gguf"
std::string shard_tail(std::uint64_t number, std::uint64_t count) {
  char text[64];
  std::snprintf(text, sizeof text, "-%05llu-of-%05llu.gguf",
                static_cast<unsigned long long>(number), static_cast<unsigned long long>(count));
  return text;
}

// Which file of how many; one of one where nothing is said.
std::pair<std::uint64_t, std::uint64_t> place_of(const GgufFile& file) {
  const std::uint64_t count = number_of(file.header(), "split.count", file.path()).value_or(1);
  const std::uint64_t number = number_of(file.header(), "split.no", file.path()).value_or(0);
  return {number, count};
}

}  // namespace

GgufModel GgufModel::open(const std::string& path, const FileOptions& options) {
  GgufModel model;
  model.files_.push_back(GgufFile::open(path, options));
  const GgufFile& first = *model.files_[0];
  model.header_ = first.header();
  const auto [number, count] = place_of(first);
  if (count <= 1) return model;
  if (number != 0)
    throw Error(ErrorCode::kValue, path + ": is file " + std::to_string(number + 1) + " of " +
                                       std::to_string(count) + "; give the first");
  const std::string tail = shard_tail(1, count);
  if (!path.ends_with(tail))
    throw Error(ErrorCode::kValue, path + ": is the first of " + std::to_string(count) +
                                       " files, but its name does not end in " + tail +
                                       ", by which the others are found");
  std::unordered_set<std::string_view> names;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (i > 0) {
      const std::string next = path.substr(0, path.size() - tail.size()) + shard_tail(i + 1, count);
      model.files_.push_back(GgufFile::open(next, options));
    }
    const GgufFile& file = *model.files_.back();
    if (place_of(file) != std::pair(i, count))
      corrupt(file.path(), "is not file " + std::to_string(i + 1) + " of " + std::to_string(count) +
                               " but " + std::to_string(place_of(file).first + 1) + " of " +
                               std::to_string(place_of(file).second));
    for (const GgufTensor& tensor : file.header().tensors) {
      if (!names.insert(tensor.name).second)
        corrupt(file.path(),
                "tensor " + json::quote(tensor.name) + " is in a file before it already");
      if (i > 0) model.header_.tensors.push_back(tensor);
    }
  }
  const auto tensors = number_of(first.header(), "split.tensors.count", path);
  if (tensors && *tensors != names.size())
    corrupt(path, "says that there are " + std::to_string(*tensors) + " tensors, its " +
                      std::to_string(count) + " files hold " + std::to_string(names.size()));
  std::erase_if(model.header_.metadata,
                [](const auto& entry) { return entry.first.starts_with("split."); });
  return model;
}

}  // namespace lowbit
