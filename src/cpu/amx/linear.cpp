// Which path serves a problem where there are tiles (AMX). What has no path here runs those of
// avx512bf16.
#include "cpu/amx/paths.h"
#include "cpu/linear_driver.h"

namespace lowbit::cpu {

const Path* select_linear_amx(const Layout& layout, Precision precision, std::int64_t m) {
  switch (resolve_precision(layout.format, precision, m)) {
    case Precision::kInt8:
    case Precision::kBf16:
    default:
      return nullptr;
  }
}

}  // namespace lowbit::cpu
