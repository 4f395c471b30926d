// lowbit::linear: arguments checked at the door, then one path per row block.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/generic/convert.h"
#include "cpu/linear_driver.h"
#include "cpu/select.h"
#include "lowbit/error.h"
#include "lowbit/linear.h"

namespace lowbit {
namespace cpu {
namespace {

SelectFn select_function(Isa isa) {
  switch (isa) {
#if defined(LOWBIT_LINEAR_AVX2)
    case Isa::kAvx2:
      return select_linear_avx2;
#endif
#if defined(LOWBIT_LINEAR_AVXVNNI)
    case Isa::kAvxVnni:
      return select_linear_avxvnni;
#endif
#if defined(LOWBIT_LINEAR_AVX512VNNI)
    case Isa::kAvx512Vnni:
      return select_linear_avx512vnni;
#endif
#if defined(LOWBIT_LINEAR_AVX512BF16)
    case Isa::kAvx512Bf16:
      return select_linear_avx512bf16;
#endif
#if defined(LOWBIT_LINEAR_AMX)
    case Isa::kAmx:
      return select_linear_amx;
#endif
#if defined(LOWBIT_LINEAR_NEON)
    case Isa::kNeon:
      return select_linear_neon;
#endif
#if defined(LOWBIT_LINEAR_NEONDOT)
    case Isa::kNeonDot:
      return select_linear_neondot;
#endif
    case Isa::kScalar:
      return select_linear_scalar;
    default:
      return nullptr;
  }
}

struct Buffer {
  std::byte* data = nullptr;
  std::int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

constexpr int kSlots = 6;

// Tokens handled per pass: prepared activations of 512 tokens stay in the last-level cache while
// every weight panel passes over them, and expanding a panel anew costs 3/512 of using it.
constexpr std::int64_t kTokensPerPass = 512;
constexpr std::int64_t kMadeTogether = 16;  // rows of 11,000 floats: a third of an L2

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// All row tiles of one block.
struct Run {
  const RowBlock* block;
  const Path* path;
};

constexpr int kMaxShared = 16;

// Blocks that share activations: what the first one's path prepares serves all of them.
struct SharedRuns {
  const RowBlock* head;
  const Path* path;  // of head
  int count = 0;
  Run runs[kMaxShared];
};

// The work of all runs on one pass of tokens as one sequence of steps: tile_block tiles each (and,
// for panels, a range of tokens).
struct Steps {
  const SharedRuns& shared;
  const Activations& a;
  std::int64_t base;  // first token of the pass
  std::int64_t of_run[kMaxShared];
  std::int64_t count = 0;
  std::int64_t scratch_bytes = 0;

