// Fuzz targets, one per reader. A reader may refuse anything, with lowbit::Error; every other
// exception, a crash, a sanitizer's report, a leak or a hang is a finding.
//
// A new reader: a function, a row in kTargets, seeds in corpus/<name>. `make test` runs all rows on
// mutated seeds for a fixed number of inputs (mutate.cpp); libFuzzer runs the one that
// LOWBIT_FUZZ_TARGET names at compile time (scripts/fuzz.sh, `make fuzz`).
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cli/checkpoint.h"
#include "cli/names.h"
#include "io/json.h"
#include "lowbit/error.h"
#include "lowbit/file.h"
#include "lowbit/gguf.h"
#include "lowbit/linear.h"
#include "targets.h"

using namespace lowbit;

namespace {

void require(bool ok) {
  if (!ok) std::abort();
}

void json_target(std::string_view text) {
  json::Value value = json::parse(text, "fuzz");
  // What has been read can be written and read again, to the same text.
  std::string once = json::dump(value);
  require(json::dump(json::parse(once, "fuzz")) == once);
  if (!value.object()) return;
  auto members = json::members(text, "fuzz");
  require(members.size() == value.object()->size());
  for (std::size_t i = 0; i < members.size(); ++i)
    require(json::dump(json::parse(members[i].second, "fuzz")) ==
            json::dump((*value.object())[i].second));
}

void header_target(std::string_view text) {
  // The length field is made right, or nearly every input would stop there; the first byte says how
  // many bytes of data follow the header.
  std::string bytes(8, '\0');
  std::uint64_t data = text.empty() ? 0 : static_cast<unsigned char>(text[0]);
  std::string_view header = text.substr(text.empty() ? 0 : 1);
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(header.size() >> (8 * i));
  bytes += header;
  FileHeader parsed =
      parse_file_header(std::as_bytes(std::span(bytes)), bytes.size() + data, "fuzz");
  std::uint64_t at = parsed.bytes;
  for (const FileTensor& tensor : parsed.tensors) {
    require(tensor.offset == at && tensor.bytes == tensor_bytes(tensor.dtype, tensor.shape));
    at += tensor.bytes;
  }
  require(at == bytes.size() + data);
}

void raw_header_target(std::string_view text) {
  parse_file_header(std::as_bytes(std::span(text.data(), text.size())), text.size(), "fuzz");
}

void manifest_target(std::string_view text) {
  // With the digest made right: what is behind it must stand on its own.
  std::string head = std::string(text) + "  \"digest\": \"";
  head += digest_text(digest(std::as_bytes(std::span(head)))) + "\"\n}\n";
  Manifest manifest = parse_manifest(head, "fuzz");
  for (const SavedTensor& tensor : manifest.tensors) {
    require(tensor.file < manifest.files.size());
    if (tensor.format) packed_shape(tensor);  // must not throw any more
  }
  for (const SavedFile& file : manifest.files) require(is_weight_file_name(file.name));
  std::string once = write_manifest(manifest);
  require(write_manifest(parse_manifest(once, "fuzz")) == once);
}

void index_target(std::string_view text) {
  for (const auto& [name, file] : cli::parse_index(text, "fuzz")) {
    // Whatever it says, it leads to a file beside it.
    require(file.ends_with(".safetensors") && file.find_first_of("/\\:") == std::string::npos);
    require(file[0] != '.' && file.find('\0') == std::string::npos);
  }
}

void glob_target(std::string_view text) {
  std::size_t half = text.size() / 2;
  cli::name_matches(text.substr(0, half), text.substr(half));
}

void gguf_target(std::string_view text) {
  std::string bytes = "GGUF\3" + std::string(3, '\0') + std::string(text);
  GgufHeader header = parse_gguf_header(std::as_bytes(std::span(bytes)), bytes.size(), "fuzz");
  std::uint64_t end = header.bytes;
  for (const GgufTensor& tensor : header.tensors) {
    require(tensor.offset % header.alignment == 0 && tensor.offset >= end &&
            tensor.offset - end < header.alignment && tensor.bytes > 0);
    end = tensor.offset + tensor.bytes;
  }
  require(header.tensors.empty() || end <= bytes.size());
  json::parse(describe_gguf(header), "fuzz");
  // The outline is a file, and its own outline.
  const std::string outline = outline_gguf(header);
  const GgufHeader again =
      parse_gguf_header(std::as_bytes(std::span(outline)), outline.size(), "fuzz");
  require(again.tensors.size() == header.tensors.size() && outline_gguf(again) == outline);
}

// Any bytes are blocks; what packs without rounding means the same. The first byte chooses a type.
void ggml_target(std::string_view text) {
  if (text.empty()) return;
  const auto types = ggml_types();
  const GgmlTypeInfo& type = types[static_cast<unsigned char>(text[0]) % types.size()];
  const std::int64_t blocks = std::ssize(text.substr(1)) / type.block_bytes;
  const std::int64_t k = blocks * type.block_elems;
  const auto bytes = std::as_bytes(
      std::span(text.data() + 1, static_cast<std::size_t>(blocks * type.block_bytes)));
  const GgmlMatrix matrix{bytes, type.number, 1, k};
  std::vector<float> expected(static_cast<std::size_t>(k)), got(expected.size());
  ggml_dequantize(matrix, {}, {expected.data(), DType::kFloat32, 1, k, k, 1});
  if (!type.exact) return;
  const Layout layout = make_layout(*type.exact, 1, k, type.exact_group_size);
  struct alignas(64) Unit {
    std::byte bytes[64];
  };
  std::vector<Unit> units(static_cast<std::size_t>(layout.bytes() / 64));
  const std::span<std::byte> packed(reinterpret_cast<std::byte*>(units.data()),
                                    static_cast<std::size_t>(layout.bytes()));
  const auto exponent = ggml_pack(matrix, {}, layout, packed);
  if (!exponent) return;
  reference::dequantize(packed, layout, *exponent, {got.data(), DType::kFloat32, 1, k, k, 1});
  require(got == expected);
}

constexpr fuzz::Target kTargets[] = {
    {"json", json_target},         {"header", header_target}, {"raw_header", raw_header_target},
    {"manifest", manifest_target}, {"index", index_target},   {"glob", glob_target},
    {"gguf", gguf_target},         {"ggml", ggml_target},
};

}  // namespace

std::span<const fuzz::Target> fuzz::targets() {
  return kTargets;
}

void fuzz::run(const Target& target, std::string_view input) {
  try {
    target.run(input);
  } catch (const Error&) {
  }
}

#ifdef LOWBIT_FUZZ_TARGET
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::Target* target = [] {
    for (const fuzz::Target& row : kTargets)
      if (std::string_view(row.name) == LOWBIT_FUZZ_TARGET) return &row;
    std::abort();
  }();
  fuzz::run(*target, std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}
#endif
