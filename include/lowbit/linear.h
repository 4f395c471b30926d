// out = x W^T + bias with a packed W: the operator everything else serves.
#pragma once

#include <cstdint>

#include "lowbit/format.h"
#include "lowbit/quantize.h"
#include "lowbit/threads.h"

namespace lowbit {

// What may be rounded on the way (bounds: docs/numerics.md). The numbers are part of the
// operators' schemas.
enum class Precision : std::uint8_t {
  kAuto = 0,  // the fastest whose bound holds; near-exact at small M
  kFp32 = 1,  // weights exact in fp32, activations to at least 15 bits
  kBf16 = 2,  // activations and dequantized weights rounded to bf16
  kInt8 = 3,  // activations to int8 per group, codebooks to int8
};

struct LinearArgs {
  const void* x;          // [m, k] activations, inner stride 1
  DType x_dtype;          // float32, float16, bfloat16
  std::int64_t x_stride;  // elements between rows of x
  const void* packed;     // layout.bytes(), 64-byte aligned
  Layout layout;
  int exponent;      // from quantize()
  const void* bias;  // [n] or nullptr
  DType bias_dtype;
  void* out;  // [m, n], inner stride 1
  DType out_dtype;
  std::int64_t out_stride;  // elements between rows of out
  std::int64_t m;           // tokens
  Precision precision;
};

// Accumulates in fp32 whatever the precision. The result does not depend on the thread count.
// Throws Error(kValue) or Error(kType) before any work.
void linear(const LinearArgs& args, const Threads& threads = serial_threads());

namespace reference {

// The definitions every kernel is compared with: scalar, in the plainest code there is.
int quantize(const MatrixView& weight, const Layout& layout, std::span<std::byte> packed);
void dequantize(std::span<const std::byte> packed, const Layout& layout, int exponent,
                const MutableMatrixView& out);
// Exact dequantized weights, float64 accumulation, rounded once to out_dtype; ignores `precision`.
void linear(const LinearArgs& args);

}  // namespace reference
}  // namespace lowbit
