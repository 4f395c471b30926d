// What an instruction-set folder exports for the fused decoder-block operators (src/fused): the
// parts of a block between its matrix products. Plain structs only, as in linear_kernels.h.
// Everything computes in float32; sums run in an order that depends on shapes alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowbit/fused.h"
#include "lowbit/quantize.h"

namespace lowbit::cpu {

// Attention of a few query rows that share one key/value head, over the positions [begin, end).
struct AttendRows {
  const float* q;  // [rows, d], already multiplied by the softmax scale
  int rows, d;
  int values_d;      // of values and results; quantized: d
  const void* keys;  // position p starts at element p * key_stride; quantized: the first block
  const void* values;
  DType dtype;  // of keys and values
  CacheFormat format;
  std::int64_t key_stride, value_stride;
  // The last tail_d channels of all keys, in rows of their own; 0: keys have d channels.
  const void* tail;
  int tail_d;
  std::int64_t tail_stride;
  std::int64_t begin, end;     // begin is a multiple of kCacheBlock
  const std::int64_t* limits;  // [rows]: positions >= limit are not seen; nullptr: all are
  const void* const* masks;    // [rows]: element p belongs to position p; nullptr: no mask
  MaskKind mask_kind;
  float softcap;   // > 0: scores become softcap * tanh(score / softcap)
  float* acc;      // [rows, values_d] out: sum of exp(score - max) * value
  float* max;      // [rows] out: the largest score, -infinity where nothing is seen
  float* sum;      // [rows] out: sum of exp(score - max)
  float* scratch;  // attend_scratch(rows, d, values_d) floats
};

// Keys or values of one head: position p starts at element p * stride.
struct HeadRows {
  const void* data;
  DType dtype;
  std::int64_t stride;
  int channels;
};

// Attention of many rows over keys and values that are rounded to bfloat16 and put into the order
// of the products once per call, block by block of kCacheBlock positions.
struct ManyRows {
  const char* name;
  int rows;  // what a task should take, and at most takes
  // Of the keys, or the values, of one head; 64-byte aligned.
  std::int64_t (*packed_bytes)(std::int64_t positions, int d);
  // Channels that a head lacks of `d` are zeros.
  void (*pack)(const HeadRows& keys, const HeadRows& values, std::int64_t positions, int d,
               std::int64_t block, std::byte* packed_keys, std::byte* packed_values);
  std::int64_t (*scratch)(int d);  // floats
  // `keys` and `values` of the arguments are packed ones of d channels, as results are; their
  // `begin` is 0.
  void (*attend)(const AttendRows& args);
};

// Attention of few rows, as FusedKernels::attend has it, over keys and values in bfloat16 as they
// lie, as many of either: queries and weights are sums of two bfloat16, which keeps 16 bits of
// each.
struct FewRows {
  const char* name;
  int head_multiple;                         // head sizes must be multiples
  std::int64_t (*scratch)(int rows, int d);  // floats
  void (*attend)(const AttendRows& args);
};

struct FusedKernels {
  const char* name;
  // n floats from and to another type.
  void (*load)(const void* from, DType dtype, std::int64_t n, float* to);
  void (*store)(const float* from, DType dtype, std::int64_t n, void* to);
  // out = norm(x), n values. kNone copies.
  void (*norm)(const NormSpec& norm, const float* x, std::int64_t n, float* out);
  // to += factor * from
  void (*add)(const float* from, float factor, std::int64_t n, float* to);
  // out = act(gate) * up; up == nullptr: out = act(gate). May work in place.
  void (*activate)(Activation kind, const ActivationNumbers& numbers, const float* gate,
                   const float* up, std::int64_t n, float* out);
  // Rotates the width values of one head from `begin` on, in place.
  void (*rotate)(const RopeSpec& rope, const float* cos, const float* sin, float* head);
  // out[r] = row r of `matrix` [rows, n], times x
  void (*dots)(const float* matrix, std::int64_t rows, std::int64_t n, const float* x, float* out);
  std::int64_t (*attend_scratch)(int rows, int d, int values_d);
  void (*attend)(const AttendRows& args);
  // Quantizes one head of d floats to position `slot` of a block, and the first `count` positions
  // of a block back to [count, d] floats with cache_get_scratch(d) floats of working memory.
  void (*cache_put)(const float* x, int d, CacheFormat format, CachePart part, int slot,
                    std::byte* block);
  void (*cache_get)(const std::byte* block, int d, CacheFormat format, CachePart part, int count,
                    float* to, float* scratch);
  std::int64_t (*cache_get_scratch)(int d);
};

const FusedKernels& fused_kernels_scalar();
const FusedKernels& fused_kernels_avx2();
const FusedKernels& fused_kernels_avx512vnni();

const ManyRows& many_rows_avx512bf16();
const ManyRows& many_rows_amx();
const FewRows& few_rows_amx();

// For the level in force.
const FusedKernels& fused_kernels();
const ManyRows* many_rows();  // nullptr where there is none
const FewRows* few_rows();

}  // namespace lowbit::cpu
