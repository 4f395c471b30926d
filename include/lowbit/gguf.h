// GGUF, the file format of llama.cpp: read as strictly as any file of strangers (docs/security.md),
// its block types unpacked, and those with a counterpart among ours packed without rounding
// (docs/gguf.md). Paths are UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "lowbit/file.h"
#include "lowbit/format.h"
#include "lowbit/quantize.h"
#include "lowbit/threads.h"

namespace lowbit {

// ---- types -------------------------------------------------------------------------------------

// How a tensor is stored. A row of K inputs is K / block_elems blocks of block_bytes.
struct GgmlTypeInfo {
  std::uint32_t number;   // as files write it
  std::string_view name;  // "Q4_K"
  int block_elems;
  int block_bytes;
  bool has_values;  // whether ggml_dequantize knows it; the others are only listed
  // The format whose codes and scales are those of the blocks, at this group size: ggml_pack.
  std::optional<Format> exact;
  int exact_group_size;
};

std::span<const GgmlTypeInfo> ggml_types();                // ascending numbers
const GgmlTypeInfo* find_ggml_type(std::uint32_t number);  // nullptr: unknown
const GgmlTypeInfo& ggml_type_info(std::uint32_t number);  // throws Error(kValue)

// Matrices in blocks: `blocks` holds n rows of k inputs one after the other.
struct GgmlMatrix {
  std::span<const std::byte> blocks;
  std::uint32_t type;
  std::int64_t n, k;
};

// Unpacks `matrix` into `out`: row i of `out` is row rows[i] of the matrix, all rows in order where
// `rows` is empty. Float32 as ggml computes them, then rounded to out.dtype. Throws Error(kValue)
// for sizes that do not go together, a row outside [0, n), and a type without values.
void ggml_dequantize(const GgmlMatrix& matrix, std::span<const std::int64_t> rows,
                     const MutableMatrixView& out, const Threads& threads = serial_threads());

// Packs rows of `matrix` (chosen as above; layout.n of them) into `packed` without rounding
// anything and returns the exponent, if the layout is that of the type's `exact` format and these
// blocks have a lossless counterpart; nothing, with `packed` undefined, if they have not: a scale
// that is not finite, a Q8_0 code of -128, MXFP4 scales further apart than fp16 reaches.
std::optional<int> ggml_pack(const GgmlMatrix& matrix, std::span<const std::int64_t> rows,
                             const Layout& layout, std::span<std::byte> packed,
                             const Threads& threads = serial_threads());

// The inverse, for writing Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4, F16 and BF16: blocks from rows of a
// packed matrix of the type's `exact` format, of any group size (a scale is repeated in the blocks
// of its group). False, with `blocks` undefined, if the type cannot hold these weights without
// rounding: fp4 scales that are no powers of two, an exponent that no scale can take in. Throws
// Error(kValue) for sizes and formats that do not go together.
bool ggml_unpack(std::span<const std::byte> packed, const Layout& layout, int exponent,
                 std::span<const std::int64_t> rows, std::uint32_t type,
                 std::span<std::byte> blocks, const Threads& threads = serial_threads());

// ---- files --------------------------------------------------------------------------------------

// Caps on what a header may ask of the reader, beside kMaxTensors.
inline constexpr std::uint64_t kMaxGgufHeaderBytes = std::uint64_t{1} << 28;
inline constexpr std::uint64_t kMaxGgufEntries = 1'000'000;  // metadata
inline constexpr std::uint64_t kMaxGgufValues =
    10'000'000;  // metadata, elements of arrays included
inline constexpr std::uint64_t kMaxGgufString = std::uint64_t{1} << 24;
inline constexpr std::uint64_t kMaxGgufName = 65535;  // of keys and tensors
inline constexpr int kMaxGgufDepth = 4;               // arrays in arrays
inline constexpr std::uint32_t kMaxGgufRank = 4;
inline constexpr std::uint32_t kMaxGgufAlignment = 1 << 20;
inline constexpr std::uint32_t kOldestGguf = 2, kNewestGguf = 3;

struct GgufValue;
struct GgufArray {
  std::uint32_t type = 0;  // of the elements, as files number them
  std::vector<GgufValue> values;
};
struct GgufValue {
  std::variant<std::uint64_t, std::int64_t, double, bool, std::string, GgufArray> value;
};

struct GgufTensor {
  std::string name;
  std::uint32_t type;
  std::vector<std::int64_t> shape;  // outermost first, as torch has it: [n, k]
  std::uint64_t offset;             // bytes from the start of the file
  std::uint64_t bytes;
};

struct GgufHeader {
  std::uint32_t version = 0;
  std::uint32_t alignment = 32;
  std::uint64_t bytes = 0;                                  // up to the first tensor
  std::vector<std::pair<std::string, GgufValue>> metadata;  // in file order
  std::vector<GgufTensor> tensors;                          // in the order of their bytes
  const GgufValue* find(std::string_view key) const;
};

// Checks the first bytes of a file that is `file_bytes` long: `start` holds at least the header.
// `who` names the file in errors. Throws Error(kCorrupt), or Error(kValue) for a version or byte
// order that is not read.
GgufHeader parse_gguf_header(std::span<const std::byte> start, std::uint64_t file_bytes,
                             std::string_view who);

// The header as a JSON object: "version", "alignment", "metadata" (arrays as {"array": type number,
// "length": n}, numbers that are not finite as null) and "tensors" by name, in the order of their
// bytes, each with "type", "number", "shape" and "bytes".
std::string describe_gguf(const GgufHeader& header);

// A small GGUF file that says the same of a model's configuration, for readers that take long over
// the rest: the metadata, of whose arrays below "tokenizer." the first kOutlineElements stay, the
// names of the tensors, each one float32, and their order. Numbers have their widest type;
// "general.alignment" is left out, because the data is another.
inline constexpr std::size_t kOutlineElements = 2;
std::string outline_gguf(const GgufHeader& header);

// An open file whose header has been checked. Tensors stay valid as long as the object lives.
class GgufFile {
 public:
  static std::shared_ptr<GgufFile> open(const std::string& path, const FileOptions& options = {});
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const { return path_; }
  const GgufHeader& header() const { return header_; }
  std::uint64_t bytes() const;
  std::span<std::byte> data(const GgufTensor& tensor) const;  // a private mapping, as TensorFile's

 private:
  struct Memory;
  GgufFile(std::string path, std::unique_ptr<Memory> memory);
  std::string path_;
  std::unique_ptr<Memory> memory_;
  GgufHeader header_;
};

// A model in one file or, as llama.cpp splits it, in several: `path` is then the first, called
// "<name>-00001-of-<count>.gguf", and the others lie beside it. Throws as GgufFile::open, and
// Error(kCorrupt) for files that do not belong together or hold a tensor twice.
class GgufModel {
 public:
  static GgufModel open(const std::string& path, const FileOptions& options = {});

  const std::vector<std::shared_ptr<GgufFile>>& files() const { return files_; }
  // The metadata of the first file without what says how it is split, and all tensors; their
  // offsets are those in their own files.
  const GgufHeader& header() const { return header_; }

 private:
  std::vector<std::shared_ptr<GgufFile>> files_;
  GgufHeader header_;
};

}  // namespace lowbit
