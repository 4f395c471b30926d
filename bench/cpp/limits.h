// What this machine can do at best, measured in the same second as the kernels: read bandwidth and
// the rates of multiply-add instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lowbit::bench {

// Reads `bytes` once; returns something that depends on them.
std::uint64_t read_all(const std::byte* data, std::int64_t bytes);

enum class Rate { kInt8, kBf16, kF32 };

// Operations (a multiply and an add count two) of one run of a register-only loop; `iterations`
// makes it longer. 0 where the processor has no such instruction: the rate of float32 then stands
// in for bf16, and four times that of float32 for int8 (vpmaddubsw and vpmaddwd). At level `amx`
// int8 and bf16 are those of tiles, whatever the path multiplies with.
double burn(Rate rate, std::int64_t iterations);

const char* rate_name(Rate rate);

}  // namespace lowbit::bench
