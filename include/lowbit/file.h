// Files: safetensors in and out, and the saved low-bit directory. What lies where: docs/files.md;
// what a reader refuses: docs/security.md. Every path is UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lowbit/format.h"
#include "lowbit/threads.h"

namespace lowbit {

// ---- element types of a safetensors file --------------------------------------------------------

enum class FileDType : std::uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kU16,
  kI16,
  kF16,
  kBF16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64,
  kC64,
};
inline constexpr int kFileDTypeCount = 16;

struct FileDTypeInfo {
  FileDType dtype;
  std::string_view name;        // as safetensors writes it: "BF16"
  std::string_view torch_name;  // as the manifest writes it: "bfloat16"
  int bytes;
};

std::span<const FileDTypeInfo> file_dtypes();  // kFileDTypeCount rows, in the order of FileDType
const FileDTypeInfo& file_dtype_info(FileDType dtype);

// Elements times bytes with checked arithmetic; nothing if it leaves 63 bits or a size is negative.
std::optional<std::uint64_t> tensor_bytes(FileDType dtype, std::span<const std::int64_t> shape);

// ---- digests ------------------------------------------------------------------------------------

// XXH3-128 detects damage. It does not authenticate: who can write the tensors can write the
// digest.
struct Digest {
  std::uint64_t high = 0, low = 0;
  bool operator==(const Digest&) const = default;
};

Digest digest(std::span<const std::byte> bytes);
std::string digest_text(const Digest& digest);              // 32 lower-case hex digits
std::optional<Digest> parse_digest(std::string_view text);  // exactly what digest_text writes

// A digest over bytes that come in pieces.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(Hasher&&) noexcept;
  Hasher& operator=(Hasher&&) noexcept;
  void update(std::span<const std::byte> bytes);
  Digest finish() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// ---- one safetensors file -----------------------------------------------------------------------

// Caps on what a header may ask of the reader.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as the safetensors library has it
inline constexpr std::size_t kMaxTensors = 1'000'000;
inline constexpr std::size_t kMaxRank = 16;

struct FileTensor {
  std::string name;
  FileDType dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t offset;  // bytes from the start of the file
  std::uint64_t bytes;
};

struct FileHeader {
  std::vector<FileTensor> tensors;                            // in the order of their bytes
  std::vector<std::pair<std::string, std::string>> metadata;  // __metadata__
  std::uint64_t bytes;                                        // length field and header text
};

// Checks the first bytes of a file that is `file_bytes` long: `start` holds at least the length
// field and the header text. `who` names the file in errors. Throws Error(kCorrupt).
FileHeader parse_file_header(std::span<const std::byte> start, std::uint64_t file_bytes,
                             std::string_view who);

struct FileOptions {
  bool mmap = true;  // map the file privately and run it from the page cache; false reads it
};

// An open file whose header has been checked. Tensors stay valid as long as the object lives.
class TensorFile {
 public:
  static std::shared_ptr<TensorFile> open(const std::string& path, const FileOptions& options = {},
                                          const Threads& threads = serial_threads());
  ~TensorFile();
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  const std::string& path() const { return path_; }
  const FileHeader& header() const { return header_; }
  const FileTensor* find(std::string_view name) const;
  std::uint64_t bytes() const;
  // The mapping is private: writing to it changes this process's copy of a page, never the file.
  std::span<std::byte> data(const FileTensor& tensor) const;
  std::span<const std::byte> header_data() const;
  // Gives the pages of bytes that will not be looked at again back to the system (they are read
  // anew if they are, changes to them are lost). Does nothing to a file that was read, not mapped.
  void release(std::span<const std::byte> bytes) const;

 private:
  struct Memory;
  TensorFile(std::string path, std::unique_ptr<Memory> memory);
  std::string path_;
  std::unique_ptr<Memory> memory_;
  FileHeader header_;
};

// ---- the manifest of a saved directory ----------------------------------------------------------

inline constexpr std::string_view kManifestName = "ipex_llm.json";
inline constexpr int kManifestVersion = 1;  // readers accept versions up to their own

// low_bit-<32 hex digits>[-00001-of-00003].safetensors, and nothing else.
bool is_weight_file_name(std::string_view name);

struct SavedFile {
  std::string name;
  std::uint64_t bytes = 0;
  Digest header;
};

