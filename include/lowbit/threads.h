// Threads come from the caller: the torch binding passes torch's pool, a test a serial loop.
#pragma once

#include <cstdint>
#include <functional>

namespace lowbit {

class Threads {
 public:
  virtual ~Threads() = default;
  // How many tasks can run at the same time, at least 1.
  virtual int count() const = 0;
  // Runs body(0) ... body(tasks - 1), each once, in any order and on any thread, and returns when
  // all are done. `body` must not throw.
  virtual void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const = 0;
};

// Runs everything in the calling thread.
const Threads& serial_threads();

}  // namespace lowbit
