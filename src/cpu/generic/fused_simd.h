// The kernels of fused_kernels.h, written once over vectors of the widest float registers that the
// including file is compiled for.
#pragma once

#include "cpu/generic/fused_attend.h"
#include "cpu/generic/fused_cache.h"
#include "cpu/generic/fused_functions.h"
#include "cpu/generic/fused_norm.h"

namespace lowbit::cpu {
namespace {

constexpr FusedKernels kernels_named(const char* name) {
  return {name, load_floats,    store_floats, norm,      add_scaled, activate,         rotate,
          dots, attend_scratch, attend,       cache_put, cache_get,  cache_get_scratch};
}

}  // namespace
}  // namespace lowbit::cpu
