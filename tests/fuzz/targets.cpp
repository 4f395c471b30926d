// libFuzzer targets, one per reader; LOWBIT_FUZZ_TARGET picks one at compile time
// (scripts/fuzz.sh). A reader may refuse anything, with lowbit::Error; every other exception, a
// crash, a sanitizer's report, a leak or a hang is a finding.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cli/names.h"
#include "io/json.h"
#include "lowbit/error.h"
#include "lowbit/file.h"

using namespace lowbit;

namespace {

void require(bool ok) {
  if (!ok) std::abort();
}

[[maybe_unused]] void json_target(std::string_view text) {
  json::Value value = json::parse(text, "fuzz");
  // What has been read can be written and read again, to the same text.
  std::string once = json::dump(value);
  require(json::dump(json::parse(once, "fuzz")) == once);
}

[[maybe_unused]] void header_target(std::string_view text) {
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

[[maybe_unused]] void raw_header_target(std::string_view text) {
  parse_file_header(std::as_bytes(std::span(text.data(), text.size())), text.size(), "fuzz");
}

[[maybe_unused]] void manifest_target(std::string_view text) {
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

[[maybe_unused]] void glob_target(std::string_view text) {
  std::size_t half = text.size() / 2;
  cli::name_matches(text.substr(0, half), text.substr(half));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    LOWBIT_FUZZ_TARGET(std::string_view(reinterpret_cast<const char*>(data), size));
  } catch (const Error&) {
  }
  return 0;
}