  Steps(const SharedRuns& runs, const Activations& activations, std::int64_t first_token);
  // Steps begin to end on tokens token_begin to token_end; `next`, where not negative, is the step
  // whose bytes are fetched meanwhile.
  void run(std::int64_t begin, std::int64_t end, std::int64_t token_begin, std::int64_t token_end,
           std::int64_t next, std::byte* memory) const;
};

SharedRuns take_shared(Isa isa, const Tokens& tokens, Precision precision,
                       std::span<const RowBlock>* blocks);
void prepare_activations(const Tokens& part, const Activations& a, std::int64_t base,
                         const Path& path, const Threads& threads, const MakeRows* make);
void run_panels(const Steps& steps, std::int64_t splits, const Threads& threads);
void run_rows(const Steps& steps, const Threads& threads);
void fill_bias(const Tokens& tokens, const RowBlock& block);
std::byte* thread_scratch(std::int64_t bytes);

}  // namespace

std::byte* thread_workspace(int slot, std::int64_t bytes) {
  thread_local Buffer buffers[kSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const std::int64_t size = round_up(bytes + bytes / 4, 4096);
    buffer.data = static_cast<std::byte*>(std::aligned_alloc(4096, static_cast<std::size_t>(size)));
    if (buffer.data == nullptr) {
      throw Error(ErrorCode::kResource, "linear: no memory for a workspace of " +
                                            std::to_string(size) +
                                            " bytes; use fewer tokens per call");
    }
    buffer.bytes = size;
  }
  return buffer.data;
}

const Path& select_linear(Isa isa, const Layout& layout, Precision precision, std::int64_t m) {
  for (;;) {
    const SelectFn select = select_function(isa);
    const Path* path = select == nullptr ? nullptr : select(layout, precision, m);
    if (path != nullptr) return *path;
    isa = isa_info(isa).fallback;
  }
}

void linear_multi(const Tokens& tokens, Precision precision, std::span<const RowBlock> blocks,
                  const Threads& threads, const MakeRows& make) {
  if (tokens.m == 0) return;
  const Isa isa = active_level();
  const int workers = std::max(1, threads.count());
  bool made = !make;
  while (!blocks.empty()) {
    const SharedRuns shared = take_shared(isa, tokens, precision, &blocks);
    if (shared.count == 0) continue;
    const Layout& layout = shared.head->layout;
    Activations a;
    a.k = tokens.k;
    a.k_padded = layout.k_padded;
    a.group = layout.group_size > 0 ? layout.group_size : static_cast<int>(layout.k_padded);
    a.groups = layout.group_size > 0 ? layout.groups : 1;
    const std::int64_t token_block = shared.path->token_block;
    const std::int64_t passes = (tokens.m + kTokensPerPass - 1) / kTokensPerPass;
    const std::int64_t per_pass = round_up((tokens.m + passes - 1) / passes, token_block);
    for (std::int64_t base = 0; base < tokens.m; base += per_pass) {
      a.m = std::min(per_pass, tokens.m - base);
      a.data = thread_workspace(0, shared.path->activation_bytes(a));
      Tokens part = tokens;
      part.m = a.m;
      part.x = static_cast<const std::byte*>(tokens.x) +
               base * tokens.stride * static_cast<std::int64_t>(dtype_bytes(tokens.dtype));
      prepare_activations(part, a, base, *shared.path, threads, made ? nullptr : &make);

      const Steps steps(shared, a, base);
      // Too few panels for all threads: split the tokens as well.
      const std::int64_t token_blocks = (a.m + token_block - 1) / token_block;
      std::int64_t splits = 1;
      if (shared.path->panel && workers > 1) {
        while (steps.count * splits < 4 * workers && token_blocks / splits >= 8) splits *= 2;
      }
      if (workers == 1 || steps.count * splits == 1) {
        steps.run(0, steps.count, 0, a.m, -1, thread_scratch(steps.scratch_bytes));
      } else if (shared.path->panel) {
        run_panels(steps, splits, threads);
      } else {
        run_rows(steps, threads);
      }
    }
    made = true;
  }
}

namespace {

// Takes blocks off the front of `blocks`; in practice that is all of them.
SharedRuns take_shared(Isa isa, const Tokens& tokens, Precision precision,
                       std::span<const RowBlock>* blocks) {
  SharedRuns shared;
  shared.head = &blocks->front();
  shared.path = &select_linear(isa, shared.head->layout, precision, tokens.m);
  while (!blocks->empty() && shared.count < kMaxShared) {
    const RowBlock& block = blocks->front();
    const Path& path = select_linear(isa, block.layout, precision, tokens.m);
    const bool same = std::strcmp(path.activations, shared.path->activations) == 0 &&
                      block.layout.group_size == shared.head->layout.group_size &&
                      path.token_block == shared.path->token_block;
    if (!same) break;
    *blocks = blocks->subspan(1);
    if (tokens.k == 0) {
      fill_bias(tokens, block);
    } else if (block.layout.n > 0) {
      shared.runs[shared.count++] = {&block, &path};
    }
  }
  return shared;
}

// Tokens of `part` (those from `base` on) into a.data; `make`, where given, makes them first.
void prepare_activations(const Tokens& part, const Activations& a, std::int64_t base,
                         const Path& path, const Threads& threads, const MakeRows* make) {
  // Made rows are prepared a few at a time, before they leave an L2.
  const auto prepare = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t step =
        make == nullptr ? end - begin : round_up(kMadeTogether, path.token_block);
    for (; begin < end; begin += step) {
      const std::int64_t to = std::min(begin + step, end);
      if (make != nullptr) (*make)(base + begin, base + to);
      path.prepare(part, a, begin, to);
    }
  };
  // Preparing a few tokens costs less than waking the pool for it.
  if (threads.count() <= 1 || a.m <= 16) return prepare(0, a.m);
  const std::int64_t token_blocks = (a.m + path.token_block - 1) / path.token_block;
  const std::int64_t tasks = std::min<std::int64_t>(threads.count(), token_blocks);
  threads.run(tasks, [&](std::int64_t task) {
    const std::int64_t begin = token_blocks * task / tasks * path.token_block;
    const std::int64_t end = std::min(token_blocks * (task + 1) / tasks * path.token_block, a.m);
    if (begin < end) prepare(begin, end);
  });
}

Steps::Steps(const SharedRuns& runs, const Activations& activations, std::int64_t first_token)
    : shared(runs), a(activations), base(first_token) {
  for (int i = 0; i < shared.count; ++i) {
    const auto [block, path] = shared.runs[i];
    scratch_bytes = std::max(scratch_bytes, path->scratch_bytes(*block, a));
    of_run[i] = (block->layout.tiles + path->tile_block - 1) / path->tile_block;
    count += of_run[i];
  }
}

void Steps::run(std::int64_t begin, std::int64_t end, std::int64_t token_begin,
                std::int64_t token_end, std::int64_t next, std::byte* memory) const {
  for (int i = 0; i < shared.count && begin < end; ++i) {
    if (begin < of_run[i]) {
      const auto [block, path] = shared.runs[i];
      path->run(*block, a, base, begin * path->tile_block,
                std::min(std::min(end, of_run[i]) * path->tile_block, block->layout.tiles),
                token_begin, token_end,
                next >= 0 && next < of_run[i] ? next * path->tile_block : -1, memory);
    }
    begin = std::max<std::int64_t>(begin - of_run[i], 0);
    end -= of_run[i];
    next -= of_run[i];
  }
}

[[noreturn]] void no_workspace(const Steps& steps) {
  throw Error(ErrorCode::kResource, "linear: no memory for a workspace of " +
                                        std::to_string(steps.scratch_bytes) +
                                        " bytes per thread; use fewer tokens per call");
}

// Steps that one turn of a thread takes.
std::int64_t steps_per_turn(const Steps& steps, std::int64_t splits, std::int64_t workers) {
  constexpr std::int64_t kTurnsPerWorker = 8, kFewTurnsPerWorker = 3;
  const std::int64_t most = steps.shared.path->most_blocks;
  if (splits != 1) return 1;
  if (most <= 4) {
    return std::clamp<std::int64_t>(steps.count / (kTurnsPerWorker * workers), 1, most);
  }
  // Much to share: as large as may be, equally large and as many for each thread.
  const std::int64_t least = std::max((steps.count + most - 1) / most,
                                      std::min(kFewTurnsPerWorker * workers, steps.count));
  const std::int64_t equal = round_up(least, workers);
  return (steps.count + equal - 1) / equal;
}

// Panels are handed out a few at a time: a thread that the host slows down takes fewer, and the
// panels of one turn share what they read of the activations. Tokens are in `splits` parts.
void run_panels(const Steps& steps, std::int64_t splits, const Threads& threads) {
  const std::int64_t workers = threads.count();
  const std::int64_t token_block = steps.shared.path->token_block;
  const std::int64_t token_blocks = (steps.a.m + token_block - 1) / token_block;
  const std::int64_t turn = steps_per_turn(steps, splits, workers);
  const std::int64_t turns = (steps.count + turn - 1) / turn * splits;
  std::atomic<bool> out_of_memory{false};
  std::atomic<std::int64_t> next{0};
  threads.run(std::min(workers, turns), [&](std::int64_t) {
    try {
      std::byte* memory = thread_scratch(steps.scratch_bytes);
      // One item is held in advance, so that its bytes can be fetched.
      std::int64_t ahead = next.fetch_add(1, std::memory_order_relaxed);
      while (ahead < turns) {
        const std::int64_t item = ahead;
        ahead = next.fetch_add(1, std::memory_order_relaxed);
        const std::int64_t split = item % splits, step = item / splits * turn;
        const std::int64_t token_begin = token_blocks * split / splits * token_block;
        const std::int64_t token_end =
            std::min(token_blocks * (split + 1) / splits * token_block, steps.a.m);
        steps.run(step, std::min(step + turn, steps.count), token_begin, token_end,
                  ahead < turns ? ahead / splits * turn : -1, memory);
      }
    } catch (...) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) no_workspace(steps);
}

// One contiguous run of rows, and so of bytes, for each thread.
void run_rows(const Steps& steps, const Threads& threads) {
  const std::int64_t tasks = std::min<std::int64_t>(threads.count(), steps.count);
  std::atomic<bool> out_of_memory{false};
  threads.run(tasks, [&](std::int64_t task) {
    try {
      steps.run(steps.count * task / tasks, steps.count * (task + 1) / tasks, 0, steps.a.m, -1,
                thread_scratch(steps.scratch_bytes));
    } catch (...) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) no_workspace(steps);
}

std::byte* thread_scratch(std::int64_t bytes) {
  constexpr std::int64_t kZeroed = 64;
  std::byte* memory = thread_workspace(1, std::max(bytes, kZeroed));
  std::memset(memory, 0, kZeroed);
  return memory;
}

void fill_bias(const Tokens& tokens, const RowBlock& block) {
  for (std::int64_t t = 0; t < tokens.m; ++t) {
    for (std::int64_t r = 0; r < block.layout.n; ++r) {
      const float value =
          block.bias == nullptr ? 0.0f : load_float(block.bias, block.bias_dtype, r);
      store_float(block.out, block.out_dtype, t * block.out_stride + r, value);
    }
  }
}

std::string dtype_text(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat64:
      return "float64";
  }
  return "dtype number " + std::to_string(static_cast<int>(dtype));
}

void check_dtype(const char* what, DType dtype) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16) return;
  throw Error(ErrorCode::kType, std::string("linear: ") + what +
                                    " must be float32, float16 or bfloat16, got " +
                                    dtype_text(dtype) + "; convert it first");
}

[[noreturn]] void fail(const std::string& text) {
  throw Error(ErrorCode::kValue, "linear: " + text);
}

}  // namespace

Precision resolve_precision(Format format, Precision precision, std::int64_t m) {
  if (precision != Precision::kAuto) return precision;
  // Up to 4 tokens the weights' bytes are the cost and near-exact sums are free; NormalFloats pay
  // four products where the others pay two.
  const bool wide = format == Format::kNf3 || format == Format::kNf4;
  if (m <= (wide ? 1 : 4)) return Precision::kFp32;
  const FormatInfo& info = format_info(format);
  return info.grouped() ? Precision::kInt8 : Precision::kBf16;
}

}  // namespace cpu

