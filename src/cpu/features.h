// What this processor and operating system can run.
#pragma once

#include <string>

namespace lowbit::cpu {

// Levels as in lowbit/dispatch.h, worst to best per architecture. A level promises every
// instruction of the levels before it on the same architecture, except that avxvnni and avx512vnni
// are siblings: processors with the second often lack the first.
enum class Isa : int {
  kScalar = 0,
  kAvx2,
  kAvxVnni,
  kAvx512Vnni,
  kAvx512Bf16,
  kAmx,
  kNeon,
  kNeonDot,
};
inline constexpr int kIsaCount = 8;

struct Features {
  // x86; each is true only if the operating system also saves the registers (XGETBV).
  bool avx2 = false;        // AVX2, FMA, F16C, BMI2
  bool avxvnni = false;     // avx2 and AVX-VNNI
  bool avx512vnni = false;  // AVX-512 F BW DQ VL VBMI VNNI, GFNI
  bool avx512bf16 = false;  // avx512vnni and AVX512_BF16
  bool amx = false;         // avx512bf16, AMX tiles of bfloat16 and int8
  // AArch64
  bool neon = false;
  bool neondot = false;
};

// Detected once, on first use.
const Features& features();

bool has(const Features& features, Isa isa);

// Bytes of the second-level cache of one core; 1 MiB where it cannot be read.
long l2_cache_bytes();

}  // namespace lowbit::cpu
