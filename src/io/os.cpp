#include "io/os.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <system_error>

#include "lowbit/error.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX  // libstdc++ of mingw has it already
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace lowbit::os {
namespace {

[[maybe_unused]] constexpr std::uint64_t kHugePageBytes = 2 << 20;
[[maybe_unused]] constexpr std::uint64_t kWriteBehindBytes = 16 << 20;

constexpr std::string_view kTemporaryPrefix = ".lowbit-";
constexpr std::string_view kTemporarySuffix = ".tmp";

std::function<void(std::string_view)>& fault_hook() {
  static std::function<void(std::string_view)> hook;
  return hook;
}

void step(std::string_view name) {
  if (fault_hook()) fault_hook()(name);
}

std::filesystem::path to_path(const std::string& utf8) {
#ifdef _WIN32
  return std::filesystem::path(
      std::u8string(reinterpret_cast<const char8_t*>(utf8.data()), utf8.size()));
#else
  return std::filesystem::path(utf8);
#endif
}

std::string from_path(const std::filesystem::path& path) {
#ifdef _WIN32
  std::u8string text = path.u8string();
  return std::string(reinterpret_cast<const char*>(text.data()), text.size());
#else
  return path.string();
#endif
}

bool no_space(std::error_code code) {
  if (code == std::errc::no_space_on_device || code == std::errc::file_too_large) return true;
#if !defined(_WIN32) && defined(EDQUOT)
  if (code.value() == EDQUOT) return true;
#endif
  return false;
}

[[noreturn]] void raise(const std::string& what, const std::string& path, std::error_code code) {
  std::string text = path + ": cannot " + what + ": " + code.message();
  if (code == std::errc::no_such_file_or_directory || code == std::errc::not_a_directory)
    throw Error(ErrorCode::kNotFound, text + "; check the path");
  if (no_space(code)) throw Error(ErrorCode::kIo, text + "; free some space or save elsewhere");
  if (code == std::errc::permission_denied || code == std::errc::read_only_file_system ||
      code == std::errc::operation_not_permitted)
    throw Error(ErrorCode::kIo, text + "; check the permissions of the file and its directory");
  if (code == std::errc::not_enough_memory)
    throw Error(ErrorCode::kResource, text + "; close other programs or load with mmap=False");
  throw Error(ErrorCode::kIo, text);
}

std::error_code last_error() {
#ifdef _WIN32
  return std::error_code(static_cast<int>(GetLastError()), std::system_category());
#else
  return std::error_code(errno, std::generic_category());
#endif
}

[[noreturn]] void not_regular(const std::string& path, const char* kind) {
  throw Error(ErrorCode::kIo, path + ": is " + kind +
                                  ", expected a regular file; give the path of a file or of a "
                                  "link to one");
}

[[noreturn]] void became_shorter(const std::string& path, std::uint64_t size) {
  throw Error(ErrorCode::kCorrupt, path + ": had " + std::to_string(size) +
                                       " bytes when it was opened and has fewer now; is another "
                                       "program writing it?");
}

std::string temporary_name() {
  // random_device alone may repeat on some platforms; the counter makes names distinct here.
  static std::atomic<std::uint64_t> counter{0};
  std::random_device device;
  std::uint64_t value = (std::uint64_t{device()} << 32 | device()) + counter++;
  constexpr char hex[] = "0123456789abcdef";
  std::string name(kTemporaryPrefix);
  for (int i = 60; i >= 0; i -= 4) name.push_back(hex[value >> i & 15]);
  return name.append(kTemporarySuffix);
}

constexpr std::string_view kPartialSuffix = ".part";

bool is_partial_name(std::string_view name) {
  return name.starts_with(kTemporaryPrefix) && name.ends_with(kPartialSuffix) &&
         name.size() > kTemporaryPrefix.size() + 16 + kPartialSuffix.size();
}

bool is_temporary_name(std::string_view name) {
  return name.starts_with(kTemporaryPrefix) && name.ends_with(kTemporarySuffix) &&
         name.size() == kTemporaryPrefix.size() + 16 + kTemporarySuffix.size();
}

// What the next saver may take away, once no process holds it.
bool is_left_over(std::string_view name, std::string_view kept) {
  return is_temporary_name(name) ||
         (is_partial_name(name) && (kept.empty() || !name.starts_with(kept)));
}

[[noreturn]] void in_use(const std::string& path) {
  throw Error(ErrorCode::kIo, path +
                                  ": another process is writing this file; wait until it is "
                                  "done");
}

}  // namespace

std::string partial_name(std::uint64_t key, std::string_view tail) {
  constexpr char hex[] = "0123456789abcdef";
  std::string name(kTemporaryPrefix);
  for (int i = 60; i >= 0; i -= 4) name.push_back(hex[key >> i & 15]);
  return name.append(tail).append(kPartialSuffix);
}

void set_fault_hook(std::function<void(std::string_view)> hook) {
  fault_hook() = std::move(hook);
}

std::string join(const std::string& directory, std::string_view name) {
  return from_path(to_path(directory) / to_path(std::string(name)));
}

// ---- the same on every system ------------------------------------------------------------------

Memory::Memory(Memory&& other) noexcept {
  *this = std::move(other);
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_file_, other.mapped_file_);
  return *this;
}

