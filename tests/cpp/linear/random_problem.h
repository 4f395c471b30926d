// Random packed matrices and activations, made without the quantizers: every code and every scale
// that a file may hold occurs, and the kernels' tests do not depend on how weights are chosen.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "format/floats.h"
#include "lowbit/format.h"
#include "lowbit/linear.h"

namespace lowbit::testing {

struct FreeBytes {
  void operator()(std::byte* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<std::byte[], FreeBytes>;

inline AlignedBytes aligned_bytes(std::int64_t bytes) {
  const std::size_t size =
      static_cast<std::size_t>((std::max<std::int64_t>(bytes, 64) + 63) / 64 * 64);
  AlignedBytes memory(static_cast<std::byte*>(std::aligned_alloc(64, size)));
  std::memset(memory.get(), 0, size);
  return memory;
}

// Writes the stored code of row r, input k of a group (see format.h for the drawing).
inline void put_code(int bits, std::byte* codes, std::int64_t inputs, int r, std::int64_t k,
                     unsigned code) {
  const auto set = [&](std::int64_t byte, int shift, unsigned value) {
    codes[byte] |= static_cast<std::byte>(value << shift);
  };
  const auto set_plane = [&](std::byte* plane, unsigned bit) {
    const std::int64_t position = 4 * r + k % 4;
    plane[k / 4 * 8 + position / 8] |= static_cast<std::byte>(bit << (position % 8));
  };
  switch (bits) {
    case 16:
      set(k / 2 * 64 + 4 * r + k % 2 * 2, 0, code & 255u);
      set(k / 2 * 64 + 4 * r + k % 2 * 2 + 1, 0, code >> 8);
      break;
    case 8:
      set(k / 4 * 64 + 4 * r + k % 4, 0, code);
      break;
    case 4:
    case 5:
      set(k / 8 * 64 + 4 * r + k % 4, static_cast<int>(k % 8 / 4 * 4), code & 15u);
      if (bits == 5) set_plane(codes + inputs * 8, code >> 4);
      break;
    default:
      set(k / 16 * 64 + 4 * r + k % 4, static_cast<int>(k % 16 / 4 * 2), code & 3u);
      set_plane(codes + inputs * 4, code >> 2);
  }
}

struct Weights {
  Layout layout;
  AlignedBytes packed;
  int exponent = 0;
  std::vector<double> values;      // [n][k], exact, exponent included
  std::vector<double> magnitudes;  // [n][k]: |s * value| + |m|, what float sums round
  std::vector<double> steps;       // [n][k]: |s| of the weight's group (1 where there is none)
};

inline double code_number(const FormatInfo& info, unsigned code) {
  switch (info.code_kind) {
    case CodeKind::kInteger:
      return static_cast<int>(code) - info.zero_point;
    case CodeKind::kTable:
      return info.codebook[code];
    case CodeKind::kFloat:
      break;
  }
  switch (info.format) {
    case Format::kFp16:
      return decode_float(kHalfKind, code);
    case Format::kBf16:
      return decode_float(kBrainKind, code);
    case Format::kFp8E4M3:
      return decode_float(kFp8E4M3Kind, code);
    default:
      return decode_float(kFp8E5M2Kind, code);
  }
}

inline Weights random_weights(Format format, std::int64_t n, std::int64_t k, int group_size,
                              std::mt19937_64& rng, int exponent = 0) {
  Weights w;
  w.layout = make_layout(format, n, k, group_size);
  w.exponent = exponent;
  w.packed = aligned_bytes(w.layout.bytes());
  w.values.resize(static_cast<std::size_t>(n * k));
  w.magnitudes.resize(w.values.size());
  w.steps.resize(w.values.size());
  const FormatInfo& info = format_info(format);
  std::normal_distribution<double> normal;
  const auto half = [&](double value) {
    return static_cast<std::uint16_t>(encode_float(kHalfKind, value));
  };
  for (std::int64_t tile = 0; tile < w.layout.tiles; ++tile) {
    std::byte* base = w.packed.get() + tile * w.layout.tile_bytes;
    std::int64_t k0 = 0;
    for (std::int64_t g = 0; g < w.layout.groups; ++g) {
      const std::int64_t inputs = w.layout.group_inputs(g);
      for (int r = 0; r < kTileRows; ++r) {
        const std::int64_t row = tile * kTileRows + r;
        double scale = info.grouped() || info.scale_kind == ScaleKind::kRow ? 0.0 : 1.0;
        double minimum = 0;
        if (row < n && info.grouped()) {
          const bool zero = rng() % 50 == 0;
          const std::uint16_t bits = zero ? 0 : half(0.02 * normal(rng));
          scale = decode_float(kHalfKind, bits);
          std::memcpy(base + w.layout.scales_offset(g) + 2 * r, &bits, 2);
          if (info.scale_kind == ScaleKind::kGroupMinimum) {
            const std::uint16_t low = half(0.2 * normal(rng));
            minimum = decode_float(kHalfKind, low);
            std::memcpy(base + w.layout.minima_offset(g) + 2 * r, &low, 2);
          }
        } else if (row < n && info.scale_kind == ScaleKind::kRow) {
          const float row_scale = static_cast<float>(std::exp(normal(rng)) / info.value_max);
          scale = row_scale;
          std::memcpy(base + w.layout.scales_offset(0) + 4 * r, &row_scale, 4);
        }
        for (std::int64_t i = 0; i < inputs; ++i) {
          unsigned code = info.padding_code;
          if (row < n && k0 + i < k) {
            if (info.code_kind != CodeKind::kFloat) {
              code = static_cast<unsigned>(info.code_min) +
                     static_cast<unsigned>(
                         rng() % static_cast<unsigned>(info.code_max - info.code_min + 1));
            } else if (info.bits == 8) {
              do code = static_cast<unsigned>(rng() % 256);
              while (!std::isfinite(code_number(info, code)));
            } else {
              const FloatKind& kind = format == Format::kFp16 ? kHalfKind : kBrainKind;
              code = encode_float(kind, normal(rng));
            }
          }
          put_code(info.bits, base + w.layout.codes_offset(g), inputs, r, i, code);
          if (row < n && k0 + i < k) {
            const std::size_t at = static_cast<std::size_t>(row * k + k0 + i);
            const double value = scale * code_number(info, code);
            w.values[at] = std::ldexp(value + minimum, exponent);
            w.magnitudes[at] = std::ldexp(std::fabs(value) + std::fabs(minimum), exponent);
            // Integer kernels sum codes before the zero point is taken out, but exactly.
            w.steps[at] = std::ldexp(std::fabs(scale), exponent);
          }
        }
      }
      k0 += inputs;
    }
  }
  return w;
}

struct Floats2d {
  DType dtype;
  std::int64_t rows, cols, stride;
  std::vector<std::byte> bytes;

  Floats2d(DType type, std::int64_t r, std::int64_t c, std::int64_t gap = 0)
      : dtype(type),
        rows(r),
        cols(c),
        stride(c + gap),
        bytes(static_cast<std::size_t>(std::max<std::int64_t>(r * (c + gap), 1)) *
              dtype_bytes(type)) {}
  double get(std::int64_t r, std::int64_t c) const {
    const std::size_t at = static_cast<std::size_t>(r * stride + c);
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(bytes.data())[at];
    const std::uint16_t half = reinterpret_cast<const std::uint16_t*>(bytes.data())[at];
    return decode_float(dtype == DType::kFloat16 ? kHalfKind : kBrainKind, half);
  }
  void set(std::int64_t r, std::int64_t c, double value) {
    const std::size_t at = static_cast<std::size_t>(r * stride + c);
    if (dtype == DType::kFloat32) {
      reinterpret_cast<float*>(bytes.data())[at] = static_cast<float>(value);
    } else {
      reinterpret_cast<std::uint16_t*>(bytes.data())[at] = static_cast<std::uint16_t>(
          encode_float(dtype == DType::kFloat16 ? kHalfKind : kBrainKind, value));
    }
  }
  std::vector<double> values() const {
    std::vector<double> all;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < cols; ++c) all.push_back(get(r, c));
    }
    return all;
  }
  void fill_normal(std::mt19937_64& rng) {
    std::student_t_distribution<double> heavy(5);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < cols; ++c) set(r, c, heavy(rng));
    }
  }
};

