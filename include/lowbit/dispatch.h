// Which instruction sets there are, which one runs, and how to force one.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace lowbit {

// Worst to best; each level falls back to the one below where it has no kernel of its own.
// x86: scalar, avx2, avxvnni, avx512vnni, avx512bf16, amx. AArch64: scalar, neon, neondot.
std::span<const std::string_view> compiled_isas();   // in this build
std::span<const std::string_view> available_isas();  // in this build and on this machine

// The level in force: LOWBIT_FORCE_ISA if set, else the best available. Throws Error(kValue) for
// an unknown or unavailable forced name, listing those that exist.
std::string_view active_isa();

// Forces a level by name for the whole process ("" = back to the default); for tests and benches.
void force_isa(std::string_view name);

// One line for people: the level, why it was chosen, what the machine has.
std::string describe_isa();

}  // namespace lowbit
