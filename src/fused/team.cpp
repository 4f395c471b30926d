#include "fused/team.h"

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// About 20 us of waiting: longer than the serial parts between two products of a decoding step.
constexpr int kSpins = 1024;

class Spin {
 public:
  void wait() {
    if (++count_ < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }

 private:
  int count_ = 0;
};

class Team final : public Threads {
 public:
  explicit Team(int count) : count_(count) {}

  int count() const override { return count_; }

  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    if (tasks <= 0) return;
    if (tasks == 1 || tasks > kMaxTasks) {
      for (std::int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    body_ = &body;
    done_.store(0, std::memory_order_relaxed);
    const std::uint64_t offer = static_cast<std::uint64_t>(tasks) << 32;
    offer_.store(offer, std::memory_order_release);
    work();
    for (Spin spin; done_.load(std::memory_order_acquire) != tasks;) spin.wait();
  }

  // The other members: until the call is over.
  void serve() const {
    for (Spin spin;;) {
      if (offer_.load(std::memory_order_relaxed) == kOver) return;
      if (work()) {
        spin = Spin();
      } else {
        spin.wait();
      }
    }
  }

  void finish() const { offer_.store(kOver, std::memory_order_release); }

 private:
  static constexpr std::int64_t kMaxTasks = (std::int64_t{1} << 31) - 1;
  static constexpr std::uint64_t kOver = ~std::uint64_t{0};

  // Takes tasks of the present offer while there are any; whether there was one.
  bool work() const {
    bool any = false;
    std::uint64_t seen = offer_.load(std::memory_order_acquire);
    while (seen != kOver && (seen & 0xffffffffu) < seen >> 32) {
      // After this succeeded, the offer cannot change before the task is done, so neither can
      // body_; whether it is the offer that was seen first or another one that looks the same.
      if (!offer_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      (*body_)(static_cast<std::int64_t>(seen & 0xffffffffu));
      done_.fetch_add(1, std::memory_order_acq_rel);
      any = true;
      seen = offer_.load(std::memory_order_acquire);
    }
    return any;
  }

  const int count_;
  mutable const std::function<void(std::int64_t)>* body_ = nullptr;
  alignas(64) mutable std::atomic<std::uint64_t> offer_{0};  // tasks << 32 | tasks taken
  alignas(64) mutable std::atomic<std::int64_t> done_{0};
};

}  // namespace

void with_team(const Threads& threads, const std::function<void(const Threads& team)>& body) {
  const int count = threads.count();
  if (count <= 1) {
    body(threads);
    return;
  }
  const Team team(count);
  std::atomic<bool> led{false};
  std::exception_ptr failure;
  threads.run(count, [&](std::int64_t) {
    if (led.exchange(true)) {
      team.serve();
      return;
    }
    try {
      body(team);
    } catch (...) {
      failure = std::current_exception();
    }
    team.finish();
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace lowbit
