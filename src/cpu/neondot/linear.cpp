// The integer formats at this level; see generic/neon_linear.h.
#include "cpu/generic/neon_linear.h"

namespace lowbit::cpu {

const Path* select_linear_neondot(const Layout& layout, Precision, std::int64_t) {
  return neon_select(layout);
}

}  // namespace lowbit::cpu
