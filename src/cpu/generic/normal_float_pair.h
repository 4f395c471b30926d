// NormalFloats as the sum of two bytes: entry q is kFirst * first[q] + kSecond * second[q], 0
// exactly. Two bytes offer 2^16 sums, and two free factors put them on the entries (found by
// search): six of nf3 to 1.7 * 2^-24, fifteen of nf4 to kError. Products with activations of two
// planes are then four, where three byte planes of a 24-bit integer would take five.
#pragma once

#include <cstdint>

#include "lowbit/format.h"

namespace lowbit::cpu {
namespace {

template <Format F>
struct NormalFloatPair;

template <>
struct NormalFloatPair<Format::kNf3> {
  static constexpr float kFirst = 0x1.490e94p-7f;
  static constexpr float kSecond = 0x1.5af27ep-10f;
  static constexpr std::int8_t first[8] = {-98, -60, -18, 0, 6, 30, 71, 98};
  static constexpr std::int8_t second[8] = {-12, 51, -50, 0, 93, 61, -68, 12};
};

template <>
struct NormalFloatPair<Format::kNf4> {
  static constexpr float kFirst = 0x1.ea03ccp-8f;
  static constexpr float kSecond = -0x1.1f5p-11f;
  static constexpr std::int8_t first[16] = {-127, -100, -67, -60, -42, -22, -8, 0,
                                            5,    15,   25,  46,  50,  74,  92, 127};
  static constexpr std::int8_t second[16] = {92,  -94, 44,   -98, -54,  37,  57,  0,
                                             -77, -89, -108, 11,  -122, -17, -64, -92};
};

constexpr int kPairZero = 128;  // what is added to make unsigned bytes of them

}  // namespace
}  // namespace lowbit::cpu
