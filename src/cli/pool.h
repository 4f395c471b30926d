// Threads of the program's own: started per run, which is dear next to one kernel and nothing next
// to a file.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "lowbit/threads.h"

namespace lowbit::cli {

class Pool final : public Threads {
 public:
  explicit Pool(int count)
      : count_(count > 0 ? count
                         : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))) {}

  int count() const override { return count_; }

  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    std::atomic<std::int64_t> next{0};
    auto work = [&] {
      for (std::int64_t task; (task = next.fetch_add(1)) < tasks;) body(task);
    };
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < count_ && i < tasks; ++i) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
  }

 private:
  int count_;
};

}  // namespace lowbit::cli
