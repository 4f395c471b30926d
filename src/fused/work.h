// What the parts of a block have in common: a call's arguments and kernels, products of packed
// matrices, and how tokens are shared between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/fused_kernels.h"
#include "cpu/linear_driver.h"
#include "lowbit/error.h"
#include "lowbit/fused.h"

namespace lowbit::fused {

using cpu::FusedKernels;

struct Work {
  const FusedKernels& kernels;
  const BlockCall& call;
  const Threads& threads;
  std::int64_t rows;  // batch * tokens
};

// Tokens that are worked on together, as many as linear_driver prepares activations of.
inline std::int64_t chunk_of(std::int64_t rows) {
  return std::min<std::int64_t>(rows, 512);
}

// Throws Error(kValue) unless ok.
void require(bool ok, const std::string& text);

inline std::int64_t bytes_of(DType dtype) {
  return static_cast<std::int64_t>(dtype_bytes(dtype));
}

std::int64_t columns_of(const std::vector<PackedMatrix>& matrices);

// out = x W^T + bias for all matrices, side by side in rows of out_stride floats. `make`, where
// there is one, writes a row of x just before it is read.
using MakeRow = std::function<void(std::int64_t token)>;
void multiply(const Work& work, const std::vector<PackedMatrix>& matrices, const float* x,
              std::int64_t tokens, std::int64_t k, float* out, std::int64_t out_stride,
              const MakeRow& make = {});

// Grow-only float memory of the calling thread: operators run for every token, and malloc would
// return large blocks to the system each time.
inline float* floats(int slot, std::int64_t count) {
  return reinterpret_cast<float*>(cpu::thread_workspace(slot, count * 4 + 64));
}

// body(token) for all tokens; on the calling thread where there are few.
template <typename Body>
void for_tokens(std::int64_t tokens, const Threads& threads, const Body& body) {
  const std::int64_t tasks = tokens < 32 ? 1 : std::min<std::int64_t>(threads.count(), tokens);
  if (tasks == 1) {
    for (std::int64_t t = 0; t < tokens; ++t) body(t);
    return;
  }
  threads.run(tasks, [&](std::int64_t task) {
    for (std::int64_t t = tokens * task / tasks; t < tokens * (task + 1) / tasks; ++t) body(t);
  });
}

// body(task) for all tasks, the last ones first: later strips see more positions. Handed out one by
// one.
template <typename Body>
void share(const Threads& threads, std::int64_t tasks, const Body& body) {
  if (tasks <= 1 || threads.count() == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<std::int64_t> next{tasks};
  std::atomic<bool> failed{false};
  threads.run(std::min<std::int64_t>(threads.count(), tasks), [&](std::int64_t) {
    try {
      for (std::int64_t task; (task = next.fetch_sub(1) - 1) >= 0;) body(task);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw Error(ErrorCode::kResource, "fused block: no memory for attention");
}

// n floats per token from and to another type.
inline void load_tokens(const Work& work, const void* from, DType dtype, std::int64_t tokens,
                        std::int64_t n, float* to) {
  for_tokens(tokens, work.threads, [&](std::int64_t t) {
    work.kernels.load(static_cast<const char*>(from) + t * n * bytes_of(dtype), dtype, n,
                      to + t * n);
  });
}

inline void store_tokens(const Work& work, const float* from, DType dtype, std::int64_t tokens,
                         std::int64_t n, void* to) {
  for_tokens(tokens, work.threads, [&](std::int64_t t) {
    work.kernels.store(from + t * n, dtype, n, static_cast<char*>(to) + t * n * bytes_of(dtype));
  });
}

inline void normalize(const Work& work, const NormSpec& norm, float* row, std::int64_t n) {
  if (norm.kind != NormKind::kNone) work.kernels.norm(norm, row, n, row);
}

// One token: to = post_norm(to + multiplier * out_norm(update)), without `to` inside where there is
// no residual.
template <typename Half>
void merge(const Work& work, const Half& half, float* update, float* to) {
  const std::int64_t hidden = work.call.hidden;
  normalize(work, half.out_norm, update, hidden);
  if (!half.residual) std::fill_n(to, hidden, 0.0f);
  work.kernels.add(update, half.multiplier, hidden, to);
  normalize(work, half.post_norm, to, hidden);
}

}  // namespace lowbit::fused
