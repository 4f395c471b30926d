// Reading ggml's blocks.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "lowbit/gguf.h"

namespace lowbit::ggml {

using Byte = std::uint8_t;

inline const Byte* bytes_of(const std::byte* data) {
  return reinterpret_cast<const Byte*>(data);
}
inline std::uint16_t load16(const Byte* at) {
  return static_cast<std::uint16_t>(at[0] | at[1] << 8);
}
inline std::uint32_t load32(const Byte* at) {
  return static_cast<std::uint32_t>(load16(at)) | static_cast<std::uint32_t>(load16(at + 2)) << 16;
}

// `half` bytes of two codes each: the low nibbles are the first `half` codes.
inline void read_nibbles(const Byte* at, int half, Byte* codes) {
  for (int j = 0; j < half; ++j) {
    codes[j] = at[j] & 15;
    codes[j + half] = at[j] >> 4;
  }
}

// The ternary codes 0, 1, 2 of 256 elements.
void read_tq1_codes(const Byte* block, Byte* codes);
void read_tq2_codes(const Byte* block, Byte* codes);

// Who reads what: sizes that go together, rows in range. Throws Error(kValue).
void check_matrix(const char* who, const GgmlMatrix& matrix, std::span<const std::int64_t> rows);

}  // namespace lowbit::ggml
