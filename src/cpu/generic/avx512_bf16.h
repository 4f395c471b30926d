// Float32 to pairs of bfloat16, for translation units that are compiled with avx512bf16.
#pragma once

#include "cpu/generic/avx512.h"

namespace lowbit::cpu {
namespace {

// Row r's lane: first in its low half, second in its high half.
LOWBIT_INLINE __m512i interleave(__m512 first, __m512 second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

}  // namespace
}  // namespace lowbit::cpu