ReadFile::ReadFile(ReadFile&& other) noexcept
    : path_(std::move(other.path_)), size_(other.size_), handle_(other.handle_) {
  other.handle_ = -1;
}

std::string read_text(const std::string& path, std::uint64_t cap) {
  ReadFile file(path);
  if (file.size() > cap)
    throw Error(ErrorCode::kCorrupt, path + ": has " + std::to_string(file.size()) +
                                         " bytes, expected at most " + std::to_string(cap) +
                                         "; is this the right file?");
  std::string text(file.size(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

std::vector<std::string> make_directories(const std::string& path) {
  std::vector<std::string> made;
  std::error_code code;
  std::filesystem::path missing = to_path(path);
  while (!missing.empty() && !std::filesystem::exists(missing, code)) {
    made.insert(made.begin(), from_path(missing));
    std::filesystem::path parent = missing.parent_path();
    if (parent == missing) break;
    missing = parent;
  }
  for (std::size_t i = 0; i < made.size(); ++i) {
    step("make directory");
    // Another saver may make it at the same time: that is no error.
    if (!std::filesystem::create_directory(to_path(made[i]), code) && code) {
      for (std::size_t j = i; j-- > 0;) remove_directory_if_empty(made[j]);
      raise("make the directory", made[i], code);
    }
  }
  if (!std::filesystem::is_directory(to_path(path), code))
    throw Error(ErrorCode::kIo, path + ": is not a directory; give the path of one or of nothing");
  return made;
}

void remove_directory_if_empty(const std::string& path) noexcept {
  std::error_code code;
  std::filesystem::remove(to_path(path), code);  // refuses a directory that is not empty
}

std::int64_t modified(const std::string& path) {
  std::error_code code;
  auto time = std::filesystem::last_write_time(to_path(path), code);
  if (code) raise("examine", path, code);
  return static_cast<std::int64_t>(time.time_since_epoch().count());
}

bool exists(const std::string& path) {
  std::error_code code;
  return std::filesystem::exists(to_path(path), code);
}

std::vector<std::string> list_directory(const std::string& path) {
  std::vector<std::string> names;
  std::error_code code;
  auto it = std::filesystem::directory_iterator(to_path(path), code);
  if (code) raise("list the directory", path, code);
  for (; it != std::filesystem::directory_iterator(); it.increment(code)) {
    if (code) raise("list the directory", path, code);
    names.push_back(from_path(it->path().filename()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool remove_file(const std::string& path) noexcept {
  try {
    step("remove");
    std::error_code code;
    return std::filesystem::remove(to_path(path), code);
  } catch (...) {
    return false;
  }
}

NewFile::~NewFile() {
  if (published_) return;
#ifdef _WIN32
  if (handle_ != -1) CloseHandle(reinterpret_cast<HANDLE>(handle_));
#else
  if (handle_ != -1) ::close(static_cast<int>(handle_));
#endif
  std::error_code code;
  std::filesystem::remove(to_path(path_), code);
}

void return_freed_memory() noexcept {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

#ifndef _WIN32

// ---- POSIX -------------------------------------------------------------------------------------

Memory::~Memory() {
  if (data_) ::munmap(data_, size_);
}

void Memory::release(std::uint64_t offset, std::uint64_t bytes) const noexcept {
  if (!mapped_file_) return;  // anonymous memory would come back as zeros
  const std::uint64_t page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t begin = (offset + page - 1) / page * page,
                      end = (offset + bytes) / page * page;
  if (begin < end) ::madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

Memory Memory::anonymous(std::uint64_t bytes) {
  Memory memory;
  const auto get = [](std::uint64_t size) {
    return ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  };
  void* data = get(bytes);
  const auto past = [&] { return reinterpret_cast<std::uintptr_t>(data) % kHugePageBytes; };
  if (bytes >= kHugePageBytes && data != MAP_FAILED && past() != 0) {
    // A huge page starts at a multiple of its size, which older kernels do not see to.
    ::munmap(data, bytes);
    data = get(bytes + kHugePageBytes);
    if (data != MAP_FAILED) {
      const std::uint64_t front = past() != 0 ? kHugePageBytes - past() : 0;
      const std::uint64_t page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
      const std::uint64_t end = front + (bytes + page - 1) / page * page;
      std::byte* begin = static_cast<std::byte*>(data);
      if (front != 0) ::munmap(begin, front);
      if (end < bytes + kHugePageBytes) ::munmap(begin + end, bytes + kHugePageBytes - end);
      data = begin + front;
    }
  }
  if (data == MAP_FAILED)
    throw Error(ErrorCode::kResource, "cannot get " + std::to_string(bytes) +
                                          " bytes of memory: " + last_error().message() +
                                          "; load with mmap=True or close other programs");
#ifdef MADV_HUGEPAGE
  ::madvise(data, bytes, MADV_HUGEPAGE);  // a fifth more tokens per second; may be refused
#endif
  memory.data_ = static_cast<std::byte*>(data);
  memory.size_ = bytes;
  return memory;
}

ReadFile::ReadFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK opening a FIFO would wait for a writer; regular files ignore it.
  int fd;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) raise("open", path, last_error());
  handle_ = fd;
  struct stat info;
  const char* kind = nullptr;
  std::error_code code;
  if (::fstat(fd, &info) != 0) {
    code = last_error();
  } else if (S_ISDIR(info.st_mode)) {
    kind = "a directory";
  } else if (!S_ISREG(info.st_mode)) {
    kind = "a device, pipe or socket";
  }
  if (code || kind) {
    ::close(fd);
    handle_ = -1;
    if (code) raise("examine", path, code);
    not_regular(path, kind);
  }
  size_ = static_cast<std::uint64_t>(info.st_size);
}

ReadFile::~ReadFile() {
  if (handle_ != -1) ::close(static_cast<int>(handle_));
}

void ReadFile::read(std::uint64_t offset, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    // Linux moves at most 2^31 - 4096 bytes per call.
    std::size_t ask = std::min<std::size_t>(bytes.size(), std::size_t{1} << 30);
    ssize_t got = ::pread(static_cast<int>(handle_), bytes.data(), ask, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) raise("read", path_, last_error());
    if (got == 0) became_shorter(path_, size_);
    offset += static_cast<std::uint64_t>(got);
    bytes = bytes.subspan(static_cast<std::size_t>(got));
  }
}

Memory ReadFile::map() const {
  Memory memory;
  if (size_ == 0) return memory;
  int flags = MAP_PRIVATE;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;  // hardly any page is ever written to
#endif
  void* data = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, static_cast<int>(handle_), 0);
  if (data == MAP_FAILED) raise("map", path_, last_error());
  memory.data_ = static_cast<std::byte*>(data);
  memory.size_ = size_;
  memory.mapped_file_ = true;
  return memory;
}

namespace {

// Fails at once where the disk is too full, instead of after minutes of writing. File systems that
// cannot reserve are asked nothing further.
std::error_code reserve([[maybe_unused]] int fd, [[maybe_unused]] std::uint64_t bytes) {
#ifdef __linux__
  if (bytes > 0 && ::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) != 0) {
    std::error_code code = last_error();
    if (no_space(code)) return code;
  }
#endif
  return {};
}

}  // namespace

NewFile::NewFile(const std::string& directory, std::uint64_t expected_bytes)
    : directory_(directory) {
  step("create");
  int fd;
  do {
    path_ = join(directory, temporary_name());
    fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd < 0 && (errno == EINTR || errno == EEXIST));
  if (fd < 0) raise("create a file in", directory, last_error());
  handle_ = fd;
  ::flock(fd, LOCK_EX | LOCK_NB);  // tells other savers that the maker of this file is alive
  if (std::error_code code = reserve(fd, expected_bytes)) {
    ::close(fd);
    ::unlink(path_.c_str());
    raise("reserve " + std::to_string(expected_bytes) + " bytes for a file in", directory, code);
  }
}

NewFile::NewFile(const std::string& directory, std::uint64_t expected_bytes,
                 const std::string& name)
    : directory_(directory), path_(join(directory, name)) {
  step("create");
  int fd;
  do {
    fd = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) raise("create", path_, last_error());
  std::error_code code;
  struct stat info;
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    ::close(fd);
    in_use(path_);
  }
  struct stat named;
  if (::fstat(fd, &info) != 0) {
    code = last_error();
  } else if (!S_ISREG(info.st_mode)) {
    ::close(fd);
    not_regular(path_, "something else");
  } else if (::stat(path_.c_str(), &named) != 0 || named.st_ino != info.st_ino) {
    ::close(fd);  // renamed between opening and locking: it is part of a save now
    in_use(path_);
  } else {
    code = reserve(fd, expected_bytes);
  }
  handle_ = fd;
  if (code) {
    ::close(fd);
    ::unlink(path_.c_str());
    raise("reserve " + std::to_string(expected_bytes) + " bytes for a file in", directory, code);
  }
}

void NewFile::resize(std::uint64_t bytes) {
  step("write");
  if (::ftruncate(static_cast<int>(handle_), static_cast<off_t>(bytes)) != 0)
    raise("resize", path_, last_error());
}

std::size_t NewFile::read_at(std::uint64_t offset, std::span<std::byte> bytes) const {
  std::size_t done = 0;
  while (done < bytes.size()) {
    std::size_t ask = std::min<std::size_t>(bytes.size() - done, std::size_t{1} << 30);
    ssize_t got = ::pread(static_cast<int>(handle_), bytes.data() + done, ask,
                          static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) raise("read", path_, last_error());
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

void NewFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    step("write");
    std::size_t ask = std::min<std::size_t>(bytes.size(), std::size_t{1} << 24);
    ssize_t done = ::write(static_cast<int>(handle_), bytes.data(), ask);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) raise("write", path_, last_error());
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
}

void NewFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    step("write");
    std::size_t ask = std::min<std::size_t>(bytes.size(), std::size_t{1} << 24);
    ssize_t done =
        ::pwrite(static_cast<int>(handle_), bytes.data(), ask, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) raise("write", path_, last_error());
    if (offset != waiting_end_) waiting_begin_ = offset;
    offset += static_cast<std::uint64_t>(done);
    waiting_end_ = offset;
    bytes = bytes.subspan(static_cast<std::size_t>(done));
#ifdef __linux__
    if (waiting_end_ - waiting_begin_ >= kWriteBehindBytes) {
      // Advice: whether it is heeded, and any error of the disk, sync() finds out.
      ::sync_file_range(static_cast<int>(handle_), static_cast<off_t>(waiting_begin_),
                        static_cast<off_t>(waiting_end_ - waiting_begin_), SYNC_FILE_RANGE_WRITE);
      waiting_begin_ = waiting_end_;
    }
#endif
  }
}

void NewFile::sync() {
  step("sync");
  if (::fsync(static_cast<int>(handle_)) != 0) raise("write to disk", path_, last_error());
}

void NewFile::publish(const std::string& name) {
  step("rename");
  std::string target = join(directory_, name);
  if (::rename(path_.c_str(), target.c_str()) != 0) raise("rename to", target, last_error());
  published_ = true;
  ::close(static_cast<int>(handle_));
  handle_ = -1;
}

DirectoryLock::DirectoryLock(const std::string& directory) {
  int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) raise("open", directory, last_error());
  handle_ = fd;
  while (::flock(fd, LOCK_EX) != 0 && errno == EINTR) {
  }
}

