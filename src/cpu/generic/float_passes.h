// Passes over float tensors beside quantizing: the first non-finite element, to float32,
// transposed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/generic/quantize_load.h"

namespace lowbit::cpu {
namespace {

std::int64_t first_nonfinite(const void* data, DType dtype, std::int64_t count) {
  const auto* at = static_cast<const unsigned char*>(data);
  const int bytes = dtype == DType::kFloat32 ? 4 : 2;
  const auto bad = [&](std::int64_t i) {
    if (bytes == 4) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, at + 4 * i, 4);
      return (bits & 0x7f800000u) == 0x7f800000u;
    }
    std::uint16_t bits;
    __builtin_memcpy(&bits, at + 2 * i, 2);
    const unsigned top = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
    return (bits & top) == top;
  };
  constexpr int kBlockBytes = 1024;
  const std::int64_t block = kBlockBytes / bytes;
  std::int64_t i = 0;
  for (; i + block <= count; i += block) {
    const unsigned char* p = at + i * bytes;
    V::prefetch(reinterpret_cast<const char*>(p) + 4096);
    const bool clean = bytes == 4                 ? V::finite32(p, kBlockBytes)
                       : dtype == DType::kFloat16 ? V::finite16(p, kBlockBytes, 0x7c00)
                                                  : V::finite16(p, kBlockBytes, 0x7f80);
    if (!clean) break;
  }
  for (; i < count; ++i) {
    if (bad(i)) return i;
  }
  return -1;
}

template <DType kDType>
void widen_as(const void* data, std::int64_t count, float* out) {
  const char* at = static_cast<const char*>(data);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) V::store(out + i, load<kDType>(at + i * kElementBytes<kDType>));
  if (i < count) {
    alignas(64) char in[64] = {};
    alignas(64) float rest[16];
    const auto left = static_cast<std::size_t>(count - i);
    __builtin_memcpy(in, at + i * kElementBytes<kDType>, left * kElementBytes<kDType>);
    V::store(rest, load<kDType>(in));
    __builtin_memcpy(out + i, rest, left * 4);
  }
}

void widen(const void* data, DType dtype, std::int64_t count, float* out) {
  if (dtype == DType::kFloat16) return widen_as<DType::kFloat16>(data, count, out);
  if (dtype == DType::kBFloat16) return widen_as<DType::kBFloat16>(data, count, out);
  return widen_as<DType::kFloat32>(data, count, out);
}

// Stripes of as many columns as fill a line of a row; in each, every line of the source once.
template <int kBytes>
void transpose_as(const unsigned char* data, std::int64_t col_stride, std::int64_t rows,
                  std::int64_t cols, unsigned char* out, std::int64_t out_stride) {
  constexpr int kSide = 64 / kBytes;  // rows and columns of a block
  for (std::int64_t col = 0; col < cols; col += kSide) {
    const int width = cols - col < kSide ? static_cast<int>(cols - col) : kSide;
    for (std::int64_t row = 0; row < rows; row += kSide) {
      const unsigned char* block = data + (col * col_stride + row) * kBytes;
      const auto column = [&](int j) {
        if (j >= width) return V::zero_bytes();
        const unsigned char* at = block + j * col_stride * kBytes;
        V::prefetch(reinterpret_cast<const char*>(at + kSide * col_stride * kBytes));
        return V::load_bytes(at);
      };
      const auto put = [&](std::int64_t r, B line) {
        unsigned char* to = out + ((row + r) * out_stride + col) * kBytes;
        if (width == kSide) return V::store_bytes(to, line);
        alignas(64) unsigned char part[64];
        V::store_bytes(part, line);
        __builtin_memcpy(to, part, static_cast<std::size_t>(width) * kBytes);
      };
      if constexpr (kBytes == 4) {
        B u[16];
        for (int j = 0; j < 16; ++j) u[j] = column(j);
        V::transpose(u);
        for (int r = 0; r < 16; ++r) put(r, u[r]);
      } else {
        // Two columns make words; within 128-bit lanes, so that word w is row 8 (w / 4) + w % 4 of
        // one half and four rows further of the other.
        B low[16], high[16];
        for (int j = 0; j < 16; ++j) {
          const B a = column(2 * j), b = column(2 * j + 1);
          low[j] = V::interleave_low16(a, b);
          high[j] = V::interleave_high16(a, b);
        }
        V::transpose(low);
        V::transpose(high);
        for (int w = 0; w < 16; ++w) {
          put(w / 4 * 8 + w % 4, low[w]);
          put(w / 4 * 8 + w % 4 + 4, high[w]);
        }
      }
    }
  }
}

void transpose(const void* data, int bytes, std::int64_t col_stride, std::int64_t rows,
               std::int64_t cols, void* out, std::int64_t out_stride) {
  const auto run = bytes == 4 ? transpose_as<4> : transpose_as<2>;
  run(static_cast<const unsigned char*>(data), col_stride, rows, cols,
      static_cast<unsigned char*>(out), out_stride);
}

}  // namespace
}  // namespace lowbit::cpu
