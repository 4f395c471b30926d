// Every operating-system call of the library is in os.cpp. Paths are UTF-8; errors are
// lowbit::Error with the path and the system's own words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lowbit::os {

// Memory of whole pages: a private mapping of a file or anonymous memory.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();
  static Memory anonymous(std::uint64_t bytes);

  std::byte* data() const { return data_; }
  std::uint64_t size() const { return size_; }
  // Of a mapped file: drops the whole pages within this range from this process.
  void release(std::uint64_t offset, std::uint64_t bytes) const noexcept;

 private:
  friend class ReadFile;
  std::byte* data_ = nullptr;
  std::uint64_t size_ = 0;
  bool mapped_file_ = false;
};

// What the allocator keeps of freed memory, to the system; nothing where it cannot be asked.
void return_freed_memory() noexcept;

// A regular file open for reading; links are followed, anything else is refused (a FIFO or a device
// would block or never end).
class ReadFile {
 public:
  explicit ReadFile(const std::string& path);
  ~ReadFile();
  ReadFile(ReadFile&& other) noexcept;
  ReadFile& operator=(ReadFile&&) = delete;

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  // Reads exactly; Error(kCorrupt) if the file has become shorter. May be called from any thread.
  void read(std::uint64_t offset, std::span<std::byte> bytes) const;
  // The first size() bytes, readable and writable, copied on write.
  Memory map() const;

 private:
  std::string path_;
  std::uint64_t size_ = 0;
  std::intptr_t handle_ = -1;
};

// The whole of a small file; Error(kCorrupt) if it is longer than `cap`.
std::string read_text(const std::string& path, std::uint64_t cap);

// Modification time in the system's own unit, to tell whether a file has changed.
std::int64_t modified(const std::string& path);

// A new file under a temporary name in `directory`, removed unless publish() is reached.
class NewFile {
 public:
  NewFile(const std::string& directory, std::uint64_t expected_bytes);
  // Under a name of the caller's choice (is_partial_name), which a killed process leaves behind and
  // the next one takes up: what the file held stays. Error(kIo) if its maker is alive.
  NewFile(const std::string& directory, std::uint64_t expected_bytes, const std::string& name);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(std::span<const std::byte> bytes);
  // What is written in order is on its way to the disk while more is made, so that sync() finds
  // little left to wait for.
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  void resize(std::uint64_t bytes);
  // How many of the wanted bytes there are: fewer where the file ends.
  std::size_t read_at(std::uint64_t offset, std::span<std::byte> bytes) const;
  void sync();                            // on disk before anything names it
  void publish(const std::string& name);  // rename within the directory, replacing atomically
  const std::string& path() const { return path_; }

 private:
  std::string directory_, path_;
  std::intptr_t handle_ = -1;
  std::uint64_t waiting_begin_ = 0, waiting_end_ = 0;  // written by write_at, not yet on its way
  bool published_ = false;
};

// One saver at a time changes names in a directory; waits for the other. The lock goes with the
// process. Where the file system has no locks, savers are on their own (docs/files.md).
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::string& directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  std::intptr_t handle_ = -1;
};

// Whether publish() can replace a file that someone has mapped. Where it cannot (Windows), a file
// of equal content is left in place instead, and one that is obsolete goes with a later save.
#ifdef _WIN32
inline constexpr bool kReplacesMappedFiles = false;
#else
inline constexpr bool kReplacesMappedFiles = true;
#endif

// Makes the directory and its parents; returns those that did not exist, outermost first.
std::vector<std::string> make_directories(const std::string& path);
void remove_directory_if_empty(const std::string& path) noexcept;
void sync_directory(const std::string& path);
bool exists(const std::string& path);
std::vector<std::string> list_directory(const std::string& path);  // names, sorted
// Removing is never worth failing a save for: false if it did not work.
bool remove_file(const std::string& path) noexcept;
// Removes temporary and partial files whose maker is no longer alive, except partial ones whose
// name starts with `kept`.
void remove_stale_files(const std::string& directory, std::string_view kept = {}) noexcept;

// ".lowbit-<16 hex digits>" and a tail that ends in ".part": files that outlive a kill.
std::string partial_name(std::uint64_t key, std::string_view tail);

std::string join(const std::string& directory, std::string_view name);

// Called before each step that changes the file system, with the step's name ("create", "write",
// "sync", "rename", "remove", "sync directory", "make directory"). Tests throw or kill here.
void set_fault_hook(std::function<void(std::string_view step)> hook);

}  // namespace lowbit::os
