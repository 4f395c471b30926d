// Writing a saved directory. Order of the steps, each of which may be the last one before a crash:
//
//   write the data of weight files under temporary names, then their headers, sync them
//   lock the directory
//   rename weight files to names that carry their content  (nobody reads them yet)
//   write and rename extra files; sync the directory
//   rename the manifest                                     (the commit point)
//   sync the directory, remove what the new manifest does not name
//
// Names carry the content's digest, so the files of the old save are never overwritten with
// anything else, and one that is mapped by this very process stays as it is.
//
// A request with a resume_key writes under names made of it instead of random ones, and keeps a
// journal beside: a line per complete tensor. After a kill the next writer of the same request
// reads the journal, digests what the lines speak of, and goes on behind the last tensor that is
// right.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <set>

#include "io/json.h"
#include "io/os.h"
#include "lowbit/error.h"
#include "lowbit/file.h"

namespace lowbit {
namespace {

using NewFiles = std::vector<std::unique_ptr<os::NewFile>>;

struct Shard {
  std::vector<std::size_t> tensors;  // indices into the manifest
  std::string header;
  std::uint64_t bytes = 0;  // of the whole file
};

FileTensor stored_as(const SavedTensor& tensor) {
  FileTensor stored{tensor.name, tensor.dtype, tensor.shape, 0, 0};
  if (tensor.format) {
    PackedShape packed = packed_shape(tensor);
    stored.dtype = FileDType::kU8;
    stored.shape = {packed.rows(), packed.layout.tile_bytes};
    stored.bytes = packed.bytes();
  } else {
    std::optional<std::uint64_t> bytes = tensor_bytes(tensor.dtype, tensor.shape);
    if (!bytes) throw Error(ErrorCode::kValue, tensor.name + ": its byte count leaves 63 bits");
    stored.bytes = *bytes;
  }
  return stored;
}

void check_request(const SaveRequest& request) {
  std::set<std::string_view> names;
  for (const SavedTensor& tensor : request.manifest.tensors) {
    if (tensor.name.empty() || !json::valid_utf8(tensor.name) ||
        tensor.name.find('\0') != std::string::npos || tensor.name == "__metadata__")
      throw Error(ErrorCode::kValue, "save: " + json::quote(tensor.name) +
                                         " cannot be a tensor's name in a file; rename the module");
    if (tensor.shape.size() > kMaxRank)
      throw Error(ErrorCode::kValue, "save: tensor " + json::quote(tensor.name) + " has " +
                                         std::to_string(tensor.shape.size()) +
                                         " dimensions, at most " + std::to_string(kMaxRank) +
                                         " can be saved");
    if (!names.insert(tensor.name).second)
      throw Error(ErrorCode::kValue,
                  "save: tensor " + json::quote(tensor.name) + " is given twice");
  }
  for (const auto& [alias, target] : request.manifest.ties)
    if (names.contains(alias) || !names.contains(target))
      throw Error(ErrorCode::kValue, "save: " + json::quote(alias) + " is tied to " +
                                         json::quote(target) + ", expected a tensor that is saved");
  for (const auto& file : request.extra_files) {
    // As strict as every system we load on: no drive letters, no "..", one folder at most.
    auto plain = [](std::string_view name) {
      return !name.empty() && name.find_first_of("/\\:") == std::string_view::npos &&
             name[0] != '.';
    };
    const std::string& name = file.first;
    const std::size_t slash = name.find('/');
    const bool right = slash == std::string::npos
                           ? plain(name) && name != kManifestName && !is_weight_file_name(name)
                           : plain(std::string_view(name).substr(0, slash)) &&
                                 plain(std::string_view(name).substr(slash + 1));
    if (!right)
      throw Error(ErrorCode::kValue,
                  "save: " + json::quote(name) + " cannot be the name of an extra file");
  }
  if (request.max_shard_bytes == 0)
    throw Error(ErrorCode::kValue, "save: max_shard_size is 0, expected at least 1 byte");
}

// Packed tensors first: every one is a multiple of 64 bytes, so all of them stay 64-byte aligned.
// Then what else is a multiple of 64, then the rest with falling element size, so that each is
// aligned to its own elements.
int alignment_class(const SavedTensor& tensor, const FileTensor& stored) {
  if (tensor.format) return 0;
  if (stored.bytes % kUnitBytes == 0) return 1;
  return 2 + 8 - file_dtype_info(stored.dtype).bytes;
}

std::string shard_name(const Digest& content, std::size_t index, std::size_t count) {
  std::string name = "low_bit-" + digest_text(content);
  if (count > 1) {
    char part[32];
    std::snprintf(part, sizeof part, "-%05zu-of-%05zu", index + 1, count);
    name += part;
  }
  return name + ".safetensors";
}

// Whether the file at `path` holds these tensors, undamaged.
[[maybe_unused]] bool holds_same(const std::string& path, const Manifest& manifest,
                                 const std::vector<std::size_t>& tensors) {
  try {
    std::shared_ptr<TensorFile> file = TensorFile::open(path);
    const SavedFile& expected = manifest.files[manifest.tensors[tensors.front()].file];
    if (file->bytes() != expected.bytes || digest(file->header_data()) != expected.header)
      return false;
    return std::all_of(tensors.begin(), tensors.end(), [&](std::size_t index) {
      const FileTensor* entry = file->find(manifest.tensors[index].name);
      return entry && digest(file->data(*entry)) == manifest.tensors[index].digest;
    });
  } catch (const Error&) {
    return false;
  }
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::string base_name(const std::string& name) {
  return name.substr(name.find('/') + 1);  // npos + 1 is 0
}

constexpr std::size_t kMaxJournalLine = 64;

struct JournalLine {
  std::size_t position;  // in the order of writing
  Digest digest;
  int exponent;
};

std::string journal_line(std::size_t position, const SavedTensor& tensor, const Digest& digest) {
  return std::to_string(position) + " " + digest_text(digest) + " " +
         std::to_string(tensor.exponent) + "\n";
}

std::optional<JournalLine> parse_journal_line(const std::string& line) {
  JournalLine entry;
  char hex[33];
  int end = 0;
  if (std::sscanf(line.c_str(), "%zu %32[0-9a-f] %d%n", &entry.position, hex, &entry.exponent,
                  &end) != 3 ||
      end != static_cast<int>(line.size()))
    return std::nullopt;
  std::optional<Digest> digest = parse_digest(hex);
  if (!digest) return std::nullopt;
  entry.digest = *digest;
  return entry;
}

// Of `bytes` bytes from `start` on; of nothing if the file ends before.
std::optional<Digest> digest_in_file(const os::NewFile& file, std::uint64_t start,
                                     std::uint64_t bytes) {
  Hasher hasher;
  std::vector<std::byte> buffer(static_cast<std::size_t>(std::min<std::uint64_t>(bytes, 1 << 20)));
  for (std::uint64_t at = 0; at < bytes;) {
    std::span<std::byte> piece(
        buffer.data(), static_cast<std::size_t>(std::min<std::uint64_t>(bytes - at, 1 << 20)));
    if (file.read_at(start + at, piece) != piece.size()) return std::nullopt;
    hasher.update(piece);
    at += piece.size();
  }
  return hasher.finish();
}

}  // namespace

struct SaveWriter::State {
  SaveRequest request;
  std::vector<FileTensor> stored;  // as in request.manifest.tensors
  std::vector<std::size_t> order;
  std::vector<Shard> shards;
  NewFiles files;  // finished or in work, as in shards
  std::vector<std::string> made_directories;
  std::size_t at = 0;     // position in order
  std::size_t shard = 0;  // of order[at]
  std::size_t in_shard = 0;
  std::uint64_t start = 0;    // of order[at] in its file
  std::uint64_t written = 0;  // bytes of order[at]
  Hasher hasher;
  bool committed = false;
  // Of a request that can be resumed.
  Digest key;
  std::size_t resumed = 0;
  std::unique_ptr<os::NewFile> journal;
  std::uint64_t journal_bytes = 0;