DirectoryLock::~DirectoryLock() {
  if (handle_ != -1) ::close(static_cast<int>(handle_));  // releases the lock
}

void sync_directory(const std::string& path) {
  step("sync directory");
  int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) raise("open", path, last_error());
  int result = ::fsync(fd);
  std::error_code code = last_error();
  ::close(fd);
  // Some network file systems cannot sync a directory and say so with EINVAL.
  if (result != 0 && code != std::errc::invalid_argument) raise("write to disk", path, code);
}

void remove_stale_files(const std::string& directory, std::string_view kept) noexcept {
  try {
    for (const std::string& name : list_directory(directory)) {
      if (!is_left_over(name, kept)) continue;
      std::string path = join(directory, name);
      int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
      if (fd < 0) continue;
      if (::flock(fd, LOCK_EX | LOCK_NB) == 0) ::unlink(path.c_str());
      ::close(fd);
    }
  } catch (...) {
  }
}

#else

// ---- Windows -----------------------------------------------------------------------------------

namespace {

HANDLE as_handle(std::intptr_t handle) {
  return reinterpret_cast<HANDLE>(handle);
}

// A file that is being replaced, or looked at by a virus scanner, cannot be opened or replaced for
// a moment. `attempt` says whether it worked; the last error stays for the caller.
template <class Attempt>
void retry_while_busy(const Attempt& attempt) {
  constexpr int kTries = 100;  // of 10 ms: longer than any replacement takes
  for (int i = 0; !attempt() && i < kTries; ++i) {
    DWORD error = GetLastError();
    if (error != ERROR_SHARING_VIOLATION && error != ERROR_ACCESS_DENIED) return;
    Sleep(10);
    SetLastError(error);
  }
}

}  // namespace