inline LinearArgs linear_args(const Floats2d& x, const Weights& w, const Floats2d* bias,
                              Floats2d& out, Precision precision) {
  LinearArgs args{};
  args.x = x.bytes.data();
  args.x_dtype = x.dtype;
  args.x_stride = x.stride;
  args.packed = w.packed.get();
  args.layout = w.layout;
  args.exponent = w.exponent;
  args.bias = bias == nullptr ? nullptr : bias->bytes.data();
  args.bias_dtype = bias == nullptr ? DType::kFloat32 : bias->dtype;
  args.out = out.bytes.data();
  args.out_dtype = out.dtype;
  args.out_stride = out.stride;
  args.m = x.rows;
  args.precision = precision;
  return args;
}

// |out - exact| of docs/numerics.md for one output.
// `x` is the activations' values, [m][k].
inline double error_bound(const std::vector<double>& x, const Weights& w, const Floats2d* bias,
                          Precision precision, DType out_dtype, std::int64_t t, std::int64_t n,
                          double* exact) {
  const std::int64_t k = w.layout.k;
  const FormatInfo& info = format_info(w.layout.format);
  const std::int64_t group =
      w.layout.group_size > 0 ? w.layout.group_size : std::max<std::int64_t>(k, 1);
  const double unit24 = std::ldexp(1.0, -24);
  double sum = 0, size = 0, activation = 0, codebook = 0;
  for (std::int64_t k0 = 0; k0 < k; k0 += group) {
    double absmax = 0;
    const std::int64_t k1 = std::min(k, k0 + group);
    for (std::int64_t i = k0; i < k1; ++i)
      absmax = std::max(absmax, std::fabs(x[static_cast<std::size_t>(t * k + i)]));
    for (std::int64_t i = k0; i < k1; ++i) {
      const std::size_t at = static_cast<std::size_t>(n * k + i);
      const double a = x[static_cast<std::size_t>(t * k + i)];
      sum += w.values[at] * a;
      size += w.magnitudes[at] * std::fabs(a);
      activation += std::fabs(w.values[at]) * absmax;
      codebook += w.steps[at] * std::fabs(a);
    }
  }
  // float32 sums: k/2 + 16 terms in one chain at most.
  double bound = (static_cast<double>(k) / 2 + 32) * unit24 * size;
  // Half a step of the activations' grid, absmax / 32512; and 2^-23 for the step's own rounding.
  // nf4 as two bytes.
  const double entries = info.format == Format::kNf4 ? std::exp2(-18.5) : 4 * unit24;
  const double fp32 = activation * (0.5 / 32512 + 2 * unit24) + codebook * entries;
  // Both factors rounded to 8 bits: 2^-8 each, and their product's 2^-16.
  const double bf16 = size * (std::ldexp(1.0, -7) + std::ldexp(1.0, -16));
  const bool table = info.format == Format::kNf3 || info.format == Format::kNf4;
  switch (precision) {
    case Precision::kAuto:
    case Precision::kInt8:
      // Half a step of absmax / 127, whose rounding to 22 bits costs 4 of the 6 units.
      // The float formats have no int8 kernels: bf16 is what int8 means for them.
      bound += info.grouped() ? activation * (0.5 / 127 + 6 * unit24) +
                                    (table ? codebook * 0.5 / 127 * (1 + 1.0 / 127) : 0.0)
                              : std::max(bf16, fp32);
      // Minima and what they are multiplied by, each as the sum of two bfloat16.
      if (info.scale_kind == ScaleKind::kGroupMinimum) bound += std::ldexp(size, -16);
      break;
    case Precision::kBf16:
      bound += std::max(bf16, fp32);  // a kernel may be as precise as fp32 instead
      break;
    case Precision::kFp32:
      bound += fp32;
      break;
  }
  if (bias != nullptr) sum += bias->get(0, n);
  *exact = sum;
  const double total = std::fabs(sum) + bound;
  const double rounding = out_dtype == DType::kFloat32   ? unit24
                          : out_dtype == DType::kFloat16 ? std::ldexp(1.0, -11)
                                                         : std::ldexp(1.0, -8);
  // Two float32 roundings (factor, bias), then the output's, or half its smallest subnormal.
  return bound + total * (3 * unit24 + rounding) + std::ldexp(1.0, -25);
}

}  // namespace lowbit::testing
