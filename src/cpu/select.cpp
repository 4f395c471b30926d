#include "cpu/select.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "lowbit/dispatch.h"
#include "lowbit/error.h"

namespace lowbit {
namespace cpu {
namespace {

#ifndef LOWBIT_HAVE_AVX2
#define LOWBIT_HAVE_AVX2 0
#endif
#ifndef LOWBIT_HAVE_AVXVNNI
#define LOWBIT_HAVE_AVXVNNI 0
#endif
#ifndef LOWBIT_HAVE_AVX512VNNI
#define LOWBIT_HAVE_AVX512VNNI 0
#endif
#ifndef LOWBIT_HAVE_AVX512BF16
#define LOWBIT_HAVE_AVX512BF16 0
#endif
#ifndef LOWBIT_HAVE_AMX
#define LOWBIT_HAVE_AMX 0
#endif
#ifndef LOWBIT_HAVE_NEON
#define LOWBIT_HAVE_NEON 0
#endif
#ifndef LOWBIT_HAVE_NEONDOT
#define LOWBIT_HAVE_NEONDOT 0
#endif

constexpr std::array<IsaInfo, kIsaCount> kIsas = {{
    {Isa::kScalar, "scalar", true, Isa::kScalar},
    {Isa::kAvx2, "avx2", LOWBIT_HAVE_AVX2 != 0, Isa::kScalar},
    {Isa::kAvxVnni, "avxvnni", LOWBIT_HAVE_AVXVNNI != 0, Isa::kAvx2},
    {Isa::kAvx512Vnni, "avx512vnni", LOWBIT_HAVE_AVX512VNNI != 0, Isa::kAvx2},
    {Isa::kAvx512Bf16, "avx512bf16", LOWBIT_HAVE_AVX512BF16 != 0, Isa::kAvx512Vnni},
    {Isa::kAmx, "amx", LOWBIT_HAVE_AMX != 0, Isa::kAvx512Bf16},
    {Isa::kNeon, "neon", LOWBIT_HAVE_NEON != 0, Isa::kScalar},
    {Isa::kNeonDot, "neondot", LOWBIT_HAVE_NEONDOT != 0, Isa::kNeon},
}};

constexpr int kUndecided = -1;
std::atomic<int> g_active{kUndecided};

std::string join(std::span<const std::string_view> names) {
  std::string text;
  for (std::string_view name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

std::vector<std::string_view> names_of(const Features* machine) {
  std::vector<std::string_view> names;
  for (const IsaInfo& row : kIsas) {
    if (row.compiled && (machine == nullptr || has(*machine, row.isa))) names.push_back(row.name);
  }
  return names;
}

std::string_view forced_by_environment() {
  const char* name = std::getenv("LOWBIT_FORCE_ISA");
  return name == nullptr ? std::string_view() : std::string_view(name);
}

}  // namespace

const IsaInfo& isa_info(Isa isa) {
  return kIsas[static_cast<std::size_t>(isa)];
}

Isa best_isa(const Features& machine) {
  Isa best = Isa::kScalar;
  for (const IsaInfo& row : kIsas) {
    if (row.compiled && has(machine, row.isa)) best = row.isa;
  }
  return best;
}

Isa resolve_isa(std::string_view forced, std::string_view source, const Features& machine) {
  if (forced.empty()) return best_isa(machine);
  for (const IsaInfo& row : kIsas) {
    if (row.name != forced) continue;
    if (row.compiled && has(machine, row.isa)) return row.isa;
    throw Error(ErrorCode::kValue, std::string(source) + ": instruction set '" +
                                       std::string(forced) +
                                       (row.compiled ? "' is not supported by this processor"
                                                     : "' is not part of this build") +
                                       "; available here: " + join(names_of(&machine)));
  }
  throw Error(ErrorCode::kValue, std::string(source) + ": unknown instruction set '" +
                                     std::string(forced) +
                                     "'; available here: " + join(names_of(&machine)));
}

Isa active_level() {
  int level = g_active.load(std::memory_order_acquire);
  if (level == kUndecided) {
    level = static_cast<int>(resolve_isa(forced_by_environment(), "LOWBIT_FORCE_ISA", features()));
    int expected = kUndecided;
    if (!g_active.compare_exchange_strong(expected, level)) level = expected;
  }
  return static_cast<Isa>(level);
}

}  // namespace cpu

std::span<const std::string_view> compiled_isas() {
  static const std::vector<std::string_view> names = cpu::names_of(nullptr);
  return names;
}

std::span<const std::string_view> available_isas() {
  static const std::vector<std::string_view> names = cpu::names_of(&cpu::features());
  return names;
}

std::string_view active_isa() {
  return cpu::isa_info(cpu::active_level()).name;
}

void force_isa(std::string_view name) {
  const cpu::Isa isa = name.empty() ? cpu::resolve_isa(cpu::forced_by_environment(),
                                                       "LOWBIT_FORCE_ISA", cpu::features())
                                    : cpu::resolve_isa(name, "force_isa", cpu::features());
  cpu::g_active.store(static_cast<int>(isa), std::memory_order_release);
}

std::string describe_isa() {
  const cpu::Isa active = cpu::active_level();
  const cpu::Isa best = cpu::best_isa(cpu::features());
  std::string text(cpu::isa_info(active).name);
  text += active == best ? " (the best of this machine" : " (forced; the best of this machine is ";
  if (active != best) text += cpu::isa_info(best).name;
  text += "; available: " + cpu::join(available_isas()) +
          "; compiled: " + cpu::join(compiled_isas()) + ")";
  return text;
}

}  // namespace lowbit