  // Opens the next shard's file if needed and closes tensors that are complete.
  void settle();
  void open_shard();
  void next_tensor(const Digest& digest);
  void open_journal();
  // The steps of commit().
  void finish_files();
  NewFiles write_extras();
  void publish(const NewFiles& extras, os::NewFile& new_manifest);
  void remove_obsolete();
};

SaveWriter::SaveWriter(SaveRequest request) : state_(std::make_unique<State>()) {
  check_request(request);
  State& s = *state_;
  s.request = std::move(request);
  std::vector<SavedTensor>& tensors = s.request.manifest.tensors;
  std::sort(tensors.begin(), tensors.end(),
            [](const SavedTensor& a, const SavedTensor& b) { return a.name < b.name; });
  std::sort(s.request.manifest.ties.begin(), s.request.manifest.ties.end());
  for (SavedTensor& tensor : tensors) {
    s.stored.push_back(stored_as(tensor));
    tensor.group_size = tensor.format ? packed_shape(tensor).layout.group_size : 0;
  }
  s.order.resize(tensors.size());
  std::iota(s.order.begin(), s.order.end(), std::size_t{0});
  std::stable_sort(s.order.begin(), s.order.end(), [&](std::size_t a, std::size_t b) {
    return alignment_class(tensors[a], s.stored[a]) < alignment_class(tensors[b], s.stored[b]);
  });

  std::uint64_t data = 0;
  for (std::size_t index : s.order) {
    std::uint64_t bytes = s.stored[index].bytes;
    if (s.shards.empty() || (data > 0 && data + bytes > s.request.max_shard_bytes)) {
      s.shards.emplace_back();
      data = 0;
    }
    s.shards.back().tensors.push_back(index);
    data += bytes;
  }
  if (s.shards.size() > 99999)
    throw Error(ErrorCode::kValue, "save: max_shard_size gives " + std::to_string(s.shards.size()) +
                                       " files, at most 99999 can be named; use a larger one");
  for (std::size_t i = 0; i < s.shards.size(); ++i) {
    Shard& shard = s.shards[i];
    std::vector<FileTensor> entries;
    for (std::size_t index : shard.tensors) {
      entries.push_back(s.stored[index]);
      tensors[index].file = i;
    }
    shard.header = make_file_header(entries);
    shard.bytes = shard.header.size();
    for (const FileTensor& entry : entries) shard.bytes += entry.bytes;
  }

  s.made_directories = os::make_directories(s.request.directory);
  try {
    if (!s.request.resume_key.empty()) s.open_journal();
    s.settle();
  } catch (...) {
    // The destructor of a half-constructed object does not run.
    s.files.clear();
    s.journal.reset();
    for (std::size_t i = s.made_directories.size(); i-- > 0;)
      os::remove_directory_if_empty(s.made_directories[i]);
    throw;
  }
}

SaveWriter::~SaveWriter() {
  if (!state_ || state_->committed) return;
  state_->files.clear();  // removes the temporary files
  state_->journal.reset();
  for (std::size_t i = state_->made_directories.size(); i-- > 0;)
    os::remove_directory_if_empty(state_->made_directories[i]);
}

std::span<const SavedTensor> SaveWriter::tensors() const {
  return state_->request.manifest.tensors;
}

std::span<const std::size_t> SaveWriter::order() const {
  return state_->order;
}

void SaveWriter::set_exponent(std::size_t tensor, int exponent) {
  state_->request.manifest.tensors[tensor].exponent = exponent;
}

std::size_t SaveWriter::resumed() const {
  return state_->resumed;
}

void SaveWriter::State::next_tensor(const Digest& digest) {
  request.manifest.tensors[order[at]].digest = digest;
  hasher = Hasher();
  start += stored[order[at]].bytes;
  written = 0;
  ++at;
  if (++in_shard == shards[shard].tensors.size()) {
    ++shard;
    in_shard = 0;
  }
}

void SaveWriter::State::open_shard() {
  // Under the lock no other saver can take the new file for a dead one's.
  os::DirectoryLock lock(request.directory);
  std::uint64_t bytes = shards[shard].bytes;
  if (journal) {
    char tail[16];
    std::snprintf(tail, sizeof tail, "-%05zu", shard + 1);
    files.push_back(
        std::make_unique<os::NewFile>(request.directory, bytes, os::partial_name(key.high, tail)));
  } else {
    files.push_back(std::make_unique<os::NewFile>(request.directory, bytes));
  }
  // The header comes last: until then the file starts with zeros, which no reader takes.
  start = shards[shard].header.size();
}

void SaveWriter::State::settle() {
  while (at < order.size()) {
    if (files.size() == shard) open_shard();
    if (written < stored[order[at]].bytes) return;
    Digest digest = hasher.finish();
    if (journal) {
      std::string line = journal_line(at, request.manifest.tensors[order[at]], digest);
      journal->write_at(journal_bytes, bytes_of(line));
      journal_bytes += line.size();
    }
    next_tensor(digest);
  }
}

// The journal: the key, then a line per complete tensor. What it says is believed for as long as
// the digests of the data agree; a line is written after its tensor, but a machine that loses power
// may keep the one without the other.
void SaveWriter::State::open_journal() {
  std::string text = "lowbit " + std::to_string(kManifestVersion) + "\n" + request.resume_key +
                     "\n" + request.manifest.options + "\n";
  for (const Shard& one : shards) text += digest_text(digest(bytes_of(one.header)));
  for (const SavedTensor& tensor : request.manifest.tensors) {
    text += file_dtype_info(tensor.dtype).torch_name;
    text += tensor.format ? format_info(*tensor.format).name : "-";
    text += std::to_string(tensor.group_size) + (tensor.transposed ? "t" : "-");
  }
  key = digest(bytes_of(text));
  const std::string head = "lowbit " + digest_text(key) + "\n";
  {
    os::DirectoryLock lock(request.directory);
    // Another source's or other options' left-overs are of no use any more.
    os::remove_stale_files(request.directory, os::partial_name(key.high, "").substr(0, 24));
    journal =
        std::make_unique<os::NewFile>(request.directory, 0, os::partial_name(key.high, "-journal"));
  }

  std::string said(head.size() + order.size() * kMaxJournalLine, '\0');
  said.resize(journal->read_at(0, std::as_writable_bytes(std::span(said))));
  std::string good = head;
  if (said.starts_with(head)) {
    std::size_t line = head.size();
    while (at < order.size()) {
      std::size_t end = said.find('\n', line);
      if (end == std::string::npos) break;
      std::optional<JournalLine> entry = parse_journal_line(said.substr(line, end - line));
      if (!entry || entry->position != at) break;
      if (files.size() == shard) open_shard();
      if (digest_in_file(*files[shard], start, stored[order[at]].bytes) != entry->digest) break;
      request.manifest.tensors[order[at]].exponent = entry->exponent;
      good += said.substr(line, end + 1 - line);
      next_tensor(entry->digest);
      line = end + 1;
    }
  }
  resumed = at;
  journal_bytes = good.size();
  if (!said.starts_with(good)) journal->write_at(0, bytes_of(good));
  journal->resize(journal_bytes);
}

void SaveWriter::restart_tensor() {
  state_->written = 0;
  state_->hasher = Hasher();
}

void SaveWriter::write(std::span<const std::byte> bytes) {
  State& s = *state_;
  if (bytes.empty()) return;
  if (s.at == s.order.size())
    throw Error(ErrorCode::kValue, "save: " + std::to_string(bytes.size()) +
                                       " bytes after the last tensor was complete");
  const FileTensor& tensor = s.stored[s.order[s.at]];
  if (bytes.size() > tensor.bytes - s.written)
    throw Error(ErrorCode::kValue, "save: tensor " + json::quote(tensor.name) + ": got " +
                                       std::to_string(s.written + bytes.size()) +
                                       " bytes, expected " + std::to_string(tensor.bytes));
  s.files[s.shard]->write_at(s.start + s.written, bytes);
  s.hasher.update(bytes);
  s.written += bytes.size();
  s.settle();
}

// Headers, which make the files loadable, and names, which carry the content.
void SaveWriter::State::finish_files() {
  Manifest& manifest = request.manifest;
  manifest.files.clear();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    files[i]->write_at(0, bytes_of(shards[i].header));
    files[i]->sync();
    SavedFile file;
    file.bytes = shards[i].bytes;
    file.header = digest(bytes_of(shards[i].header));
    // The header names every tensor and its place; with the tensors' digests that is all there is.
    Hasher content;
    std::string text = digest_text(file.header);
    for (std::size_t index : shards[i].tensors) text += digest_text(manifest.tensors[index].digest);
    content.update(bytes_of(text));
    file.name = shard_name(content.finish(), i, shards.size());
    manifest.files.push_back(file);
  }
}

NewFiles SaveWriter::State::write_extras() {
  NewFiles extras;
  for (const auto& [name, contents] : request.extra_files) {
    std::string folder = request.directory;
    if (std::size_t slash = name.find('/'); slash != std::string::npos) {
      folder = os::join(request.directory, name.substr(0, slash));
      for (std::string& made : os::make_directories(folder)) made_directories.push_back(made);
    }
    extras.push_back(std::make_unique<os::NewFile>(folder, 0));
    extras.back()->write(bytes_of(contents));
    extras.back()->sync();
  }
  return extras;
}

// The manifest last. On an error the directory has the names that it had before.
void SaveWriter::State::publish(const NewFiles& extras, os::NewFile& new_manifest) {
  const std::string& directory = request.directory;
  std::vector<std::string> published;  // names that did not exist before
  try {
    for (std::size_t i = 0; i < files.size(); ++i) {
      const std::string& name = request.manifest.files[i].name;
      std::string path = os::join(directory, name);
      bool existed = os::exists(path);
      if (!os::kReplacesMappedFiles && existed &&
          holds_same(path, request.manifest, shards[i].tensors)) {
        continue;
      }
      files[i]->publish(name);
      if (!existed) published.push_back(path);
    }
    for (std::size_t i = 0; i < extras.size(); ++i) {
      const std::string& name = request.extra_files[i].first;
      bool existed = os::exists(os::join(directory, name));
      extras[i]->publish(base_name(name));
      if (!existed) published.push_back(os::join(directory, name));
    }
    os::sync_directory(directory);
    new_manifest.publish(std::string(kManifestName));
  } catch (...) {
    for (const std::string& path : published) os::remove_file(path);
    throw;
  }
}

// What the manifest does not name, and what dead savers left.
void SaveWriter::State::remove_obsolete() {
  const std::string& directory = request.directory;
  try {
    std::set<std::string_view> kept;
    for (const SavedFile& file : request.manifest.files) kept.insert(file.name);
    for (const std::string& name : os::list_directory(directory))
      if (is_weight_file_name(name) && !kept.contains(name))
        os::remove_file(os::join(directory, name));
    os::remove_stale_files(directory);
    for (const auto& file : request.extra_files)
      if (std::size_t slash = file.first.find('/'); slash != std::string::npos)
        os::remove_stale_files(os::join(directory, file.first.substr(0, slash)));
  } catch (const Error&) {
    // The save is complete; what could not be removed goes with the next one.
  }
}

Manifest SaveWriter::commit() {
  State& s = *state_;
  if (s.committed) throw Error(ErrorCode::kValue, "save: already committed");
  if (s.at != s.order.size())
    throw Error(ErrorCode::kValue,
                "save: tensor " + json::quote(s.stored[s.order[s.at]].name) + " is not complete");
  const std::string& directory = s.request.directory;
  s.finish_files();
  std::string text = write_manifest(s.request.manifest);

  os::DirectoryLock lock(directory);
  NewFiles extras = s.write_extras();
  os::NewFile new_manifest(directory, 0);
  new_manifest.write(bytes_of(text));
  new_manifest.sync();
  s.journal.reset();  // nothing is left to resume once names change
  s.publish(extras, new_manifest);
  s.committed = true;
  s.files.clear();
  os::sync_directory(directory);
  s.remove_obsolete();
  return s.request.manifest;
}

}  // namespace lowbit
