// The level below all others, for any machine: each row tile is expanded to float32 once and then
// used by every token. Exact weights whatever the precision asked for.
#include <cmath>

#include "cpu/generic/convert.h"
#include "cpu/generic/decode.h"
#include "cpu/linear_kernels.h"

namespace lowbit::cpu {
namespace {

// Prepared activations: [m][k_padded] float32, padding zero.
std::int64_t activation_bytes(const Activations& a) {
  return a.m * a.k_padded * 4;
}

void prepare(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    float* to = reinterpret_cast<float*>(a.data) + t * a.k_padded;
    for (std::int64_t k = 0; k < a.k; ++k) {
      to[k] = load_float(tokens.x, tokens.dtype, t * tokens.stride + k);
    }
    for (std::int64_t k = a.k; k < a.k_padded; ++k) to[k] = 0.0f;
  }
}

// One expanded tile: [k_padded][16] float32.
std::int64_t scratch_bytes(const RowBlock& rows, const Activations&) {
  return rows.layout.k_padded * kTileRows * 4;
}

void expand(const RowBlock& rows, const std::byte* tile, float* weights) {
  const Layout& layout = rows.layout;
  const FormatInfo& info = format_info(layout.format);
  std::int64_t k0 = 0;
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    const std::int64_t inputs = layout.group_inputs(g);
    const std::byte* codes = tile + layout.codes_offset(g);
    for (int r = 0; r < kTileRows; ++r) {
      float scale = 1.0f, minimum = 0.0f;
      if (info.grouped()) {
        std::uint16_t half;
        std::memcpy(&half, tile + layout.scales_offset(g) + 2 * r, 2);
        scale = fast_half_to_float(half);
      } else if (info.scale_kind == ScaleKind::kRow) {
        std::memcpy(&scale, tile + layout.scales_offset(0) + 4 * r, 4);
      }
      if (info.scale_kind == ScaleKind::kGroupMinimum) {
        std::uint16_t half;
        std::memcpy(&half, tile + layout.minima_offset(g) + 2 * r, 2);
        minimum = fast_half_to_float(half);
      }
      for (std::int64_t k = 0; k < inputs; ++k) {
        weights[(k0 + k) * kTileRows + r] =
            scale * code_value(info, code_at(info.bits, codes, inputs, r, k)) + minimum;
      }
    }
    k0 += inputs;
  }
}

void run(const RowBlock& rows, const Activations& a, std::int64_t first_token,
         std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
         std::int64_t token_end, std::int64_t, std::byte* scratch) {
  const Layout& layout = rows.layout;
  float* weights = reinterpret_cast<float*>(scratch);
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    expand(rows, rows.packed + tile * layout.tile_bytes, weights);
    for (std::int64_t t = token_begin; t < token_end; ++t) {
      const float* x = reinterpret_cast<const float*>(a.data) + t * a.k_padded;
      float total[kTileRows] = {};
      // Sums of 32 added to a total: the error grows with K/32 + 32 terms instead of K. Real inputs
      // only: an infinite activation times a padding zero must not make NaN of it.
      for (std::int64_t k0 = 0; k0 < a.k; k0 += kInputBlock) {
        const std::int64_t k1 = k0 + kInputBlock < a.k ? k0 + kInputBlock : a.k;
        float sum[kTileRows] = {};
        for (std::int64_t k = k0; k < k1; ++k) {
          for (int r = 0; r < kTileRows; ++r) sum[r] += weights[k * kTileRows + r] * x[k];
        }
        for (int r = 0; r < kTileRows; ++r) total[r] += sum[r];
      }
      const std::int64_t row0 = tile * kTileRows;
      for (int r = 0; r < kTileRows && row0 + r < layout.n; ++r) {
        float value = std::ldexp(total[r], rows.exponent);
        if (rows.bias != nullptr) value += load_float(rows.bias, rows.bias_dtype, row0 + r);
        store_float(rows.out, rows.out_dtype, (first_token + t) * rows.out_stride + row0 + r,
                    value);
      }
    }
  }
}

constexpr Path kPath = {
    "scalar.fp32", "scalar.fp32", activation_bytes, prepare, scratch_bytes, run, 1, 1, true};

}  // namespace

const Path* select_linear_scalar(const Layout&, Precision, std::int64_t) {
  return &kPath;
}

}  // namespace lowbit::cpu
