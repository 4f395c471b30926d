#include "limits.h"

#include "cpu/features.h"
#include "cpu/select.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit::bench {
namespace {

#if defined(__x86_64__)

// Lines fetched a page ahead to the second level, then to the first: the fastest of the ways tried
// on an Intel Xeon (35 GB/s; fetched to the first level at once, or left to the hardware, 30).
[[gnu::target("avx512f")]] std::uint64_t read_avx512(const std::byte* data, std::int64_t bytes) {
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                    _mm512_setzero_si512()};
  for (std::int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) {
      const char* line = reinterpret_cast<const char*>(data + i + j * 64);
      _mm_prefetch(line + 4096, _MM_HINT_T1);
      _mm_prefetch(line + 512, _MM_HINT_T0);
      sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(data + i + j * 64));
    }
  }
  const __m512i all =
      _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(all));
}

[[gnu::target("avx2")]] std::uint64_t read_avx2(const std::byte* data, std::int64_t bytes) {
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                    _mm256_setzero_si256()};
  for (std::int64_t i = 0; i + 128 <= bytes; i += 128) {
    const char* line = reinterpret_cast<const char*>(data + i);
    for (int j = 0; j < 128; j += 64) {
      _mm_prefetch(line + j + 4096, _MM_HINT_T1);
      _mm_prefetch(line + j + 512, _MM_HINT_T0);
    }
    for (int j = 0; j < 4; ++j) {
      const auto* p = reinterpret_cast<const __m256i*>(data + i + j * 32);
      sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(p));
    }
  }
  const __m256i all =
      _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<std::uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 2));
}

// Twelve independent chains of one instruction: more than latency times throughput anywhere.
#define LOWBIT_CHAINS(op)                                                                       \
  for (std::int64_t i = 0; i < iterations; ++i) {                                               \
    __asm__ volatile(op "0\n" op "1\n" op "2\n" op "3\n" op "4\n" op "5\n" op "6\n" op "7\n" op \
                        "8\n" op "9\n" op "10\n" op "11\n" ::                                   \
                            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",   \
                              "xmm8", "xmm9", "xmm10", "xmm11");                                \
  }

[[gnu::target("avx512f")]] void clear() {
  __asm__ volatile(
      "vpxor %%xmm14, %%xmm14, %%xmm14\n vpxor %%xmm15, %%xmm15, %%xmm15\n"
      "vzeroall\n" ::
          : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
            "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

// Six accumulators of one pair of tiles: a product takes 16 cycles, and waiting for its result 52.
#define LOWBIT_TILE_PRODUCTS(op)                                                        \
  for (std::int64_t i = 0; i < iterations; ++i) {                                       \
    __asm__ volatile(op " %%tmm7, %%tmm6, %%tmm0\n" op " %%tmm7, %%tmm6, %%tmm1\n" op   \
                        " %%tmm7, %%tmm6, %%tmm2\n" op " %%tmm7, %%tmm6, %%tmm3\n" op   \
                        " %%tmm7, %%tmm6, %%tmm4\n" op " %%tmm7, %%tmm6, %%tmm5\n" ::); \
  }

// Multiplications and additions of tiles of 16 rows x 64 bytes.
double burn_tiles(bool int8, std::int64_t iterations) {
  struct {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));  // zeroes the tiles
  if (int8) {
    LOWBIT_TILE_PRODUCTS("tdpbusd")
  } else {
    LOWBIT_TILE_PRODUCTS("tdpbf16ps")
  }
  __asm__ volatile("tilerelease");
  return static_cast<double>(iterations) * 6 * 16 * 16 * (int8 ? 128 : 64);
}

#endif

}  // namespace

std::uint64_t read_all(const std::byte* data, std::int64_t bytes) {
#if defined(__x86_64__)
  if (cpu::features().avx512vnni) return read_avx512(data, bytes);
  if (cpu::features().avx2) return read_avx2(data, bytes);
#endif
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i + 8 <= bytes; i += 8) {
    sum ^= *reinterpret_cast<const std::uint64_t*>(data + i);
  }
  return sum;
}

double burn(Rate rate, std::int64_t iterations) {
#if defined(__x86_64__)
  const cpu::Features& f = cpu::features();
  if (!f.avx2) return 0;
  if (rate != Rate::kF32 && cpu::active_level() == cpu::Isa::kAmx) {
    return burn_tiles(rate == Rate::kInt8, iterations / 16);
  }
  clear();
  if (rate == Rate::kInt8 && f.avx512vnni) {
    LOWBIT_CHAINS("vpdpbusd %%zmm14, %%zmm15, %%zmm")
    return static_cast<double>(iterations) * 12 * 128;
  }
  if (rate == Rate::kBf16 && f.avx512bf16) {
    LOWBIT_CHAINS("vdpbf16ps %%zmm14, %%zmm15, %%zmm")
    return static_cast<double>(iterations) * 12 * 64;
  }
  if (f.avx512vnni) {
    LOWBIT_CHAINS("vfmadd231ps %%zmm14, %%zmm15, %%zmm")
    return static_cast<double>(iterations) * 12 * 32;
  }
  LOWBIT_CHAINS("vfmadd231ps %%ymm14, %%ymm15, %%ymm")
  return static_cast<double>(iterations) * 12 * 16 * (rate == Rate::kInt8 ? 4 : 1);
#else
  (void)rate;
  (void)iterations;
  return 0;
#endif
}

const char* rate_name(Rate rate) {
  return rate == Rate::kInt8 ? "int8" : rate == Rate::kBf16 ? "bf16" : "fp32";
}

}  // namespace lowbit::bench
