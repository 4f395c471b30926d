#include "lowbit/memory.h"

#include <mutex>
#include <utility>

#include "io/os.h"

namespace lowbit {
namespace {

constexpr std::size_t kAlignment = 64;
// 16 huge pages of x86. What the last weights of a model leave of their slab is never touched, and
// so costs addresses, not memory.
constexpr std::size_t kSlabBytes = std::size_t{32} << 20;

struct Slab {
  explicit Slab(std::size_t bytes) : memory(os::Memory::anonymous(bytes)) {}
  os::Memory memory;
  std::size_t used = 0;
};

std::shared_ptr<std::byte> take(std::shared_ptr<Slab> slab, std::size_t bytes) {
  std::byte* data = slab->memory.data() + slab->used;
  slab->used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return {std::move(slab), data};
}

}  // namespace

std::shared_ptr<std::byte> allocate_streamed(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  if (bytes > kSlabBytes / 2) return take(std::make_shared<Slab>(bytes), bytes);
  static std::mutex mutex;
  static std::weak_ptr<Slab> current;  // weak: weights own their slab, nothing else does
  const std::lock_guard lock(mutex);
  std::shared_ptr<Slab> slab = current.lock();
  if (slab == nullptr || kSlabBytes - slab->used < bytes) {
    slab = std::make_shared<Slab>(kSlabBytes);
    current = slab;
  }
  return take(std::move(slab), bytes);
}

}  // namespace lowbit
