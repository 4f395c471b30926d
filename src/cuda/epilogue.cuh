// From a sum to a result: its bias, and rounding to the dtype of x.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "lowbit/quantize.h"

namespace lowbit::cuda {

__device__ __forceinline__ float bias_at(const void* bias, DType dtype, std::int64_t i) {
  if (bias == nullptr) return 0.0f;
  if (dtype == DType::kFloat32) return static_cast<const float*>(bias)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(bias)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(bias)[i]);
}

template <bool kBf16>
__device__ __forceinline__ void store_out(std::uint8_t* out, std::int64_t i, float value) {
  if constexpr (kBf16) {
    reinterpret_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rn(value);
  } else {
    reinterpret_cast<__half*>(out)[i] = __float2half_rn(value);
  }
}

}  // namespace lowbit::cuda
