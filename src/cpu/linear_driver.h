// Runs linear paths: chooses one, prepares the activations once per call, splits the rows over the
// threads. Fused operators build on this.
#pragma once

#include <functional>
#include <span>

#include "cpu/features.h"
#include "cpu/linear_kernels.h"
#include "lowbit/threads.h"

namespace lowbit::cpu {

// The kernel for a problem on a machine at level `isa`: a pure function. `m` counts tokens.
const Path& select_linear(Isa isa, const Layout& layout, Precision precision, std::int64_t m);

// What `auto` means for a format at m tokens.
Precision resolve_precision(Format format, Precision precision, std::int64_t m);

// out_i = x W_i^T + bias_i for every row block, sharing prepared activations: fused QKV and gate/up
// projections without copying weights. Blocks whose paths need the same activations run in one
// parallel region; at decode that is the only one, prepared by the calling thread.
// `make`, where there is one, writes rows [begin, end) of tokens.x, each once, just before they are
// prepared and by the thread that prepares them: they come from its caches.
// Arguments are trusted; lowbit::linear checks its own.
using MakeRows = std::function<void(std::int64_t begin, std::int64_t end)>;
void linear_multi(const Tokens& tokens, Precision precision, std::span<const RowBlock> blocks,
                  const Threads& threads, const MakeRows& make = {});

// Grow-only memory of the calling thread, 64-byte aligned, reused by every call: slot 0 holds
// prepared activations, slot 1 the scratch of a worker, slots 2 to 5 are free for fused operators.
// Throws Error(kResource) when memory runs out.
std::byte* thread_workspace(int slot, std::int64_t bytes);

}  // namespace lowbit::cpu