void linear(const LinearArgs& args, const Threads& threads) {
  const Layout& layout = args.layout;
  format_info(layout.format);  // throws for a number out of range
  cpu::check_dtype("the activations", args.x_dtype);
  cpu::check_dtype("the output", args.out_dtype);
  if (args.bias != nullptr) cpu::check_dtype("the bias", args.bias_dtype);
  if (args.m < 0)
    cpu::fail("the number of tokens must not be negative, got " + std::to_string(args.m));
  if (static_cast<int>(args.precision) > static_cast<int>(Precision::kInt8)) {
    cpu::fail("unknown precision number " + std::to_string(static_cast<int>(args.precision)) +
              "; expected 0 (auto), 1 (fp32), 2 (bf16) or 3 (int8)");
  }
  if (args.m == 0 || layout.n == 0) return;
  if (args.out == nullptr) cpu::fail("the output is a null pointer");
  if (args.m > 1 && args.out_stride < layout.n) {
    cpu::fail("rows of the output overlap: stride " + std::to_string(args.out_stride) + " but " +
              std::to_string(layout.n) + " outputs");
  }
  if (layout.k > 0) {
    if (args.x == nullptr) cpu::fail("the activations are a null pointer");
    if (args.packed == nullptr || reinterpret_cast<std::uintptr_t>(args.packed) % 64 != 0) {
      cpu::fail("packed weights must be 64-byte aligned; copy them into aligned memory");
    }
  }
  const cpu::Tokens tokens{args.x, args.x_dtype, args.x_stride, args.m, layout.k};
  const cpu::RowBlock block{static_cast<const std::byte*>(args.packed),
                            layout,
                            args.exponent,
                            args.bias,
                            args.bias_dtype,
                            args.out,
                            args.out_dtype,
                            args.out_stride};
  cpu::linear_multi(tokens, args.precision, std::span(&block, 1), threads);
}

}  // namespace lowbit