Memory::~Memory() {
  if (!data_) return;
  if (mapped_file_) {
    UnmapViewOfFile(data_);
  } else {
    VirtualFree(data_, 0, MEM_RELEASE);
  }
}

void Memory::release(std::uint64_t, std::uint64_t) const noexcept {
  // The system trims the working set itself.
}

Memory Memory::anonymous(std::uint64_t bytes) {
  Memory memory;
  void* data = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (!data)
    throw Error(ErrorCode::kResource, "cannot get " + std::to_string(bytes) +
                                          " bytes of memory: " + last_error().message() +
                                          "; load with mmap=True or close other programs");
  memory.data_ = static_cast<std::byte*>(data);
  memory.size_ = bytes;
  return memory;
}

ReadFile::ReadFile(const std::string& path) : path_(path) {
  HANDLE handle = INVALID_HANDLE_VALUE;
  retry_while_busy([&] {
    handle = CreateFileW(to_path(path).c_str(), GENERIC_READ,
                         FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
                         OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
    return handle != INVALID_HANDLE_VALUE;
  });
  if (handle == INVALID_HANDLE_VALUE) {
    std::error_code code = last_error();
    std::error_code ignored;
    if (std::filesystem::is_directory(to_path(path), ignored)) not_regular(path, "a directory");
    raise("open", path, code);
  }
  handle_ = reinterpret_cast<std::intptr_t>(handle);
  LARGE_INTEGER size;
  const char* kind = GetFileType(handle) != FILE_TYPE_DISK ? "a device or pipe" : nullptr;
  std::error_code code;
  if (!kind && !GetFileSizeEx(handle, &size)) code = last_error();
  if (kind || code) {
    CloseHandle(handle);
    handle_ = -1;
    if (code) raise("examine", path, code);
    not_regular(path, kind);
  }
  size_ = static_cast<std::uint64_t>(size.QuadPart);
}

ReadFile::~ReadFile() {
  if (handle_ != -1) CloseHandle(as_handle(handle_));
}

void ReadFile::read(std::uint64_t offset, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    OVERLAPPED where = {};
    where.Offset = static_cast<DWORD>(offset);
    where.OffsetHigh = static_cast<DWORD>(offset >> 32);
    DWORD ask = static_cast<DWORD>(std::min<std::uint64_t>(bytes.size(), 1u << 30));
    DWORD got = 0;
    if (!::ReadFile(as_handle(handle_), bytes.data(), ask, &got, &where)) {
      if (GetLastError() == ERROR_HANDLE_EOF) became_shorter(path_, size_);
      raise("read", path_, last_error());
    }
    if (got == 0) became_shorter(path_, size_);
    offset += got;
    bytes = bytes.subspan(got);
  }
}

