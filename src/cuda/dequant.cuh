// Codes in registers to the A operand of a tensor-core multiplication. Every value below is exact
// (nf3 and nf4: the codebook entry rounded to bf16 or fp16); scales come later, in fp32.
//
// Tricks, per pair of weights:
//   integers  or the code into the mantissa of 128.0 (bf16, codes < 128) or 1024.0 (fp16), subtract
//             128 + zero point: one mask-or, one fma
//   int8      in bf16: seven bits as above, less 128 or 256 by the top bit
//   fp8       move sign and magnitude to their fields, multiply by a power of two (subnormals too)
//   tables    one shared-memory load per pair from a table of all pairs, one copy per lane, so that
//             no two lanes of a warp ever want the same bank (the idea is FLUTE's)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/codebooks.cuh"
#include "cuda/device_layout.h"
#include "cuda/kinds.h"
#include "cuda/ptx.cuh"

namespace lowbit::cuda {

constexpr int kLanes = 32;

// Two 16-bit floats {low, high} of the type the tensor core takes.
template <bool kBf16>
__device__ __forceinline__ std::uint32_t float_pair(float low, float high) {
  std::uint32_t d;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  }
  return d;
}

// A codebook's entries as two 16-bit floats per word, for a kernel's parameters: the constant bank
// that holds them is warm when a kernel starts, one with arrays of the program is not.
struct CodebookPairs {
  std::uint32_t words[8];
};

inline CodebookPairs codebook_pairs(Format format, bool bf16) {
  CodebookPairs pairs{};
  for (int code = 0; code < 16; ++code) {
    const float value = codebook_entry(format, code);
    const std::uint32_t bits = bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                    : __half_as_ushort(__float2half_rn(value));
    pairs.words[code / 2] |= bits << (code % 2 * 16);
  }
  return pairs;
}

// Fills the table of pairs; all threads of the block take part, a barrier must follow.
template <Kind kKind>
__device__ __forceinline__ void fill_table(std::uint8_t* table, const CodebookPairs& codebook,
                                           int threads) {
  if constexpr (is_table(kKind)) {
    constexpr int kBits = kind_bits(kKind);
    constexpr int kEntries = 1 << (2 * kBits);
    constexpr int kCodes = 1 << kBits;
    const int lane = threadIdx.x % kLanes;
    // One lane per code, then the entries by shuffles: looking a codebook up per entry took 40 us.
    const std::uint32_t mine = codebook.words[lane % kCodes / 2] >> (lane % 2 * 16);
    auto* const to = reinterpret_cast<std::uint32_t*>(table) + lane;
#pragma unroll 4
    for (int entry = threadIdx.x / kLanes; entry < kEntries; entry += threads / kLanes) {
      const std::uint32_t low = __shfl_sync(0xffffffffu, mine, entry % kCodes);
      const std::uint32_t high = __shfl_sync(0xffffffffu, mine, entry / kCodes);
      to[entry * kLanes] = __byte_perm(low, high, 0x5410);
    }
  }
}

// What is subtracted from every integer code after it was or-ed into a mantissa.
inline std::uint32_t zero_pair_of(Format format, bool bf16) {
  // 128 + z in bf16 is 0x4300 | z for z < 128; 1024 + z in fp16 is 0x6400 | z.
  const std::uint32_t one =
      (bf16 ? 0x4300u : 0x6400u) | static_cast<std::uint32_t>(zero_point(format));
  const std::uint32_t negative = one | 0x8000u;
  return negative << 16 | negative;
}

// What decoding needs beside the codes.
struct Decoding {
  std::uint32_t zero_pair;
  const std::uint8_t* table;  // of pairs
  std::uint32_t lane_entry;   // the lane's copy in it, as a byte offset
};

// A lane's codes of one 16 x 64 block.
template <Kind kKind>
struct LaneCodes {
  static constexpr int kWords = kind_bits(kKind) == 8 ? 8 : kKind == Kind::kLut3 ? 3 : 4;
  std::uint32_t words[kWords];
  std::uint32_t plane;

  // From a block in shared memory.
  __device__ __forceinline__ void load(const std::uint8_t* block, int lane) {
    if constexpr (kKind == Kind::kLut3) {
      const uint2 two = reinterpret_cast<const uint2*>(block)[lane];
      words[0] = two.x;
      words[1] = two.y;
      words[2] = reinterpret_cast<const std::uint32_t*>(block)[64 + lane];
    } else {
      const uint4 four = reinterpret_cast<const uint4*>(block)[lane];
      words[0] = four.x;
      words[1] = four.y;
      words[2] = four.z;
      words[3] = four.w;
      if constexpr (kWords == 8) {
        const uint4 more = reinterpret_cast<const uint4*>(block + 512)[lane];
        words[4] = more.x;
        words[5] = more.y;
        words[6] = more.z;
        words[7] = more.w;
      }
      if constexpr (kKind == Kind::kInt5) {
        plane = reinterpret_cast<const std::uint32_t*>(block)[128 + lane];
      }
    }
  }

