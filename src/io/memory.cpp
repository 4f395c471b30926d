#include "lowbit/memory.h"

#include <mutex>
#include <utility>

#include "io/os.h"

namespace lowbit {
namespace {

constexpr std::size_t kAlignment = 64;
// 16 and 4 huge pages of x86. What the last weights of a model leave of their slab is never
// touched, and so costs addresses, not memory.
constexpr std::size_t kWeightSlab = std::size_t{32} << 20;
constexpr std::size_t kCacheSlab = std::size_t{8} << 20;

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

std::shared_ptr<std::byte> allocate_streamed(std::size_t bytes, Streamed what) {
  if (bytes == 0) return nullptr;
  const std::size_t slab_bytes = what == Streamed::kWeights ? kWeightSlab : kCacheSlab;
  if (bytes > slab_bytes / 2) return take(std::make_shared<Slab>(bytes), bytes);
  static std::mutex mutex;
  static std::weak_ptr<Slab> slabs[2];  // weak: what lies in a slab owns it, nothing else does
  const std::lock_guard lock(mutex);
  std::weak_ptr<Slab>& current = slabs[static_cast<int>(what)];
  std::shared_ptr<Slab> slab = current.lock();
  if (slab == nullptr || slab_bytes - slab->used < bytes) {
    slab = std::make_shared<Slab>(slab_bytes);
    current = slab;
  }
  return take(std::move(slab), bytes);
}

void return_freed_memory() {
  os::return_freed_memory();
}

}  // namespace lowbit