struct SavedTensor {
  std::string name;                   // its state_dict name
  FileDType dtype = FileDType::kF32;  // logical element type
  std::vector<std::int64_t> shape;    // logical shape
  std::optional<Format> format;       // packed; nothing: stored as it is
  // What was packed, where that is not `shape`: the transposed matrices (a weight [inputs, outputs]
  // as GPT-2's Conv1D has it), or a reshaped weight (a convolution's [out, in * kh * kw]).
  bool transposed = false;
  std::vector<std::int64_t> stored_shape;  // empty: `shape`, transposed if so
  int group_size = 0;
  int exponent = 0;
  std::size_t file = 0;  // index into Manifest::files
  Digest digest;
};

// What a packed tensor occupies: `matrices` of `layout`, one after the other.
struct PackedShape {
  Layout layout;
  std::int64_t matrices;
  std::int64_t rows() const { return matrices * layout.tiles; }
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(rows() * layout.tile_bytes); }
};
// The last two sizes of what was packed are a matrix, the ones before count matrices. Throws
// Error(kValue).
PackedShape packed_shape(const SavedTensor& tensor);

struct Manifest {
  // A JSON object: how the model was converted, which loading needs to treat a model alike. The
  // library carries it and does not look inside.
  std::string options = "{}";
  std::vector<SavedFile> files;
  std::vector<SavedTensor> tensors;                       // by name
  std::vector<std::pair<std::string, std::string>> ties;  // further name -> name of a tensor
};

std::string write_manifest(const Manifest& manifest);
// Throws Error(kCorrupt), or Error(kValue) for one written by a newer version.
Manifest parse_manifest(std::string_view text, std::string_view who);
// The same without "format", "format_version", "files", "digest" and, per tensor, "file" and
// "digest": what a program that has the tensors knows before they are written.
Manifest parse_save_request(std::string_view text, std::string_view who);

// ---- a saved directory --------------------------------------------------------------------------

struct OpenOptions {
  bool mmap = true;
  bool verify = true;  // check every tensor's digest; those of manifest and headers always are
};

struct SavedDirectory {
  Manifest manifest;
  std::vector<std::shared_ptr<TensorFile>> files;  // as in manifest.files
  std::vector<const FileTensor*> stored;           // as in manifest.tensors, owned by `files`
  std::span<std::byte> data(std::size_t tensor) const {
    return files[manifest.tensors[tensor].file]->data(*stored[tensor]);
  }
};

// Everything is checked before this returns; digests are computed on `threads`. Throws
// Error(kNotFound) for a missing directory, manifest or file, Error(kCorrupt), Error(kValue).
SavedDirectory open_saved(const std::string& directory, const OpenOptions& options = {},
                          const Threads& threads = serial_threads());

// ---- writing ------------------------------------------------------------------------------------

struct SaveRequest {
  std::string directory;  // made if missing
  std::uint64_t max_shard_bytes = 4'000'000'000;
  Manifest manifest;  // options, tensors and ties; files, digests, exponents come
  std::vector<std::pair<std::string, std::string>>
      extra_files;  // "name" or "folder/name" -> contents
  // Not empty: what names the contents (source and options, in any form). A writer whose process is
  // killed then leaves its tensors behind, and the next one with an equal request takes them up.
  std::string resume_key;
};

// Writes a saved directory tensor by tensor in bounded memory. Nothing is visible under its final
// name, or readable as a file of tensors, before commit(); an object destroyed before that leaves
// the directory as it was.
class SaveWriter {
 public:
  explicit SaveWriter(SaveRequest request);
  ~SaveWriter();
  SaveWriter(const SaveWriter&) = delete;
  SaveWriter& operator=(const SaveWriter&) = delete;

  // The request's tensors, by name, and the order in which they must come.
  std::span<const SavedTensor> tensors() const;
  std::span<const std::size_t> order() const;
  // How many tensors of order() a killed writer of the same resume_key has left here, complete and
  // undamaged: writing starts with the one after them.
  std::size_t resumed() const;
  // Appends bytes of the next tensor; it is complete when all its bytes have come.
  void write(std::span<const std::byte> bytes);
  // Drops what has come of a tensor that is not complete: it starts anew.
  void restart_tensor();
  // Before the tensor's last bytes come: with them it is on record.
  void set_exponent(std::size_t tensor, int exponent);
  // Renames the weight files, then the manifest (the commit point), then removes files that the
  // old manifest named and stale temporary files. Returns the manifest written.
  Manifest commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The bytes of a safetensors header (length field included) for tensors that follow one another in
// this order, padded with spaces so that data starts at a multiple of 4096. Offsets are ignored.
std::string make_file_header(std::span<const FileTensor> tensors);

}  // namespace lowbit