Memory ReadFile::map() const {
  Memory memory;
  if (size_ == 0) return memory;
  HANDLE section = CreateFileMappingW(as_handle(handle_), nullptr, PAGE_WRITECOPY, 0, 0, nullptr);
  if (!section) raise("map", path_, last_error());
  void* data = MapViewOfFile(section, FILE_MAP_COPY, 0, 0, size_);
  std::error_code code = last_error();
  CloseHandle(section);  // the view keeps it
  if (!data) raise("map", path_, code);
  memory.data_ = static_cast<std::byte*>(data);
  memory.size_ = size_;
  memory.mapped_file_ = true;
  return memory;
}

NewFile::NewFile(const std::string& directory, std::uint64_t) : directory_(directory) {
  step("create");
  HANDLE handle;
  do {
    path_ = join(directory, temporary_name());
    // Delete access lets publish() rename; no sharing tells other savers that its maker is alive.
    handle = CreateFileW(to_path(path_).c_str(), GENERIC_WRITE | DELETE, 0, nullptr, CREATE_NEW,
                         FILE_ATTRIBUTE_NORMAL, nullptr);
  } while (handle == INVALID_HANDLE_VALUE && GetLastError() == ERROR_FILE_EXISTS);
  if (handle == INVALID_HANDLE_VALUE) raise("create a file in", directory, last_error());
  handle_ = reinterpret_cast<std::intptr_t>(handle);
}

