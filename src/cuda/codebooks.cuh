// Codebooks and zero points on the device. The values are those of src/format/format.cpp, which
// tests/cpp/cuda compares with these.
#pragma once

#include "cuda/device_layout.h"

namespace lowbit::cuda {

LOWBIT_HD float codebook_entry(Format format, int code) {
  constexpr float kNf4[16] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  constexpr float kNf3[8] = {
      -1.0f,
      -0.5350227355957031f,
      -0.2469314038753510f,
      0.0f,
      0.1833375245332718f,
      0.3819939494132996f,
      0.6229856610298157f,
      1.0f,
  };
  constexpr float kFp4[16] = {
      0.0f, 0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
      0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f,
  };
  switch (format) {
    case Format::kNf4:
      return kNf4[code & 15];
    case Format::kNf3:
      return kNf3[code & 7];
    case Format::kFp4:
      return kFp4[code & 15];
    default:
      return 0.0f;
  }
}

LOWBIT_HD constexpr int zero_point(Format format) {
  switch (format) {
    case Format::kSymInt4:
      return 8;
    case Format::kSymInt5:
      return 16;
    case Format::kSymInt8:
      return 128;
    default:
      return 0;
  }
}

}  // namespace lowbit::cuda
