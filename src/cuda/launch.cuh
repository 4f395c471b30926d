// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <initializer_list>

#include "cuda/kernels.h"

namespace lowbit::cuda {

// In clusters of `cluster` thread blocks along x; `early`: before the previous kernel of the stream
// ends (ptx.cuh: wait_for_previous_kernel).
template <typename Kernel>
int launch_cluster(Kernel kernel, dim3 grid, unsigned threads, std::size_t shared_bytes,
                   int cluster, bool early, Stream stream,
                   std::initializer_list<const void*> params) {
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported once, by us
    return static_cast<int>(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  void* arguments[8] = {};
  int count = 0;
  for (const void* param : params) arguments[count++] = const_cast<void*>(param);
  error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace lowbit::cuda
