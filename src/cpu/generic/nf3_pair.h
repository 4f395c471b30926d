// nf3 as the sum of two bytes: entry q is kFirst * first[q] + kSecond * second[q] to 1.7 * 2^-24, 0
// exactly. Two bytes offer 2^16 sums, and two free factors put six of them on the entries (found by
// search). Products with activations are then four (two planes each) where three byte planes of a
// 24-bit integer would take five.
#pragma once

#include <cstdint>

namespace lowbit::cpu {
namespace {

struct Nf3Pair {
  static constexpr float kFirst = 0x1.490e94p-7f;
  static constexpr float kSecond = 0x1.5af27ep-10f;
  static constexpr int kZero = 128;  // what is added to make bytes of them
  static constexpr std::int8_t first[8] = {-98, -60, -18, 0, 6, 30, 71, 98};
  static constexpr std::int8_t second[8] = {-12, 51, -50, 0, 93, 61, -68, 12};
};

}  // namespace
}  // namespace lowbit::cpu
