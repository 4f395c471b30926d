// Threads as the benchmarks use them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "lowbit/threads.h"

namespace lowbit::bench {

// Workers spin between regions, as the OpenMP pool under torch does within a forward pass.
class SpinThreads final : public Threads {
 public:
  explicit SpinThreads(int count) : count_(count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~SpinThreads() override {
    stop_ = true;
    generation_.fetch_add(1);
    for (std::thread& worker : workers_) worker.join();
  }
  int count() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    body_ = &body;
    tasks_ = tasks;
    done_ = 0;
    generation_.fetch_add(1, std::memory_order_release);
    for (std::int64_t i = 0; i < tasks; i += count_) body(i);
    while (done_.load(std::memory_order_acquire) != count_ - 1) __builtin_ia32_pause();
  }

 private:
  void work(int index) {
    std::int64_t seen = 0;
    for (;;) {
      std::int64_t spins = 0;
      while (generation_.load(std::memory_order_acquire) == seen) {
        __builtin_ia32_pause();
        if (++spins > 100000) std::this_thread::yield();
      }
      ++seen;
      if (stop_) return;
      for (std::int64_t i = index; i < tasks_; i += count_) (*body_)(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  int count_;
  std::vector<std::thread> workers_;
  mutable std::atomic<std::int64_t> generation_{0};
  mutable std::atomic<int> done_{0};
  mutable const std::function<void(std::int64_t)>* body_ = nullptr;
  mutable std::int64_t tasks_ = 0;
  std::atomic<bool> stop_{false};
};

}  // namespace lowbit::bench
