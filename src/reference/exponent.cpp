// The exponent rule: one power of two per matrix keeps scales inside the normal range.
#include <cmath>

#include "reference/reference.h"

namespace lowbit::reference {
namespace {

// Scales at or above this round to infinity in fp16: half a unit past the largest, 65504.
constexpr float kHalfOverflow = 65520.0f;
constexpr float kBrainOverflow = 0x1.ffp+127f;
constexpr float kSmallestNormalHalf = 0x1p-14f;

}  // namespace

void ScaleRange::add(float statistic) {
  largest = std::fmax(largest, statistic);
  if (statistic != 0) smallest = std::fmin(smallest, statistic);
}

void ScaleRange::add_minimum(float minimum) {
  const float magnitude = std::fabs(minimum);
  largest_minimum = std::fmax(largest_minimum, magnitude);
  if (magnitude != 0) smallest_minimum = std::fmin(smallest_minimum, magnitude);
}

void ScaleRange::merge(const ScaleRange& other) {
  largest = std::fmax(largest, other.largest);
  smallest = std::fmin(smallest, other.smallest);
  largest_minimum = std::fmax(largest_minimum, other.largest_minimum);
  smallest_minimum = std::fmin(smallest_minimum, other.smallest_minimum);
  finite = finite && other.finite;
}

int exponent_for(const FormatInfo& info, const ScaleRange& range) {
  if (range.largest == 0 && range.largest_minimum == 0) return 0;
  if (info.scale_kind == ScaleKind::kNone) {
    const bool half = info.format == Format::kFp16;
    if (range.largest < (half ? kHalfOverflow : kBrainOverflow)) return 0;
    // The largest weight gets the type's second highest exponent (14 of 15, 126 of 127).
    return std::ilogb(range.largest) - (half ? 14 : 126);
  }

  // Division by a constant is monotonic, so the extreme groups decide for all.
  const float low =
      info.scale_kind == ScaleKind::kRow ? std::numeric_limits<float>::min() : kSmallestNormalHalf;
  const float high =
      info.scale_kind == ScaleKind::kRow ? std::numeric_limits<float>::infinity() : kHalfOverflow;
  const bool fits = !(range.smallest / info.value_max < low) &&
                    !(range.largest / info.value_max >= high) && !(range.smallest_minimum < low) &&
                    !(range.largest_minimum >= high);
  if (fits) return 0;

  // max - min may have overflowed float32; the largest float then has the same exponent after the
  // division, or the minimum is larger anyway.
  const double statistic = std::fmin(range.largest, std::numeric_limits<float>::max());
  const double largest = std::fmax(statistic / info.value_max, range.largest_minimum);
  // The largest scale comes to lie in [2^14, 2^15), which leaves 28 binades of normal fp16 below.
  return std::ilogb(largest) - 14;
}

}  // namespace lowbit::reference
