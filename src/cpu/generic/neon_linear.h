// NEON linear kernels for the integer formats: two int8 planes of activations (|q| <= 127 * 256, as
// on every level), signed weight bytes, exact integer sums per group. The kernel is written once;
// the folders differ in how sixteen bytes are multiplied and summed:
//   neondot  sdot: four products per lane, lane = row
//   neon     smull, then pairwise accumulation: two lanes per row, joined at the end of the group
// One token at a time: correctness is claimed here, speed is not.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpu/generic/convert.h"
#include "cpu/linear_kernels.h"

namespace lowbit::cpu {
namespace {

#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kDot = true;
#else
constexpr bool kDot = false;
#endif

// Per token: planes [2][k_padded] int8, [groups] step float32, [groups] sum of q int32.
struct NeonRow {
  std::int64_t step_at, sum_at, stride;
  explicit NeonRow(const Activations& a)
      : step_at(2 * a.k_padded),
        sum_at(step_at + 4 * a.groups),
        stride((sum_at + 4 * a.groups + 63) / 64 * 64) {}
};

std::int64_t neon_activation_bytes(const Activations& a) {
  return a.m * NeonRow(a).stride;
}

void neon_prepare(const Tokens& tokens, const Activations& a, std::int64_t begin,
                  std::int64_t end) {
  constexpr float kLevels = 127.0f * 256.0f;
  constexpr float kTiny = 0x1p-100f;  // such groups count as zero; 1 / step would overflow
  const NeonRow sizes(a);
  for (std::int64_t t = begin; t < end; ++t) {
    std::byte* row = a.data + t * sizes.stride;
    std::int8_t* planes = reinterpret_cast<std::int8_t*>(row);
    float* steps = reinterpret_cast<float*>(row + sizes.step_at);
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(row + sizes.sum_at);
    const auto at = [&](std::int64_t k) {
      return k < a.k ? load_float(tokens.x, tokens.dtype, t * tokens.stride + k) : 0.0f;
    };
    for (std::int64_t g = 0; g < a.groups; ++g) {
      const std::int64_t k0 = g * a.group;
      const std::int64_t k1 = k0 + a.group < a.k_padded ? k0 + a.group : a.k_padded;
      std::uint32_t top = 0;
      for (std::int64_t k = k0; k < k1; ++k) {
        const std::uint32_t magnitude = float_to_bits(at(k)) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
      }
      const float absmax = bits_to_float(top);
      const bool finite = top < 0x7f800000u;
      const bool zero = !finite || absmax < kTiny;
      const float inverse = zero ? 0.0f : kLevels / absmax;
      steps[g] = finite ? (zero ? 0.0f : absmax / kLevels) : __builtin_nanf("");
      std::int32_t sum = 0;
      for (std::int64_t k = k0; k < k1; ++k) {
        const std::int32_t q =
            zero ? 0 : static_cast<std::int32_t>(__builtin_rintf(at(k) * inverse));
        const std::int32_t high = (q + 128) >> 8;
        planes[k] = static_cast<std::int8_t>(high);
        planes[a.k_padded + k] = static_cast<std::int8_t>(q - 256 * high);
        sum += q;
      }
      sums[g] = sum;
    }
  }
}

// Rows 4s .. 4s + 3 of quad i of a block of 32 inputs, value = code - zero point, as int8.
template <int kBits, int kZero>
[[gnu::always_inline]] inline int8x16_t neon_quad(const std::byte* codes, std::int64_t inputs,
                                                  std::int64_t block, int i, int s) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(codes);
  uint8x16_t code;
  if constexpr (kBits == 8) {
    code = vld1q_u8(bytes + (block * 8 + i) * 64 + s * 16);
  } else {
    const uint8x16_t unit = vld1q_u8(bytes + (block * 4 + i / 2) * 64 + s * 16);
    code = i % 2 == 0 ? vandq_u8(unit, vdupq_n_u8(15)) : vshrq_n_u8(unit, 4);
    if constexpr (kBits == 5) {
      const std::uint8_t* plane = bytes + inputs * 8 + (block * 8 + i) * 8 + s * 2;
      const uint8x16_t spread = vcombine_u8(vdup_n_u8(plane[0]), vdup_n_u8(plane[1]));
      const uint8x8_t half = vcreate_u8(0x8040201008040201ull);
      const uint8x16_t fifth = vtstq_u8(spread, vcombine_u8(half, half));
      code = vorrq_u8(code, vandq_u8(fifth, vdupq_n_u8(16)));
    }
  }
  return vreinterpretq_s8_u8(vsubq_u8(code, vdupq_n_u8(kZero)));
}

template <int kBits, int kZero, bool kMinimum>
void neon_tile(const Layout& layout, const std::byte* tile, const std::byte* x,
               const NeonRow& sizes, float (&total)[16]) {
  const auto* planes = reinterpret_cast<const std::int8_t*>(x);
  for (float& value : total) value = 0.0f;
  std::int64_t k0 = 0;
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    const std::int64_t inputs = layout.group_inputs(g);
    const std::byte* codes = tile + layout.codes_offset(g);
    // [plane][four rows][half]: half 1 only without sdot.
    int32x4_t sum[2][4][2];
    for (auto& plane : sum) {
      for (auto& rows : plane) rows[0] = rows[1] = vdupq_n_s32(0);
    }
    for (std::int64_t b = 0; b < inputs / kInputBlock; ++b) {
      for (int i = 0; i < 8; ++i) {
        int8x16_t q[2];
        for (int p = 0; p < 2; ++p) {
          std::int32_t word;
          __builtin_memcpy(&word, planes + p * layout.k_padded + k0 + b * 32 + i * 4, 4);
          q[p] = vreinterpretq_s8_s32(vdupq_n_s32(word));
        }
        for (int s = 0; s < 4; ++s) {
          const int8x16_t w = neon_quad<kBits, kZero>(codes, inputs, b, i, s);
          for (int p = 0; p < 2; ++p) {
#if defined(__ARM_FEATURE_DOTPROD)
            sum[p][s][0] = vdotq_s32(sum[p][s][0], w, q[p]);
#else
            sum[p][s][0] = vpadalq_s16(sum[p][s][0], vmull_s8(vget_low_s8(w), vget_low_s8(q[p])));
            sum[p][s][1] = vpadalq_s16(sum[p][s][1], vmull_s8(vget_high_s8(w), vget_low_s8(q[p])));
#endif
          }
        }
      }
    }
    float step;
    std::int32_t q_sum;
    __builtin_memcpy(&step, x + sizes.step_at + g * 4, 4);
    __builtin_memcpy(&q_sum, x + sizes.sum_at + g * 4, 4);
    const float minimum_of = step * static_cast<float>(q_sum);
    const std::byte* scales = tile + layout.scales_offset(g);
    for (int s = 0; s < 4; ++s) {
      int32x4_t part[2];
      for (int p = 0; p < 2; ++p) {
        part[p] = kDot ? sum[p][s][0] : vpaddq_s32(sum[p][s][0], sum[p][s][1]);
      }
      const int32x4_t whole = vaddq_s32(vshlq_n_s32(part[0], 8), part[1]);
      const float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(whole), step);
      float32x4_t to = vld1q_f32(total + 4 * s);
      const auto* halves = reinterpret_cast<const __fp16*>(scales);
      to = vfmaq_f32(to, value, vcvt_f32_f16(vld1_f16(halves + 4 * s)));
      if constexpr (kMinimum) {
        to = vfmaq_n_f32(to, vcvt_f32_f16(vld1_f16(halves + 16 + 4 * s)), minimum_of);
      }
      vst1q_f32(total + 4 * s, to);
    }
    k0 += inputs;
  }
}

