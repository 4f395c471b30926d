// Decoder blocks as single operators: what is between two residual additions, described by data.
//
//   attention half   h   = norm"(x + a * norm'(Wo norm(attention(rope(norm(Wqkv norm(x))),
//   cache)))) MLP half         out = norm"(h + b * norm'(Wdown norm(act(Wgate norm(h)) * Wup
//   norm(h))))
//
// Either half may be absent, every norm may be absent, a plain MLP has no gate, attention may have
// one, and in a parallel block both halves read x. A cross attention takes keys and values that
// others made. All arithmetic between the packed products is float32; the result does not depend on
// the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "lowbit/format.h"
#include "lowbit/linear.h"
#include "lowbit/quantize.h"
#include "lowbit/threads.h"

namespace lowbit {

// The numbers of these enums are part of the operators' descriptions: append, never reorder.
enum class NormKind : std::uint8_t { kNone = 0, kRms = 1, kLayer = 2 };

struct NormSpec {
  NormKind kind = NormKind::kNone;
  const void* weight = nullptr;  // [n] or nullptr: ones
  const void* bias = nullptr;    // [n] or nullptr: zeros
  DType weight_dtype = DType::kFloat32, bias_dtype = DType::kFloat32;
  float eps = 0;
  float offset = 0;  // added to the weight: 1 where a model stores weight - 1
};

enum class Activation : std::uint8_t {
  kIdentity = 0,
  kSilu = 1,
  kGelu = 2,      // by the error function
  kGeluTanh = 3,  // its tanh approximation
  kRelu = 4,
  kRelu2 = 5,      // relu(x)^2
  kQuickGelu = 6,  // x * sigmoid(1.702 x)
  kSigmoid = 7,
  kTanh = 8,
  kSoftplus = 9,
  kSwish = 10,  // x * sigmoid(alpha x)
  // positive x^2 + beta x, and below zero negative (e^x - 1 - x) + beta x
  kXielu = 11,
};
inline constexpr int kActivationCount = 12;

// What kSwish and kXielu take besides x.
struct ActivationNumbers {
  float alpha = 1;
  float positive = 0, negative = 0, beta = 0;
};

enum class RopeKind : std::uint8_t {
  kNone = 0,
  kHalves = 1,         // pairs (i, i + width / 2)
  kInterleaved = 2,    // pairs (2 i, 2 i + 1)
  kPairsToHalves = 3,  // pairs (2 i, 2 i + 1), whose results go to (i, i + width / 2)
};

// Pair p turns by the angle whose cosine is cos[p * table_step].
struct RopeSpec {
  RopeKind kind = RopeKind::kNone;
  int begin = 0, width = 0;  // the part of a head that turns
  int table_step = 1;
};

enum class MaskKind : std::uint8_t {
  kNone = 0,
  kBool = 1,     // true: seen
  kFloat32 = 2,  // added to the score
  kFloat16 = 3,
  kBFloat16 = 4,
};

struct PackedMatrix {
  const std::byte* packed = nullptr;
  Layout layout{};
  int exponent = 0;
  const void* bias = nullptr;  // [n]
  DType bias_dtype = DType::kFloat32;
};

// Where heads lie in the outputs of the projections, which count as one row of columns: head i of
// key/value group g starts at column offset + g * group_stride + i * head_stride.
struct HeadMap {
  std::int64_t offset = 0, group_stride = 0, head_stride = 0;
};

// Columns that become queries by one product more.
struct LowRankQuery {
  int width = 0;  // of them; 0: none, and queries are columns themselves
  std::int64_t at = 0;
  NormSpec norm;
  PackedMatrix expand;  // whose outputs are the columns that `q` counts
};

// Latent attention: what is kept of a token is one vector for all heads, and behind it what the
// keys of all heads end with. The cache has one head, with the latent in place of keys and the tail
// in place of values. A key is key rows of `expand` times the latent, then the tail; a value is
// value rows times the latent.
struct LatentSpec {
  int width = 0;        // of the latent; 0: none
  std::int64_t at = 0;  // its column
  NormSpec norm;        // before it is kept
  int tail = 0;         // at most a head's size; what turns of a key
  std::int64_t tail_at = 0;
  PackedMatrix expand;  // without a bias
  // Rows of head h: keys from h * head_rows + key_at on, values from h * head_rows + value_at on.
  std::int64_t head_rows = 0, key_at = 0, value_at = 0;
};

struct AttentionSpec {
  NormSpec norm;
  std::vector<PackedMatrix> in;  // projections of one input: q, k, v or fused
  HeadMap q, k, v;
  int heads = 0, kv_heads = 0, head_dim = 0;  // heads == 0: no attention half
  int value_dim = 0;                          // of a head's values; 0: head_dim
  LowRankQuery low_rank;
  LatentSpec latent;  // then kv_heads == heads
  NormSpec q_norm, k_norm;
  bool norm_last = false;        // after the rotation, not before it
  bool norm_over_heads = false;  // q_norm, k_norm see all heads as one vector
  RopeSpec rope;
  float scale = 1;    // of the scores
  float softcap = 0;  // > 0: softcap * tanh(score / softcap)
  // [heads]: a score that every token has besides those of the positions, with no value; nullptr:
  // none.
  const void* sinks = nullptr;
  DType sinks_dtype = DType::kFloat32;
  // Keys and values are given and the same for every token: `in` makes queries only, nothing is
  // appended, and `k`, `v`, `k_norm` are unused.
  bool cross = false;
  // > 0: what a head mixes is multiplied by gate_activation of its columns, one for each channel or
  // one for all of them (1).
  int gate_width = 0;
  HeadMap gate;
  Activation gate_activation = Activation::kSigmoid;
  NormSpec mixed_norm;  // of all heads together, before `out`
  PackedMatrix out;
  NormSpec out_norm;
  NormSpec post_norm;  // of the sum
  float multiplier = 1;
  bool residual = true;

