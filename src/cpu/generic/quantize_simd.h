// The quantizers and dequantizers, once for all instruction sets. An ISA's quantize.cpp defines
// 16-lane operations as a struct V in its anonymous namespace and then includes this file:
// its steps are in quantize_scales.h, quantize_encode.h and quantize_units.h, put together in
// quantize_rows.h and dequantize_rows.h.
//
// A row tile is worked on in chunks of one group (row-scaled and 16-bit formats: 256 inputs):
//   quantize    1. extremes of each row, 16 rows at a time, reduced so that lane r is row r
//               2. scales of 16 rows at once: IEEE division, rounding to fp16
//               3. codes row by row, weights again from L1, into a staging block of bytes
//               4. staging block -> units: a transpose of 16 rows x 16 words, then shifts and ors
//   dequantize  4 and 3 backwards
// Every float operation is one that the reference does, on the same operands, so the bytes are
// equal; where division is replaced, it is shown that no bit changes.
// Sources whose rows lie side by side take another way: generic/quantize_columns.h.
//
// Needs V: types F (16 floats), I (16 int32), B (64 bytes), and the functions used below.
// Everything is in the anonymous namespace, so that no symbol of this file is shared between
// objects with different -m flags.
#pragma once

#include "cpu/generic/dequantize_rows.h"
#include "cpu/generic/float_passes.h"
#include "cpu/generic/quantize_columns.h"
#include "cpu/generic/quantize_rows.h"

namespace lowbit::cpu {
namespace {

const QuantizeKernels kKernels = {
    V::kName,          quantize_tile,   quantize_columns,
    columns_workspace, dequantize_tile, dequantize_row,
    first_nonfinite,   transpose,       widen,
};

}  // namespace
}  // namespace lowbit::cpu
