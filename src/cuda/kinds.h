// What kernels ask of a kind of codes. Plain C++.
#pragma once

#include "cuda/device_layout.h"

namespace lowbit::cuda {

LOWBIT_HD constexpr bool is_table(Kind kind) {
  return kind == Kind::kLut4 || kind == Kind::kLut3;
}
LOWBIT_HD constexpr bool has_row_scale(Kind kind) {
  return kind == Kind::kE4M3 || kind == Kind::kE5M2 || is_raw(kind);
}
// Tables of pairs: one 4-byte entry per pair of codes and lane.
LOWBIT_HD constexpr int table_bytes(Kind kind) {
  return kind == Kind::kLut4 ? 256 * 32 * 4 : kind == Kind::kLut3 ? 64 * 32 * 4 : 0;
}

// What the scales of a block are. Known at compile time, for branches inside a unit would keep the
// compiler from interleaving its blocks.
enum class Scales { kPlain, kMinima, kAny };  // kAny: groups of 32, with or without minima

}  // namespace lowbit::cuda