NewFile::NewFile(const std::string& directory, std::uint64_t, const std::string& name)
    : directory_(directory), path_(join(directory, name)) {
  step("create");
  HANDLE handle = CreateFileW(to_path(path_).c_str(), GENERIC_READ | GENERIC_WRITE | DELETE, 0,
                              nullptr, OPEN_ALWAYS, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (handle == INVALID_HANDLE_VALUE) {
    if (GetLastError() == ERROR_SHARING_VIOLATION) in_use(path_);
    raise("create", path_, last_error());
  }
  handle_ = reinterpret_cast<std::intptr_t>(handle);
}

void NewFile::resize(std::uint64_t bytes) {
  step("write");
  LARGE_INTEGER where;
  where.QuadPart = static_cast<LONGLONG>(bytes);
  if (!SetFilePointerEx(as_handle(handle_), where, nullptr, FILE_BEGIN) ||
      !SetEndOfFile(as_handle(handle_)))
    raise("resize", path_, last_error());
}

std::size_t NewFile::read_at(std::uint64_t offset, std::span<std::byte> bytes) const {
  std::size_t done = 0;
  while (done < bytes.size()) {
    OVERLAPPED where = {};
    where.Offset = static_cast<DWORD>(offset + done);
    where.OffsetHigh = static_cast<DWORD>((offset + done) >> 32);
    DWORD ask = static_cast<DWORD>(std::min<std::uint64_t>(bytes.size() - done, 1u << 30));
    DWORD got = 0;
    if (!::ReadFile(as_handle(handle_), bytes.data() + done, ask, &got, &where)) {
      if (GetLastError() == ERROR_HANDLE_EOF) break;
      raise("read", path_, last_error());
    }
    if (got == 0) break;
    done += got;
  }
  return done;
}

void NewFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    step("write");
    DWORD ask = static_cast<DWORD>(std::min<std::size_t>(bytes.size(), 1u << 24));
    DWORD done = 0;
    if (!WriteFile(as_handle(handle_), bytes.data(), ask, &done, nullptr))
      raise("write", path_, last_error());
    bytes = bytes.subspan(done);
  }
}

void NewFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  LARGE_INTEGER where, end = {};
  where.QuadPart = static_cast<LONGLONG>(offset);
  if (!SetFilePointerEx(as_handle(handle_), where, nullptr, FILE_BEGIN))
    raise("write", path_, last_error());
  write(bytes);
  SetFilePointerEx(as_handle(handle_), end, nullptr, FILE_END);
}

void NewFile::sync() {
  step("sync");
  if (!FlushFileBuffers(as_handle(handle_))) raise("write to disk", path_, last_error());
}

void NewFile::publish(const std::string& name) {
  step("rename");
  CloseHandle(as_handle(handle_));
  handle_ = -1;
  std::string target = join(directory_, name);
  bool moved = false;
  retry_while_busy([&] {
    moved = MoveFileExW(to_path(path_).c_str(), to_path(target).c_str(),
                        MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
    return moved;
  });
  if (!moved) raise("rename to", target, last_error());
  published_ = true;
}

DirectoryLock::DirectoryLock(const std::string& directory) {
  // A named mutex of the session: one name per directory, whatever its spelling.
  std::error_code code;
  std::wstring path = std::filesystem::canonical(to_path(directory), code).wstring();
  if (code) raise("open", directory, code);
  std::uint64_t hash = 1469598103934665603u;
  for (wchar_t c : path) hash = (hash ^ static_cast<std::uint64_t>(towlower(c))) * 1099511628211u;
  std::wstring name = L"Local\\lowbit-" + std::to_wstring(hash);
  HANDLE mutex = CreateMutexW(nullptr, FALSE, name.c_str());
  if (!mutex) raise("lock", directory, last_error());
  WaitForSingleObject(mutex, INFINITE);
  handle_ = reinterpret_cast<std::intptr_t>(mutex);
}

DirectoryLock::~DirectoryLock() {
  if (handle_ == -1) return;
  ReleaseMutex(as_handle(handle_));
  CloseHandle(as_handle(handle_));
}

void sync_directory(const std::string&) {
  step("sync directory");  // MOVEFILE_WRITE_THROUGH has done it
}

void remove_stale_files(const std::string& directory, std::string_view kept) noexcept {
  try {
    for (const std::string& name : list_directory(directory))
      if (is_left_over(name, kept)) DeleteFileW(to_path(join(directory, name)).c_str());
  } catch (...) {
  }
}

#endif

}  // namespace lowbit::os
