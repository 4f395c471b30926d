// The level in force and the table of levels; lowbit/dispatch.h is the public face of it.
#pragma once

#include <string>
#include <string_view>

#include "cpu/features.h"

namespace lowbit::cpu {

struct IsaInfo {
  Isa isa;
  std::string_view name;
  bool compiled;  // this build has kernels for it
  Isa fallback;   // where a missing kernel is looked for next
};

// kIsaCount rows in the order of Isa.
const IsaInfo& isa_info(Isa isa);

// Best level of `features` that is compiled in.
Isa best_isa(const Features& features);

// Which level `forced` names on a machine with `features` ("" = the best). Throws Error(kValue)
// listing the levels that exist. `source` says where the name came from, for the error text.
Isa resolve_isa(std::string_view forced, std::string_view source, const Features& features);

// The level in force: force_isa(), else LOWBIT_FORCE_ISA, else the best. One atomic load after the
// first call.
Isa active_level();

}  // namespace lowbit::cpu
