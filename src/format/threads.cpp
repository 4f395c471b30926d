#include "lowbit/threads.h"

namespace lowbit {
namespace {

class SerialThreads final : public Threads {
 public:
  int count() const override { return 1; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    for (std::int64_t i = 0; i < tasks; ++i) body(i);
  }
};

}  // namespace

const Threads& serial_threads() {
  static const SerialThreads threads;
  return threads;
}

}  // namespace lowbit