  int values() const { return value_dim > 0 ? value_dim : head_dim; }
  // Heads of the cache, and what they keep of a token as keys and as values.
  int cache_heads() const { return latent.width > 0 ? 1 : kv_heads; }
  int cache_keys() const { return latent.width > 0 ? latent.width : head_dim; }
  int cache_values() const { return latent.width > 0 ? latent.tail : values(); }
};

// How columns become inputs of `down`: act(gate clamped) * (up clamped + up_plus), or act(gate).
struct GateSpec {
  std::int64_t step = 1;  // from a column of the gate, or of up, to the next
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();
  float up_low = -std::numeric_limits<float>::infinity();
  float up_high = std::numeric_limits<float>::infinity();
  float up_plus = 0;
  float alpha = 1;  // of kSwish
  // Of kXielu: parameters whose softplus it takes (and beta is added to that of `negative`).
  const void* positive = nullptr;
  const void* negative = nullptr;
  DType positive_dtype = DType::kFloat32, negative_dtype = DType::kFloat32;
  float beta = 0;
};

struct MlpSpec {
  NormSpec norm;
  std::vector<PackedMatrix> in;
  std::int64_t gate_offset = 0, up_offset = 0;  // columns, as above
  std::int64_t width = 0;                       // inputs of `down`; 0: no MLP half
  std::int64_t experts = 0;                     // > 0: `in` (one) and `down` are that many in a row
  bool gated = true;
  Activation activation = Activation::kSilu;
  GateSpec gate;
  NormSpec inner_norm;  // before `down`
  PackedMatrix down;
  NormSpec out_norm;
  NormSpec post_norm;  // of the sum
  float multiplier = 1;
  bool residual = true;
};

struct BlockSpec {
  AttentionSpec attention;
  MlpSpec mlp;
  bool parallel = false;  // the MLP half reads x instead of h
};

// What keys and values are kept as. The numbers are part of the operators' schemas.
enum class CacheFormat : std::uint8_t {
  kFloat = 0,  // a float type
  kInt8 = 1,   // codes -127 ... 127
  kFp8 = 2,    // e4m3
};
inline constexpr int kCacheFormatCount = 3;
enum class CachePart : std::uint8_t { kKeys = 0, kValues = 1 };

// Quantized keys (or values) of one head: blocks of 64 positions, each of cache_block_bytes().
// value = code * scale; a scale belongs to 32 channels of one position and is a bfloat16, rounded
// up from absmax / 127 (fp8: 448). D is the head size rounded up to 16, with codes of zeros.
//
//   keys     D / 4 quads of channels    x 64 positions x 4 channels     one byte each
//   values   16 quads of positions      x D channels   x 4 positions    one byte each
//   scales   ceil(head size / 32)       x 64 positions                  two bytes each
//
// so that byte products (vpdpbusd) take both as they lie: the scores of 16 positions from 4
// channels, and 16 channels of the result from 4 positions. int8 keys are stored as code + 128.
inline constexpr int kCacheBlock = 64;
inline constexpr int kCacheGroup = 32;
constexpr std::int64_t cache_padded(std::int64_t head_dim) {
  return (head_dim + 15) / 16 * 16;
}
constexpr std::int64_t cache_groups(std::int64_t head_dim) {
  return (head_dim + kCacheGroup - 1) / kCacheGroup;
}
constexpr std::int64_t cache_block_bytes(std::int64_t head_dim) {
  return kCacheBlock * (cache_padded(head_dim) + 2 * cache_groups(head_dim));
}

// Keys and values of one block: element (b, h, p, i) at b * batch_stride + h * head_stride +
// p * stride + i. Quantized, the blocks of a head lie one after the other from byte b *
// batch_stride + h * head_stride on, and `stride` is not used.
struct CacheView {
  void* keys = nullptr;
  void* values = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t key_batch_stride = 0, key_head_stride = 0, key_stride = 0;
  std::int64_t value_batch_stride = 0, value_head_stride = 0, value_stride = 0;
  std::int64_t positions = 0;  // of a cross attention; otherwise past + tokens count
  CacheFormat format = CacheFormat::kFloat;
};

// Element (b, h, t, p) at b * batch_stride + h * head_stride + t * stride + p.
struct MaskView {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  std::int64_t batch_stride = 0, head_stride = 0, stride = 0;
};

struct BlockCall {
  const void* x = nullptr;  // [batch, tokens, hidden], contiguous
  void* out = nullptr;      // the same shape; may be x
  DType dtype = DType::kFloat32;
  std::int64_t batch = 1, tokens = 1, hidden = 0;
  // Rotation tables of every token: row t of batch row b at b * rope_batch_stride + t *
  // rope_stride.
  const void* cos = nullptr;
  const void* sin = nullptr;
  DType rope_dtype = DType::kFloat32;
  std::int64_t rope_batch_stride = 0, rope_stride = 0;
  // Positions already in the cache; the new ones are written behind them.
  std::int64_t past = 0;
  MaskView mask;
  MaskView cross_mask;  // of cross attentions
  bool causal = false;  // token t sees the positions up to past + t, besides what the mask says
  Precision precision = Precision::kAuto;
};

// Runs `blocks` one after the other, each on the result of the one before, appending to and
// attending over caches[i] (a cross attention only reads it). The residual stream stays float32
// between blocks. Arguments are trusted but for shapes that disagree: Error(kValue).
void run_blocks(std::span<const BlockSpec* const> blocks, std::span<const CacheView> caches,
                const BlockCall& call, const Threads& threads = serial_threads());

// The first part of an attention half, for caches that others keep: queries, keys and values,
// normed and rotated, [batch, heads, tokens, head_dim] each, in the dtype of the call (keys and
// values as the cache keeps them). Where there are gates, a head of q is gate_width longer, and
// they follow.
void project(const BlockSpec& block, const BlockCall& call, void* q, void* k, void* v,
             const Threads& threads = serial_threads());

// The projections of an attention half as they leave the products, for whoever looks at them or
// replaces some: `normed` [batch, tokens, hidden] and `columns` [batch, tokens, all columns], in
// the dtype of the call.
void columns(const BlockSpec& block, const BlockCall& call, void* normed, void* columns,
             const Threads& threads = serial_threads());

// The rest of the block: q as project() made it, keys and values of `positions` positions.
void attend(const BlockSpec& block, const BlockCall& call, const void* q, const CacheView& cache,
            std::int64_t positions, const Threads& threads = serial_threads());

// Quantized keys or values of a cache that belong to a batch of heads, one after the other: the
// blocks of head i start at blocks + i * stride bytes.
struct CachedHeads {
  std::byte* blocks = nullptr;
  std::int64_t stride = 0;
  std::int64_t heads = 0;  // of all batch rows
  std::int64_t head_dim = 0;
  CacheFormat format = CacheFormat::kInt8;
  CachePart part = CachePart::kKeys;
};

// Quantizes x [heads, tokens, head_dim] to the positions from `past` on, as run_blocks() does with
// its keys and values.
void cache_append(const CachedHeads& cache, std::int64_t past, std::int64_t tokens, const void* x,
                  DType dtype, const Threads& threads = serial_threads());

// Dequantizes positions [0, positions) to out [heads, positions, head_dim].
void cache_read(const CachedHeads& cache, std::int64_t positions, void* out, DType dtype,
                const Threads& threads = serial_threads());

// The sum of the experts chosen for every token: out[t] = sum over i < per_token of
// weights[t, i] * expert ids[t, i] of x[t]. An id that is the number of experts counts as none.
void run_experts(const BlockSpec& block, const BlockCall& call, const std::int64_t* ids,
                 const void* weights, DType weights_dtype, std::int64_t per_token,
                 const Threads& threads = serial_threads());

}  // namespace lowbit
