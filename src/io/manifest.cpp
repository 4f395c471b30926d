// ipex_llm.json: what a saved directory holds. Written in one canonical form, so that two saves of
// one model are byte-equal; its last member is the XXH3-128 of all the text before it, because a
// flipped digit in an exponent would otherwise load.
#include <algorithm>
#include <set>

#include "io/json.h"
#include "lowbit/error.h"
#include "lowbit/file.h"

namespace lowbit {
namespace {

constexpr std::string_view kMagic = "ipex-llm low-bit";
constexpr std::string_view kDigestKey = "  \"digest\": \"";
constexpr std::string_view kTextEnd = "\"\n}\n";
// Far beyond the exponents that float64 weights can need (docs/numerics.md).
constexpr std::int64_t kMaxExponent = 4096;

[[noreturn]] void corrupt(std::string_view who, const std::string& what) {
  throw Error(ErrorCode::kCorrupt,
              std::string(who) + ": " + what + "; save the model again or copy the directory anew");
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Typed access to an object that must hold exactly the keys that are asked for.
class Fields {
 public:
  Fields(const json::Value& value, std::string who) : who_(std::move(who)) {
    if (!value.object()) corrupt(who_, std::string("expected an object, got ") + value.kind());
    object_ = value.object();
  }
  const json::Value& get(std::string_view key) {
    for (const auto& item : *object_) {
      if (item.first != key) continue;
      ++asked_;
      return item.second;
    }
    corrupt(who_, "has no '" + std::string(key) + "'");
  }
  std::string string(std::string_view key) {
    const json::Value& value = get(key);
    if (!value.string()) wrong(key, "a string", value);
    return *value.string();
  }
  std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high) {
    const json::Value& value = get(key);
    if (!value.integer()) wrong(key, "an integer", value);
    if (*value.integer() < low || *value.integer() > high)
      corrupt(who_, "'" + std::string(key) + "' is " + std::to_string(*value.integer()) +
                        ", expected " + std::to_string(low) + " to " + std::to_string(high));
    return *value.integer();
  }
  const json::Array& array(std::string_view key) {
    const json::Value& value = get(key);
    if (!value.array()) wrong(key, "an array", value);
    return *value.array();
  }
  const json::Object& object(std::string_view key) {
    const json::Value& value = get(key);
    if (!value.object()) wrong(key, "an object", value);
    return *value.object();
  }
  std::vector<std::int64_t> sizes(std::string_view key) {
    std::vector<std::int64_t> sizes;
    const json::Array& shape = array(key);
    if (shape.size() > kMaxRank)
      corrupt(who_, "more than " + std::to_string(kMaxRank) + " dimensions");
    for (const json::Value& size : shape) {
      if (!size.integer() || *size.integer() < 0) wrong(key, "an array of sizes", size);
      sizes.push_back(*size.integer());
    }
    return sizes;
  }
  bool has(std::string_view key) const {
    return std::any_of(object_->begin(), object_->end(),
                       [&](const auto& item) { return item.first == key; });
  }
  Digest digest(std::string_view key) {
    std::optional<Digest> digest = parse_digest(string(key));
    if (!digest) corrupt(who_, "'" + std::string(key) + "' is not 32 lower-case hex digits");
    return *digest;
  }
  void done() const {
    if (asked_ != object_->size()) corrupt(who_, "has keys that this format version does not know");
  }
  const std::string& who() const { return who_; }

 private:
  [[noreturn]] void wrong(std::string_view key, const char* expected, const json::Value& value) {
    corrupt(who_, "'" + std::string(key) + "' is not " + expected + " (got " + value.kind() + ")");
  }
  const json::Object* object_;
  std::string who_;
  std::size_t asked_ = 0;
};

bool is_hex(std::string_view text) {
  return parse_digest(text).has_value();
}

bool all_digits(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

SavedFile parse_file(const json::Value& value, const std::string& who) {
  Fields fields(value, who);
  SavedFile file;
  file.name = fields.string("name");
  // This one pattern rules out separators, "..", absolute paths and device names at once.
  if (!is_weight_file_name(file.name))
    corrupt(who, json::quote(file.name) + " is not the name of a weight file");
  file.bytes = static_cast<std::uint64_t>(fields.integer("bytes", 0, INT64_MAX));
  file.header = fields.digest("header");
  fields.done();
  return file;
}

// `files` is nothing in a save request, which does not know where a tensor will be.
SavedTensor parse_tensor(const std::string& name, const json::Value& value,
                         std::optional<std::size_t> files, const std::string& manifest) {
  std::string who = manifest + ": tensor " + json::quote(name);
  if (name.empty() || name.find('\0') != std::string::npos) corrupt(who, "is no tensor's name");
  Fields fields(value, who);
  SavedTensor tensor;
  tensor.name = name;
  if (files) {
    if (*files == 0) corrupt(who, "is in no file: none is listed");
    tensor.file =
        static_cast<std::size_t>(fields.integer("file", 0, static_cast<std::int64_t>(*files) - 1));
    tensor.digest = fields.digest("digest");
  }
  std::string dtype = fields.string("dtype");
  auto types = file_dtypes();
  auto row = std::find_if(types.begin(), types.end(),
                          [&](const FileDTypeInfo& info) { return info.torch_name == dtype; });
  if (row == types.end()) corrupt(who, "unknown dtype " + json::quote(dtype));
  tensor.dtype = row->dtype;
  tensor.shape = fields.sizes("shape");
  if (!tensor_bytes(tensor.dtype, tensor.shape)) corrupt(who, "the byte count leaves 63 bits");
  if (fields.has("low_bit")) {
    std::string low_bit = fields.string("low_bit");
    tensor.group_size = static_cast<int>(fields.integer("group_size", 0, 1 << 20));
    tensor.exponent = static_cast<int>(fields.integer("exponent", -kMaxExponent, kMaxExponent));
    if (fields.has("transposed")) {
      const bool* flag = fields.get("transposed").boolean();
      if (!flag || !*flag) corrupt(who, "'transposed' may only be true");
      tensor.transposed = true;
    }
    if (fields.has("stored_shape")) tensor.stored_shape = fields.sizes("stored_shape");
    try {
      tensor.format = parse_format(low_bit);
      packed_shape(tensor);
    } catch (const Error& error) {
      corrupt(who, error.what());
    }
  }
  fields.done();
  return tensor;
}

void parse_tensors(Manifest& manifest, Fields& fields, std::optional<std::size_t> files) {
  const json::Object& tensors = fields.object("tensors");
  if (tensors.size() > kMaxTensors)
    corrupt(fields.who(), "more than " + std::to_string(kMaxTensors) + " tensors");
  std::set<std::string, std::less<>> names;
  for (const auto& [name, value] : tensors) {
    manifest.tensors.push_back(parse_tensor(name, value, files, fields.who()));
    names.insert(name);
  }
  for (const auto& [alias, target] : fields.object("ties")) {
    if (!target.string())
      corrupt(fields.who(), "ties: " + json::quote(alias) + " is not tied to a name");
    if (alias.empty() || names.contains(alias))
      corrupt(fields.who(), "ties: " + json::quote(alias) + " is a tensor itself");
    if (!names.contains(*target.string()))
      corrupt(fields.who(), "ties: " + json::quote(alias) + " is tied to " +
                                json::quote(*target.string()) + ", which is not saved");
    manifest.ties.emplace_back(alias, *target.string());
  }
}

}  // namespace

bool is_weight_file_name(std::string_view name) {
  constexpr std::string_view prefix = "low_bit-", suffix = ".safetensors";
  if (!name.starts_with(prefix) || !name.ends_with(suffix)) return false;
  if (name.size() < prefix.size() + 32 + suffix.size()) return false;
  name = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
  if (!is_hex(name.substr(0, 32))) return false;
  name = name.substr(32);
  return name.empty() || (name.size() == 15 && name[0] == '-' && all_digits(name.substr(1, 5)) &&
                          name.substr(6, 4) == "-of-" && all_digits(name.substr(10)));
}

PackedShape packed_shape(const SavedTensor& tensor) {
  if (!tensor.format) throw Error(ErrorCode::kValue, tensor.name + ": is not packed");
  std::vector<std::int64_t> shape =
      tensor.stored_shape.empty() ? tensor.shape : tensor.stored_shape;
  std::size_t rank = shape.size();
  if (rank < 2)
    throw Error(
        ErrorCode::kValue,
        tensor.name + ": a packed tensor has at least 2 dimensions, got " + std::to_string(rank));
  if (tensor.stored_shape.empty()) {
    if (tensor.transposed) std::swap(shape[rank - 1], shape[rank - 2]);
  } else {
    auto elements = [](const std::vector<std::int64_t>& sizes) {
      return tensor_bytes(FileDType::kU8, sizes);
    };
    if (!elements(shape) || elements(shape) != elements(tensor.shape))
      throw Error(ErrorCode::kValue, tensor.name + ": stored as " + shape_text(shape) +
                                         ", which is not the size of " + shape_text(tensor.shape));
  }
  std::int64_t matrices = 1;
  for (std::size_t i = 0; i + 2 < rank; ++i) {
    if (shape[i] != 0 && matrices > INT64_MAX / shape[i])
      throw Error(ErrorCode::kValue, tensor.name + ": the sizes overflow");
    matrices *= shape[i];
  }
  PackedShape packed{
      make_layout(*tensor.format, shape[rank - 2], shape[rank - 1], tensor.group_size), matrices};
  std::int64_t bytes = packed.layout.bytes();
  if (bytes != 0 && matrices > INT64_MAX / bytes)
    throw Error(ErrorCode::kValue, tensor.name + ": the sizes overflow");
  return packed;
}

std::string write_manifest(const Manifest& manifest) {
  std::string text =
      "{\n  \"format\": \"" + std::string(kMagic) +
      "\",\n  \"format_version\": " + std::to_string(kManifestVersion) +
      ",\n  \"options\": " + json::dump(json::parse(manifest.options, "save: options")) +
      ",\n  \"files\": [";
  for (std::size_t i = 0; i < manifest.files.size(); ++i) {
    const SavedFile& file = manifest.files[i];
    text += std::string(i ? "," : "") + "\n    {\"name\": " + json::quote(file.name) +
            ", \"bytes\": " + std::to_string(file.bytes) + ", \"header\": \"" +
            digest_text(file.header) + "\"}";
  }
  text += manifest.files.empty() ? "],\n  \"tensors\": {" : "\n  ],\n  \"tensors\": {";
  for (std::size_t i = 0; i < manifest.tensors.size(); ++i) {
    const SavedTensor& tensor = manifest.tensors[i];
    text += std::string(i ? "," : "") + "\n    " + json::quote(tensor.name) +
            ": {\"file\": " + std::to_string(tensor.file) + ", \"digest\": \"" +
            digest_text(tensor.digest) + "\", \"dtype\": \"" +
            std::string(file_dtype_info(tensor.dtype).torch_name) +
            "\", \"shape\": " + shape_text(tensor.shape);
    if (tensor.format) {
      text += ", \"low_bit\": \"" + std::string(format_info(*tensor.format).name) +
              "\", \"group_size\": " + std::to_string(tensor.group_size) +
              ", \"exponent\": " + std::to_string(tensor.exponent);
      if (tensor.transposed) text += ", \"transposed\": true";
      if (!tensor.stored_shape.empty())
        text += ", \"stored_shape\": " + shape_text(tensor.stored_shape);
    }
    text += "}";
  }
  text += manifest.tensors.empty() ? "},\n  \"ties\": {" : "\n  },\n  \"ties\": {";
  for (std::size_t i = 0; i < manifest.ties.size(); ++i)
    text += std::string(i ? "," : "") + "\n    " + json::quote(manifest.ties[i].first) + ": " +
            json::quote(manifest.ties[i].second);
  text += manifest.ties.empty() ? "},\n" : "\n  },\n";
  text += kDigestKey;
  Digest self = digest(std::as_bytes(std::span(text)));
  text += digest_text(self);
  text += kTextEnd;
  return text;
}

Manifest parse_manifest(std::string_view text, std::string_view who_view) {
  const std::string who(who_view);
  if (text.empty()) corrupt(who, "is empty");
  json::Value root = json::parse(text, who);
  const json::Value* magic = root.find("format");
  if (!magic || !magic->string() || *magic->string() != kMagic)
    throw Error(ErrorCode::kCorrupt, who +
                                         ": is not the manifest of a low-bit save (no \"format\": "
                                         "\"" +
                                         std::string(kMagic) +
                                         "\"); give the directory that save_low_bit wrote");
  const json::Value* version = root.find("format_version");
  if (!version || !version->integer() || *version->integer() < 1)
    corrupt(who, "'format_version' is not a positive integer");
  if (*version->integer() > kManifestVersion)
    throw Error(ErrorCode::kValue,
                who + ": has format version " + std::to_string(*version->integer()) +
                    ", this library reads versions up to " + std::to_string(kManifestVersion) +
                    "; install a newer ipex-llm-lowbit");
  // Structure comes after the digest: damage is then called damage, not a wrong shape.
  std::size_t tail = 32 + kTextEnd.size();
  if (text.size() < tail + kDigestKey.size() || !text.ends_with(kTextEnd) ||
      text.substr(text.size() - tail - kDigestKey.size(), kDigestKey.size()) != kDigestKey)
    corrupt(who, "does not end with its digest");
  std::optional<Digest> self = parse_digest(text.substr(text.size() - tail, 32));
  if (!self || *self != digest(std::as_bytes(std::span(text.data(), text.size() - tail))))
    corrupt(who, "its digest does not match: it was damaged or edited");

  Manifest manifest;
  Fields fields(root, who);
  fields.get("format");
  fields.get("format_version");
  fields.get("digest");

  const json::Value& options = fields.get("options");
  if (!options.object()) corrupt(who, "'options' is not an object");
  manifest.options = json::dump(options);

  std::set<std::string, std::less<>> names;
  for (const json::Value& value : fields.array("files")) {
    manifest.files.push_back(
        parse_file(value, who + ": file " + std::to_string(manifest.files.size())));
    if (!names.insert(manifest.files.back().name).second)
      corrupt(who, json::quote(manifest.files.back().name) + " is listed twice");
  }
  parse_tensors(manifest, fields, manifest.files.size());
  fields.done();
  return manifest;
}

Manifest parse_save_request(std::string_view text, std::string_view who) {
  json::Value root = json::parse(text, who);
  Manifest manifest;
  Fields fields(root, std::string(who));
  manifest.options = json::dump(json::Value(fields.object("options")));
  parse_tensors(manifest, fields, std::nullopt);
  fields.done();
  return manifest;
}

}  // namespace lowbit
