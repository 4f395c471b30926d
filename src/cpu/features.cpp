#include "cpu/features.h"

#include <cstdint>

#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#define LOWBIT_X86 1
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lowbit::cpu {
namespace {

#ifdef LOWBIT_X86

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// Which register files the operating system saves on a context switch: CPUID alone says what the
// chip has, and using what is not saved corrupts other threads.
std::uint64_t saved_state() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// Linux gives tiles to processes that ask for them: saved with every thread that used them, they
// are 8 KiB of its state.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  const Registers one = cpuid(1, 0);
  const bool osxsave = (one.ecx >> 27) & 1;
  if (!osxsave) return f;
  const std::uint64_t saved = saved_state();
  const bool ymm = (saved & 0x6) == 0x6;    // XMM, YMM
  const bool zmm = (saved & 0xe6) == 0xe6;  // and opmask, ZMM high halves, ZMM 16-31
  const Registers seven = cpuid(7, 0);
  const Registers seven_one = cpuid(7, 1);
  const auto bit = [](std::uint32_t word, int n) { return ((word >> n) & 1) != 0; };
  f.avx2 = ymm && bit(one.ecx, 12) /* FMA */ && bit(one.ecx, 29) /* F16C */ &&
           bit(one.ecx, 28) /* AVX */ && bit(seven.ebx, 5) /* AVX2 */ && bit(seven.ebx, 8);
  f.avx512vnni = f.avx2 && zmm && bit(seven.ebx, 16) /* F */ && bit(seven.ebx, 17) /* DQ */ &&
                 bit(seven.ebx, 30) /* BW */ && bit(seven.ebx, 31) /* VL */ &&
                 bit(seven.ecx, 1) /* VBMI */ && bit(seven.ecx, 8) /* GFNI */ &&
                 bit(seven.ecx, 11) /* VNNI */;
  f.avx512bf16 = f.avx512vnni && bit(seven_one.eax, 5);
  f.amx = f.avx512bf16 && (saved & 0x60000) == 0x60000 && bit(seven.edx, 24) /* TILE */ &&
          bit(seven.edx, 22) /* BF16 */ && bit(seven.edx, 25) /* INT8 */ && may_use_tiles();
#if defined(LOWBIT_AVXVNNI_EVEX)
  f.avxvnni = f.avx512vnni;  // a build for tests, see cmake/LowbitIsa.cmake
#else
  f.avxvnni = f.avx2 && bit(seven_one.eax, 4) && bit(seven.ecx, 8) /* GFNI */;
#endif
  return f;
}

#elif defined(__aarch64__)

Features detect() {
  Features f;
  f.neon = true;  // part of the base architecture
#if defined(__linux__)
  constexpr unsigned long kHwcapAsimdDp = 1ul << 20;
  f.neondot = (getauxval(AT_HWCAP) & kHwcapAsimdDp) != 0;
#elif defined(__APPLE__)
  f.neondot = true;  // every Apple processor that runs 64-bit macOS
#endif
  return f;
}

#else

Features detect() {
  return {};
}

#endif

}  // namespace

const Features& features() {
  static const Features detected = detect();
  return detected;
}

bool has(const Features& f, Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return f.avx2;
    case Isa::kAvxVnni:
      return f.avxvnni;
    case Isa::kAvx512Vnni:
      return f.avx512vnni;
    case Isa::kAvx512Bf16:
      return f.avx512bf16;
    case Isa::kAmx:
      return f.amx;
    case Isa::kNeon:
      return f.neon;
    case Isa::kNeonDot:
      return f.neondot;
  }
  return false;
}

long l2_cache_bytes() {
  static const long bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long read = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (read >= 128 * 1024) return read;
#endif
    return 1024l * 1024;
  }();
  return bytes;
}

}  // namespace lowbit::cpu