std::int64_t neon_no_scratch(const RowBlock&, const Activations&) {
  return 0;
}

template <int kBits, int kZero, bool kMinimum>
void neon_run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
              std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
              std::int64_t token_end, std::int64_t, std::byte*) {
  const NeonRow sizes(a);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::byte* bytes = rows.packed + tile * rows.layout.tile_bytes;
    for (std::int64_t t = token_begin; t < token_end; ++t) {
      alignas(16) float total[16];
      neon_tile<kBits, kZero, kMinimum>(rows.layout, bytes, a.data + t * sizes.stride, sizes,
                                        total);
      const std::int64_t row = tile * kTileRows;
      for (int r = 0; r < kTileRows && row + r < rows.layout.n; ++r) {
        float value = rows.exponent == 0 ? total[r] : __builtin_ldexpf(total[r], rows.exponent);
        if (rows.bias != nullptr) value += load_float(rows.bias, rows.bias_dtype, row + r);
        store_float(rows.out, rows.out_dtype, (first_token + t) * rows.out_stride + row + r, value);
      }
    }
  }
}

template <int kBits, int kZero, bool kMinimum>
constexpr Path neon_path(const char* name) {
  return {name,
          kDot ? "neondot.int8x2" : "neon.int8x2",
          neon_activation_bytes,
          neon_prepare,
          neon_no_scratch,
          neon_run<kBits, kZero, kMinimum>,
          1,
          1,
          false};
}

#define LOWBIT_NEON_NAME(format) kDot ? "neondot.int8x2." format : "neon.int8x2." format

constexpr Path kNeonPaths[] = {
    neon_path<4, 8, false>(LOWBIT_NEON_NAME("sym_int4")),
    neon_path<4, 0, true>(LOWBIT_NEON_NAME("asym_int4")),
    neon_path<5, 16, false>(LOWBIT_NEON_NAME("sym_int5")),
    neon_path<5, 0, true>(LOWBIT_NEON_NAME("asym_int5")),
    neon_path<8, 128, false>(LOWBIT_NEON_NAME("sym_int8")),
};

// The integer formats are the first five; the others fall to the scalar level.
[[gnu::always_inline]] inline const Path* neon_select(const Layout& layout) {
  const int i = static_cast<int>(layout.format);
  return i < 5 ? &kNeonPaths[i] : nullptr;
}

}  // namespace
}  // namespace lowbit::cpu
