// with_team: every task once, whatever the threads do.
#include "fused/team.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

namespace lowbit {
namespace {

class Concurrent final : public Threads {
 public:
  explicit Concurrent(int count) : count_(count) {}
  int count() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    std::vector<std::thread> threads;
    for (std::int64_t t = 0; t < tasks; ++t) threads.emplace_back([&body, t] { body(t); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int count_;
};

// Says that it has four threads, and runs the tasks one after the other, the last one first.
class Backwards final : public Threads {
 public:
  int count() const override { return 4; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    while (tasks > 0) body(--tasks);
  }
};

void expect_every_task_once(const Threads& threads) {
  int calls = 0;
  with_team(threads, [&](const Threads& team) {
    ++calls;
    EXPECT_EQ(team.count(), threads.count());
    for (int round = 0; round < 2000; ++round) {
      const std::int64_t tasks = round % 7;
      std::atomic<int> seen[7] = {};
      team.run(tasks, [&](std::int64_t task) { seen[task].fetch_add(1); });
      for (std::int64_t t = 0; t < 7; ++t) ASSERT_EQ(seen[t].load(), t < tasks ? 1 : 0);
    }
  });
  EXPECT_EQ(calls, 1);
}

TEST(Team, RunsEveryTaskOnce) {
  expect_every_task_once(serial_threads());
  expect_every_task_once(Concurrent(2));
  expect_every_task_once(Concurrent(5));
}

TEST(Team, DoesWithoutTheOthersWhereTheyNeverCome) {
  expect_every_task_once(Backwards());
}

TEST(Team, PassesOnWhatTheBodyThrows) {
  EXPECT_THROW(with_team(Concurrent(3), [](const Threads&) { throw std::runtime_error("no"); }),
               std::runtime_error);
}

}  // namespace
}  // namespace lowbit
