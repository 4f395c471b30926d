// Registered decoder blocks, by handle.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "lowbit/fused.h"

namespace lowbit::binding {

struct Block {
  BlockSpec spec;
  std::vector<Tensor> tensors;  // what the pointers of `spec` point into
};

// The block that fused_register() gave `handle`; `op` names the operator that wants it.
std::shared_ptr<const Block> block_of(const char* op, std::int64_t handle);

// Outputs of all matrices.
std::int64_t columns_of(const std::vector<PackedMatrix>& matrices);

}  // namespace lowbit::binding