  // Pair `c` as two floats. c is a compile-time constant after unrolling. kShifted, of integers up
  // to 5 bits: 128 + code (fp16: 1024 + code).
  template <bool kBf16, bool kShifted = false>
  __device__ __forceinline__ std::uint32_t pair(int c, const Decoding& how) const {
    const int step = c / 4;
    const int i = c % 4;
    const std::uint32_t zero_pair = how.zero_pair;
    if constexpr (kKind == Kind::kInt4 || kKind == Kind::kInt5) {
      const std::uint32_t word = words[step] >> (4 * i);
      std::uint32_t bits;
      if constexpr (kBf16) {
        bits = and_or<0x000f000f, 0x43004300>(word);
      } else {
        bits = and_or<0x000f000f, 0x64006400>(word);
      }
      if constexpr (kKind == Kind::kInt5) {
        const std::uint32_t top = c < 4 ? plane << (4 - c) : plane >> (c - 4);
        bits |= top & 0x00100010;
      }
      if constexpr (kShifted) return bits;
      return fma_pair<kBf16>(bits, kBf16 ? 0x3f803f80u : 0x3c003c00u, zero_pair);
    } else if constexpr (kKind == Kind::kInt8) {
      const std::uint32_t word = words[2 * step + i / 2];
      if constexpr (kBf16) {
        const std::uint32_t codes = i % 2 ? word >> 8 : word;
        const std::uint32_t low = and_or<0x007f007f, 0x43004300>(codes);
        const std::uint32_t high = (codes & 0x00800080) ^ 0x43804380;  // 128 if the bit is set
        return fma_pair<true>(high, 0xbf80bf80u, low);
      } else {
        const std::uint32_t bits = __byte_perm(word, 0x64646464u, i % 2 ? 0x4341 : 0x4240);
        return fma_pair<false>(bits, 0x3c003c00u, zero_pair);
      }
    } else if constexpr (kKind == Kind::kE4M3 || kKind == Kind::kE5M2) {
      const std::uint32_t word = words[2 * step + i / 2];
      const std::uint32_t codes = i % 2 ? word : word << 8;  // in the high byte of each half
      if constexpr (kKind == Kind::kE5M2 && !kBf16) {
        return codes & 0xff00ff00;
      } else if constexpr (kKind == Kind::kE5M2) {
        const std::uint32_t bits = (codes & 0x80008000) | (codes >> 3 & 0x0fe00fe0);
        return fma_pair<true>(bits, 0x77807780u, 0x80008000u);  // 2^112
      } else if constexpr (kBf16) {
        const std::uint32_t bits = (codes & 0x80008000) | (codes >> 4 & 0x07f007f0);
        return fma_pair<true>(bits, 0x7b807b80u, 0x80008000u);  // 2^120
      } else {
        const std::uint32_t bits = (codes & 0x80008000) | (codes >> 1 & 0x3f803f80);
        return fma_pair<false>(bits, 0x5c005c00u, 0x80008000u);  // 2^8
      }
    } else if constexpr (kKind == Kind::kLut4) {
      const std::uint32_t word = i == 0 ? words[step] << 7 : words[step] >> (8 * i - 7);
      return entry(how, and_or_with<0x7f80>(word, how.lane_entry));
    } else {
      std::uint32_t at;
      if (c == 15) {
        at = (words[0] >> 30 | (words[1] >> 28 & 12) | (words[2] >> 26 & 48)) << 7;
      } else {
        const int shift = 6 * (c % 5) - 7;
        const std::uint32_t word = words[c / 5];
        at = shift < 0 ? word << -shift : word >> shift;
      }
      return entry(how, and_or_with<0x1f80>(at, how.lane_entry));
    }
  }

  static __device__ __forceinline__ std::uint32_t entry(const Decoding& how, std::uint32_t at) {
    return *reinterpret_cast<const std::uint32_t*>(how.table + at);
  }

  // The A operand of k-step `step`.
  template <bool kBf16, bool kShifted = false>
  __device__ __forceinline__ void operand(std::uint32_t (&a)[4], int step,
                                          const Decoding& how) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pair<kBf16, kShifted>(4 * step + i, how);
  }
};

}  // namespace lowbit::cuda
