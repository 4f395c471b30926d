// The fused decoder-block operators: descriptions as numbers, checks, then lowbit/fused.h.
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "check.h"
#include "lowbit/fused.h"
#include "lowbit/quantize.h"

namespace lowbit::binding {
namespace {

struct Block {
  BlockSpec spec;
  std::vector<Tensor> tensors;  // what the pointers of `spec` point into
};

std::mutex g_mutex;
std::unordered_map<std::int64_t, std::shared_ptr<const Block>> g_blocks;
std::int64_t g_next = 1;

std::shared_ptr<const Block> block_of(const char* op, std::int64_t handle) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = g_blocks.find(handle);
  LOWBIT_CHECK(found != g_blocks.end(), ErrorCode::kValue, op, ": no block has the handle ", handle,
               "; was it released?");
  return found->second;
}

// ---- descriptions
// ---------------------------------------------------------------------------------

// Reads the numbers in the order in which describe.py writes them.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<std::int64_t>& integers,
         const std::vector<double>& floats)
      : tensors_(tensors), integers_(integers), floats_(floats) {}

  std::int64_t integer() {
    LOWBIT_CHECK(next_integer_ < integers_.size(), ErrorCode::kValue,
                 "fused_register: the description is too short");
    return integers_[next_integer_++];
  }
  int small() { return checked_int("fused_register", "a number of the description", integer()); }
  float real() {
    LOWBIT_CHECK(next_float_ < floats_.size(), ErrorCode::kValue,
                 "fused_register: the description has too few floats");
    return static_cast<float>(floats_[next_float_++]);
  }
  bool flag() { return integer() != 0; }
  Activation activation() {
    const std::int64_t number = integer();
    LOWBIT_CHECK(number >= 0 && number < kActivationCount, ErrorCode::kValue,
                 "fused_register: activation ", number);
    return static_cast<Activation>(number);
  }
  void finish() const {
    LOWBIT_CHECK(next_integer_ == integers_.size() && next_float_ == floats_.size(),
                 ErrorCode::kValue, "fused_register: the description is too long");
  }

  // A contiguous float vector of n elements (n < 0: any), or nothing.
  const void* vector(std::int64_t n, DType* dtype) {
    const std::int64_t index = integer();
    if (index < 0) {
      return nullptr;
    }
    const Tensor& tensor = at(index);
    *dtype = float_dtype("fused_register", "a vector", tensor.scalar_type(), false);
    check_cpu("fused_register", "a vector", tensor);
    LOWBIT_CHECK(tensor.dim() == 1 && tensor.is_contiguous() && (n < 0 || tensor.size(0) == n),
                 ErrorCode::kValue, "fused_register: expected a contiguous vector of ", n,
                 " values, got ", shape_text(tensor));
    return tensor.data_ptr();
  }

  NormSpec norm(std::int64_t n) {
    NormSpec spec;
    const std::int64_t kind = integer();
    LOWBIT_CHECK(kind >= 0 && kind <= 2, ErrorCode::kValue, "fused_register: norm kind ", kind);
    spec.kind = static_cast<NormKind>(kind);
    spec.weight = vector(n, &spec.weight_dtype);
    spec.bias = vector(n, &spec.bias_dtype);
    spec.eps = real();
    spec.offset = real();
    return spec;
  }

  GateSpec gate() {
    GateSpec spec;
    spec.step = integer();
    LOWBIT_CHECK(spec.step == 1 || spec.step == 2, ErrorCode::kValue,
                 "fused_register: every column of a gate, or every second, not step ", spec.step);
    spec.positive = vector(1, &spec.positive_dtype);
    spec.negative = vector(1, &spec.negative_dtype);
    for (float* value : {&spec.low, &spec.high, &spec.up_low, &spec.up_high, &spec.up_plus,
                         &spec.alpha, &spec.beta}) {
      *value = real();
    }
    return spec;
  }

  // One matrix, or the first of `count` that lie one after the other.
  PackedMatrix matrix(std::int64_t count = 1) {
    PackedMatrix matrix;
    const Tensor& packed = at(integer());
    const std::int64_t n = integer(), k = integer();
    const Format format = checked_format("fused_register", integer());
    matrix.layout = make_layout(format, n, k, small());
    matrix.exponent = small();
    matrix.packed = checked_packed("fused_register", packed, matrix.layout, count);
    matrix.bias = vector(n * count, &matrix.bias_dtype);
    return matrix;
  }

  std::vector<PackedMatrix> matrices(std::int64_t each = 1) {
    const std::int64_t count = integer();
    LOWBIT_CHECK(count >= 0 && count <= 8, ErrorCode::kValue, "fused_register: ", count,
                 " projections of one input; at most 8");
    std::vector<PackedMatrix> result;
    for (std::int64_t i = 0; i < count; ++i) {
      result.push_back(matrix(each));
    }
    return result;
  }

 private:
  const Tensor& at(std::int64_t index) const {
    LOWBIT_CHECK(index >= 0 && index < static_cast<std::int64_t>(tensors_.size()),
                 ErrorCode::kValue, "fused_register: tensor ", index, " of ", tensors_.size());
    return tensors_[static_cast<std::size_t>(index)];
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<std::int64_t>& integers_;
  const std::vector<double>& floats_;
  std::size_t next_integer_ = 0, next_float_ = 0;
};

std::int64_t columns_of(const std::vector<PackedMatrix>& matrices) {
  std::int64_t columns = 0;
  for (const PackedMatrix& matrix : matrices) {
    columns += matrix.layout.n;
  }
  return columns;
}

// Every head of the map lies inside the projected columns.
void check_map(const HeadMap& map, int groups, int per_group, int head_dim, std::int64_t columns) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 40;
  const bool sane = map.offset >= 0 && map.group_stride >= 0 && map.head_stride >= 0 &&
                    map.offset < kLimit && map.group_stride < kLimit && map.head_stride < kLimit;
  LOWBIT_CHECK(sane && map.offset + (groups - 1) * map.group_stride +
                               (per_group - 1) * map.head_stride + head_dim <=
                           columns,
               ErrorCode::kValue, "fused_register: heads lie outside the projected columns");
}

void check_columns(std::int64_t at, std::int64_t width, std::int64_t columns) {
  LOWBIT_CHECK(at >= 0 && width >= 0 && at <= columns && width <= columns - at, ErrorCode::kValue,
               "fused_register: columns ", at, " to ", at + width, " of ", columns);
}

void read_low_rank(Reader& in, std::int64_t columns, LowRankQuery& query) {
  query.width = in.small();
  if (query.width == 0) {
    return;
  }
  query.at = in.integer();
  check_columns(query.at, query.width, columns);
  query.norm = in.norm(query.width);
  query.expand = in.matrix();
  LOWBIT_CHECK(query.expand.layout.k == query.width, ErrorCode::kValue,
               "fused_register: low-rank queries of ", query.width, " values");
}

void read_latent(Reader& in, std::int64_t columns, const AttentionSpec& a, LatentSpec& latent) {
  latent.width = in.small();
  if (latent.width == 0) {
    return;
  }
  latent.at = in.integer();
  latent.tail = in.small();
  latent.tail_at = in.integer();
  check_columns(latent.at, latent.width, columns);
  check_columns(latent.tail_at, latent.tail, columns);
  latent.norm = in.norm(latent.width);
  latent.expand = in.matrix();
  latent.head_rows = in.integer();
  latent.key_at = in.integer();
  latent.value_at = in.integer();
  LOWBIT_CHECK(latent.expand.layout.k == latent.width && latent.expand.bias == nullptr &&
                   latent.tail > 0 && latent.tail <= a.head_dim && a.kv_heads == a.heads &&
                   latent.head_rows > 0 && latent.head_rows <= latent.expand.layout.n &&
                   latent.expand.layout.n == a.heads * latent.head_rows,
               ErrorCode::kValue, "fused_register: latents of ", latent.width, " and ", latent.tail,
               " values with ", latent.head_rows, " rows for each head");
  check_columns(latent.key_at, a.head_dim - latent.tail, latent.head_rows);
  check_columns(latent.value_at, a.values(), latent.head_rows);
}

AttentionSpec read_attention(Reader& in) {
  AttentionSpec a;
  a.heads = in.small();
  if (a.heads == 0) {
    return a;
  }
  a.kv_heads = in.small();
  a.head_dim = in.small();
  a.value_dim = in.small();
  constexpr int kMost = 1 << 16;
  LOWBIT_CHECK(a.heads > 0 && a.kv_heads > 0 && a.head_dim > 0 && a.heads % a.kv_heads == 0 &&
                   a.value_dim >= 0 && a.head_dim < kMost && a.value_dim < kMost && a.heads < kMost,
               ErrorCode::kValue, "fused_register: ", a.heads, " heads, ", a.kv_heads,
               " key/value heads of size ", a.head_dim, " and ", a.value_dim);
  a.in = in.matrices();
  LOWBIT_CHECK(!a.in.empty(), ErrorCode::kValue, "fused_register: attention without projections");
  const int group = a.heads / a.kv_heads;
  const std::int64_t columns = columns_of(a.in);
  read_low_rank(in, columns, a.low_rank);
  read_latent(in, columns, a, a.latent);
  for (HeadMap* map : {&a.q, &a.k, &a.v}) {
    map->offset = in.integer();
    map->group_stride = in.integer();
    map->head_stride = in.integer();
    if (map == &a.q) {
      const std::int64_t q_columns = a.low_rank.width > 0 ? a.low_rank.expand.layout.n : columns;
      check_map(*map, a.kv_heads, group, a.head_dim, q_columns);
    } else if (a.latent.width == 0) {
      check_map(*map, a.kv_heads, 1, map == &a.k ? a.head_dim : a.values(), columns);
    }
  }
  a.norm = in.norm(a.in[0].layout.k);
  a.norm_over_heads = in.flag();
  a.norm_last = in.flag();
  LOWBIT_CHECK(!(a.norm_over_heads && a.norm_last), ErrorCode::kValue,
               "fused_register: a norm over all heads comes before the rotation");
  a.q_norm = in.norm(a.norm_over_heads ? std::int64_t{a.heads} * a.head_dim : a.head_dim);
  a.k_norm = in.norm(a.norm_over_heads ? std::int64_t{a.kv_heads} * a.head_dim : a.head_dim);
  const std::int64_t rope = in.integer();
  LOWBIT_CHECK(rope >= 0 && rope <= 3, ErrorCode::kValue, "fused_register: rope kind ", rope);
  a.rope.kind = static_cast<RopeKind>(rope);
  a.rope.begin = in.small();
  a.rope.width = in.small();
  a.rope.table_step = in.small();
  LOWBIT_CHECK(a.rope.begin >= 0 && a.rope.width >= 0 && a.rope.width % 2 == 0 &&
                   a.rope.begin + a.rope.width <= a.head_dim && a.rope.table_step >= 1 &&
                   a.rope.table_step <= 2,
               ErrorCode::kValue, "fused_register: a rotation outside the head");
  LOWBIT_CHECK(a.latent.width == 0 || rope == 0 || a.rope.begin >= a.head_dim - a.latent.tail,
               ErrorCode::kValue, "fused_register: a rotation outside the keys' tail");
  a.cross = in.flag();
  a.sinks = in.vector(a.heads, &a.sinks_dtype);
  a.gate_width = in.small();
  a.gate = {in.integer(), in.integer(), in.integer()};
  a.gate_activation = in.activation();
  LOWBIT_CHECK(a.gate_width == 0 || a.gate_width == 1 || a.gate_width == a.values(),
               ErrorCode::kValue, "fused_register: ", a.gate_width, " gates for a head of size ",
               a.values());
  check_map(a.gate, a.kv_heads, group, a.gate_width, columns);
  a.mixed_norm = in.norm(std::int64_t{a.heads} * a.values());
  a.out = in.matrix();
  a.out_norm = in.norm(a.out.layout.n);
  a.post_norm = in.norm(a.out.layout.n);
  a.residual = in.flag();
  a.scale = in.real();
  a.softcap = in.real();
  a.multiplier = in.real();
  return a;
}

MlpSpec read_mlp(Reader& in) {
  MlpSpec m;
  m.width = in.integer();
  if (m.width == 0) {
    return m;
  }
  constexpr std::int64_t kLimit = std::int64_t{1} << 40;
  LOWBIT_CHECK(m.width > 0 && m.width < kLimit, ErrorCode::kValue,
               "fused_register: an MLP of width ", m.width);
  m.experts = in.integer();
  const std::int64_t each = m.experts == 0 ? 1 : m.experts;
  LOWBIT_CHECK(each > 0 && each < (1 << 20), ErrorCode::kValue, "fused_register: ", m.experts,
               " experts");
  m.in = in.matrices(each);
  const std::int64_t columns = columns_of(m.in);
  m.gate_offset = in.integer();
  m.up_offset = in.integer();
  m.gated = in.flag();
  m.activation = in.activation();
  m.gate = in.gate();
  LOWBIT_CHECK(m.activation != Activation::kXielu || (m.gate.positive && m.gate.negative),
               ErrorCode::kValue, "fused_register: xielu has two parameters");
  const std::int64_t span = (m.width - 1) * m.gate.step + 1;  // of the columns that are read
  LOWBIT_CHECK(!m.in.empty() && m.gate_offset >= 0 && m.up_offset >= 0 &&
                   m.gate_offset <= columns - span && (!m.gated || m.up_offset <= columns - span),
               ErrorCode::kValue, "fused_register: the MLP's columns lie outside its projections");
  m.norm = in.norm(m.in[0].layout.k);
  m.inner_norm = in.norm(m.width);
  m.down = in.matrix(each);
  m.out_norm = in.norm(m.down.layout.n);
  m.post_norm = in.norm(m.down.layout.n);
  m.residual = in.flag();
  m.multiplier = in.real();
  return m;
}

std::int64_t fused_register(std::vector<Tensor> tensors, std::vector<std::int64_t> integers,
                            std::vector<double> floats) {
  auto block = std::make_shared<Block>();
  Reader in(tensors, integers, floats);
  block->spec.attention = read_attention(in);
  block->spec.mlp = read_mlp(in);
  block->spec.parallel = in.flag();
  in.finish();
  block->tensors = std::move(tensors);
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_blocks.emplace(g_next, std::move(block));
  return g_next++;
}

void fused_release(std::int64_t handle) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_blocks.erase(handle);
}

// ---- calls
// ----------------------------------------------------------------------------------------

BlockCall call_of(const char* op, const Tensor& x, std::int64_t precision) {
  BlockCall call;
  call.dtype = float_dtype(op, "x", x.scalar_type(), false);
  check_cpu(op, "x", x);
  LOWBIT_CHECK(x.dim() == 3 && x.is_contiguous(), ErrorCode::kValue, op,
               ": x must be contiguous [batch, tokens, hidden], got ", shape_text(x));
  call.x = x.data_ptr();
  call.batch = x.size(0);
  call.tokens = x.size(1);
  call.hidden = x.size(2);
  call.precision = checked_precision(op, precision);
  return call;
}

void check_hidden(const char* op, const BlockSpec& spec, const BlockCall& call) {
  const std::int64_t k =
      spec.attention.heads > 0 ? spec.attention.in[0].layout.k : spec.mlp.in[0].layout.k;
  LOWBIT_CHECK(k == call.hidden, ErrorCode::kValue, op, ": x must have ", k,
               " values per token, got ", call.hidden);
}

// cos and sin: [batch or 1, tokens, width] or [tokens, width], inner stride 1.
void set_rope(const char* op, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
              BlockCall& call, std::int64_t* width) {
  *width = 0;
  if (!cos || !sin) {
    return;
  }
  call.rope_dtype = float_dtype(op, "cos", cos->scalar_type(), false);
  LOWBIT_CHECK(sin->scalar_type() == cos->scalar_type(), ErrorCode::kType, op,
               ": cos and sin must have one dtype");
  check_cpu(op, "cos", *cos);
  check_cpu(op, "sin", *sin);
  const std::int64_t dim = cos->dim();
  LOWBIT_CHECK((dim == 2 || dim == 3) && sin->dim() == dim && cos->stride(dim - 1) == 1 &&
                   sin->stride(dim - 1) == 1,
               ErrorCode::kValue, op, ": cos and sin must be [batch, tokens, width], got ",
               shape_text(*cos), " and ", shape_text(*sin));
  for (std::int64_t i = 0; i < dim; ++i) {
    LOWBIT_CHECK(cos->size(i) == sin->size(i) &&
                     (cos->size(i) <= 1 || i == dim - 1 || cos->stride(i) == sin->stride(i)),
                 ErrorCode::kValue, op, ": cos and sin must have one shape and the same strides");
  }
  LOWBIT_CHECK(cos->size(dim - 2) == call.tokens &&
                   (dim == 2 || cos->size(0) == 1 || cos->size(0) == call.batch),
               ErrorCode::kValue, op, ": cos is ", shape_text(*cos), " for ", call.batch, " x ",
               call.tokens, " tokens");
  *width = cos->size(dim - 1);
  call.cos = cos->data_ptr();
  call.sin = sin->data_ptr();
  call.rope_stride = cos->stride(dim - 2);
  call.rope_batch_stride = dim == 3 && cos->size(0) > 1 ? cos->stride(0) : 0;
}

// A table as wide as what turns holds every angle twice, and the kernels read one of the two. They
// may differ: positions of several axes, cut by columns instead of by angles.
bool same_twice(const void* table, const BlockCall& call, std::int64_t width, int step) {
  const std::size_t size = dtype_bytes(call.rope_dtype);
  const std::int64_t half = width / 2;
  for (std::int64_t b = 0; b < (call.rope_batch_stride > 0 ? call.batch : 1); ++b) {
    for (std::int64_t t = 0; t < call.tokens; ++t) {
      const char* row = static_cast<const char*>(table) +
                        (b * call.rope_batch_stride + t * call.rope_stride) * size;
      if (step == 1) {
        if (std::memcmp(row, row + half * size, half * size) != 0) {
          return false;
        }
        continue;
      }
      for (std::int64_t i = 0; i < half; ++i) {
        if (std::memcmp(row + 2 * i * size, row + (2 * i + 1) * size, size) != 0) {
          return false;
        }
      }
    }
  }
  return true;
}

void check_rope(const char* op, const BlockSpec& spec, const BlockCall& call, std::int64_t width) {
  const RopeSpec& rope = spec.attention.rope;
  if (spec.attention.heads == 0 || rope.kind == RopeKind::kNone) {
    return;
  }
  LOWBIT_CHECK(width >= (rope.width / 2 - 1) * rope.table_step + 1, ErrorCode::kValue, op,
               ": the block rotates ", rope.width, " values, but cos has ", width);
  // forward.py knows these words: it asks the original block then.
  LOWBIT_CHECK(width != rope.width || (same_twice(call.cos, call, width, rope.table_step) &&
                                       same_twice(call.sin, call, width, rope.table_step)),
               ErrorCode::kValue, op,
               ": cos and sin turn the two values of a pair by different angles");
}

void set_mask(const char* op, const std::optional<Tensor>& mask, std::int64_t positions,
              std::int64_t heads, const BlockCall& call, MaskView& view) {
  if (!mask) {
    return;
  }
  check_cpu(op, "mask", *mask);
  switch (mask->scalar_type()) {
    case ScalarType::Bool:
      view.kind = MaskKind::kBool;
      break;
    case ScalarType::Float:
      view.kind = MaskKind::kFloat32;
      break;
    case ScalarType::Half:
      view.kind = MaskKind::kFloat16;
      break;
    case ScalarType::BFloat16:
      view.kind = MaskKind::kBFloat16;
      break;
    default:
      fail(ErrorCode::kType, op, ": mask must be bool or float, got ",
           torch::headeronly::toString(mask->scalar_type()));
  }
  const bool shaped = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == call.batch) &&
                      (mask->size(1) == 1 || mask->size(1) == heads) &&
                      (mask->size(2) == 1 || mask->size(2) == call.tokens) &&
                      mask->size(3) == positions;
  LOWBIT_CHECK(shaped && (positions <= 1 || mask->stride(3) == 1), ErrorCode::kValue, op,
               ": mask must broadcast to [", call.batch, ", ", heads, ", ", call.tokens, ", ",
               positions, "] with inner stride 1, got ", shape_text(*mask));
  view.data = mask->data_ptr();
  view.batch_stride = mask->size(0) > 1 ? mask->stride(0) : 0;
  view.head_stride = mask->size(1) > 1 ? mask->stride(1) : 0;
  view.stride = mask->size(2) > 1 ? mask->stride(2) : 0;
}

CacheFormat checked_cache_format(const char* op, std::int64_t number, bool quantized) {
  LOWBIT_CHECK(number >= (quantized ? 1 : 0) && number < kCacheFormatCount, ErrorCode::kValue, op,
               ": cache_format must be ", quantized ? "" : "0 (a float type), ",
               "1 (int8) or 2 (fp8), got ", number);
  return static_cast<CacheFormat>(number);
}

// Quantized keys or values: uint8 [batch, kv_heads, blocks, block_bytes], contiguous, with room for
// `positions`.
void check_packed_cache(const char* op, const Tensor& cache, std::int64_t head_dim,
                        std::int64_t positions) {
  check_cpu(op, "cache", cache);
  LOWBIT_CHECK(cache.scalar_type() == ScalarType::Byte, ErrorCode::kType, op,
               ": quantized keys and values must be uint8, got ",
               torch::headeronly::toString(cache.scalar_type()));
  LOWBIT_CHECK(head_dim > 0 && head_dim < (1 << 20) && cache.dim() == 4 && cache.is_contiguous() &&
                   cache.size(3) == cache_block_bytes(head_dim) &&
                   cache.size(2) >= (positions + kCacheBlock - 1) / kCacheBlock,
               ErrorCode::kValue, op,
               ": quantized keys and values must be contiguous [batch, kv_heads, blocks, ",
               cache_block_bytes(head_dim), "] with blocks of 64 for ", positions,
               " positions, got ", shape_text(cache));
}

CacheView packed_view(const char* op, const Tensor& keys, const Tensor& values,
                      const AttentionSpec& spec, const BlockCall& call, std::int64_t positions,
                      CacheFormat format) {
  LOWBIT_CHECK(spec.latent.width == 0 && spec.values() == spec.head_dim, ErrorCode::kValue, op,
               ": only keys and values of one size can be quantized");
  CacheView view;
  view.format = format;
  for (const Tensor* tensor : {&keys, &values}) {
    check_packed_cache(op, *tensor, spec.head_dim, positions);
    LOWBIT_CHECK(tensor->size(0) == call.batch && tensor->size(1) == spec.kv_heads,
                 ErrorCode::kValue, op, ": keys and values must be [", call.batch, ", ",
                 spec.kv_heads, ", blocks, bytes], got ", shape_text(*tensor));
  }
  view.keys = keys.data_ptr();
  view.values = values.data_ptr();
  view.key_head_stride = keys.size(2) * keys.size(3);
  view.key_batch_stride = spec.kv_heads * view.key_head_stride;
  view.value_head_stride = values.size(2) * values.size(3);
  view.value_batch_stride = spec.kv_heads * view.value_head_stride;
  return view;
}

CacheView cache_view(const char* op, const Tensor& keys, const Tensor& values,
                     const AttentionSpec& spec, const BlockCall& call, std::int64_t positions) {
  CacheView view;
  view.dtype = float_dtype(op, "keys", keys.scalar_type(), false);
  for (const Tensor* tensor : {&keys, &values}) {
    check_cpu(op, "keys and values", *tensor);
    LOWBIT_CHECK(tensor->scalar_type() == keys.scalar_type(), ErrorCode::kType, op,
                 ": keys and values must have one dtype");
    const int heads = spec.cache_heads();
    const int size = tensor == &keys ? spec.cache_keys() : spec.cache_values();
    LOWBIT_CHECK(tensor->dim() == 4 && tensor->size(0) == call.batch && tensor->size(1) == heads &&
                     tensor->size(2) >= positions && tensor->size(3) == size &&
                     (size == 1 || tensor->stride(3) == 1),
                 ErrorCode::kValue, op, ": ", tensor == &keys ? "keys" : "values", " must be [",
                 call.batch, ", ", heads, ", ", positions, " or more, ", size, "], got ",
                 shape_text(*tensor));
  }
  view.keys = keys.data_ptr();
  view.values = values.data_ptr();
  view.key_batch_stride = keys.stride(0);
  view.key_head_stride = keys.stride(1);
  view.key_stride = keys.stride(2);
  view.value_batch_stride = values.stride(0);
  view.value_head_stride = values.stride(1);
  view.value_stride = values.stride(2);
  view.positions = positions;
  return view;
}

Tensor like(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty_cpu(sizes.data(), x.dim(), x.scalar_type());
}

Tensor fused_blocks(const Tensor& x_given, std::vector<std::int64_t> handles,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                    std::vector<Tensor> keys, std::vector<Tensor> values, std::int64_t past,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& cross_mask,
                    bool causal, std::int64_t precision, std::int64_t cache_format) {
  const char* op = "fused_blocks";
  const CacheFormat format = checked_cache_format(op, cache_format, /*quantized=*/false);
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  BlockCall call = call_of(op, x, precision);
  std::int64_t rope_width = 0;
  set_rope(op, cos, sin, call, &rope_width);
  LOWBIT_CHECK(past >= 0 && past < (std::int64_t{1} << 40), ErrorCode::kValue, op, ": past is ",
               past);
  LOWBIT_CHECK(keys.size() == values.size(), ErrorCode::kValue, op, ": ", keys.size(), " keys but ",
               values.size(), " values");
  call.past = past;
  call.causal = causal;
  std::vector<std::shared_ptr<const Block>> blocks;
  std::vector<const BlockSpec*> specs;
  std::vector<CacheView> caches(handles.size());
  for (std::size_t i = 0; i < handles.size(); ++i) {
    blocks.push_back(block_of(op, handles[i]));
    const BlockSpec& spec = blocks.back()->spec;
    specs.push_back(&spec);
    check_hidden(op, spec, call);
    check_rope(op, spec, call, rope_width);
    LOWBIT_CHECK(spec.mlp.experts == 0, ErrorCode::kValue, op, ": experts need their choices");
    if (spec.attention.heads > 0) {
      LOWBIT_CHECK(i < keys.size(), ErrorCode::kValue, op, ": no keys for block ", i);
      const bool cross = spec.attention.cross;
      LOWBIT_CHECK(keys[i].dim() == 4, ErrorCode::kValue, op, ": keys must have 4 dimensions");
      const std::int64_t positions = cross ? keys[i].size(2) : past + call.tokens;
      caches[i] =
          cross || format == CacheFormat::kFloat
              ? cache_view(op, keys[i], values[i], spec.attention, call, positions)
              : packed_view(op, keys[i], values[i], spec.attention, call, positions, format);
      // The masks hold for all blocks: the last strides set are those of each.
      set_mask(op, cross ? cross_mask : mask, positions, spec.attention.heads, call,
               cross ? call.cross_mask : call.mask);
    }
  }
  Tensor out = like(x);
  call.out = out.data_ptr();
  run_blocks(specs, caches, call, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fused_project(const Tensor& x_given, std::int64_t handle,
                                                 const std::optional<Tensor>& cos,
                                                 const std::optional<Tensor>& sin,
                                                 std::int64_t precision) {
  const char* op = "fused_project";
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  BlockCall call = call_of(op, x, precision);
  const std::shared_ptr<const Block> block = block_of(op, handle);
  std::int64_t rope_width = 0;
  set_rope(op, cos, sin, call, &rope_width);
  check_hidden(op, block->spec, call);
  check_rope(op, block->spec, call, rope_width);
  const AttentionSpec& a = block->spec.attention;
  LOWBIT_CHECK(a.heads > 0, ErrorCode::kValue, op, ": this block has no attention half");
  const std::int64_t q_sizes[4] = {call.batch, a.heads, call.tokens, a.head_dim + a.gate_width};
  const std::int64_t k_sizes[4] = {call.batch, a.cache_heads(), call.tokens, a.cache_keys()};
  const std::int64_t v_sizes[4] = {call.batch, a.cache_heads(), call.tokens, a.cache_values()};
  Tensor q = empty_cpu(q_sizes, 4, x.scalar_type());
  Tensor k = empty_cpu(k_sizes, 4, x.scalar_type());
  Tensor v = empty_cpu(v_sizes, 4, x.scalar_type());
  project(block->spec, call, q.data_ptr(), k.data_ptr(), v.data_ptr(), torch_threads());
  return {q, k, v};
}

std::tuple<Tensor, Tensor> fused_columns(const Tensor& x_given, std::int64_t handle,
                                         std::int64_t precision) {
  const char* op = "fused_columns";
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  const std::shared_ptr<const Block> block = block_of(op, handle);
  BlockSpec spec = block->spec;
  spec.attention.rope = {};  // nothing is rotated here
  LOWBIT_CHECK(spec.attention.heads > 0, ErrorCode::kValue, op,
               ": this block has no attention half");
  const BlockCall call = call_of(op, x, precision);
  check_hidden(op, spec, call);
  const std::int64_t sizes[3] = {call.batch, call.tokens, columns_of(spec.attention.in)};
  Tensor normed = like(x);
  Tensor projected = empty_cpu(sizes, 3, x.scalar_type());
  columns(spec, call, normed.data_ptr(), projected.data_ptr(), torch_threads());
  return {normed, projected};
}

Tensor fused_attend(const Tensor& x_given, std::int64_t handle, const Tensor& q_given,
                    const Tensor& keys, const Tensor& values, const std::optional<Tensor>& mask,
                    bool causal, std::int64_t precision) {
  const char* op = "fused_attend";
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  const Tensor q = q_given.is_contiguous() ? q_given : torch::stable::contiguous(q_given);
  BlockCall call = call_of(op, x, precision);
  const std::shared_ptr<const Block> block = block_of(op, handle);
  check_hidden(op, block->spec, call);
  const AttentionSpec& a = block->spec.attention;
  LOWBIT_CHECK(a.heads > 0, ErrorCode::kValue, op, ": this block has no attention half");
  LOWBIT_CHECK(q.dim() == 4 && q.size(0) == call.batch && q.size(1) == a.heads &&
                   q.size(2) == call.tokens && q.size(3) == a.head_dim + a.gate_width &&
                   q.scalar_type() == x.scalar_type(),
               ErrorCode::kValue, op, ": q must be what fused_project made, got ", shape_text(q));
  LOWBIT_CHECK(keys.dim() == 4, ErrorCode::kValue, op, ": keys must have 4 dimensions");
  const std::int64_t positions = keys.size(2);
  const CacheView cache = cache_view(op, keys, values, a, call, positions);
  call.causal = causal;
  call.past = positions - call.tokens;
  LOWBIT_CHECK(!causal || call.past >= 0, ErrorCode::kValue, op, ": ", call.tokens,
               " tokens attend causally to ", positions, " positions");
  set_mask(op, mask, positions, a.heads, call, a.cross ? call.cross_mask : call.mask);
  Tensor out = like(x);
  call.out = out.data_ptr();
  attend(block->spec, call, q.data_ptr(), cache, positions, torch_threads());
  return out;
}

CachedHeads cached_heads(const char* op, const Tensor& cache, std::int64_t head_dim,
                         std::int64_t positions, std::int64_t format, std::int64_t part) {
  check_packed_cache(op, cache, head_dim, positions);
  LOWBIT_CHECK(part == 0 || part == 1, ErrorCode::kValue, op,
               ": part must be 0 (keys) or 1 (values), got ", part);
  CachedHeads heads;
  heads.blocks = static_cast<std::byte*>(cache.data_ptr());
  heads.stride = cache.size(2) * cache.size(3);
  heads.heads = cache.size(0) * cache.size(1);
  heads.head_dim = head_dim;
  heads.format = checked_cache_format(op, format, /*quantized=*/true);
  heads.part = static_cast<CachePart>(part);
  return heads;
}

void cache_append_(const Tensor& cache, const Tensor& x_given, std::int64_t past,
                   std::int64_t cache_format, std::int64_t part) {
  const char* op = "cache_append_";
  const DType dtype = float_dtype(op, "x", x_given.scalar_type(), false);
  check_cpu(op, "x", x_given);
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  LOWBIT_CHECK(x.dim() == 4 && cache.dim() == 4 && x.size(0) == cache.size(0) &&
                   x.size(1) == cache.size(1) && past >= 0 && past < (std::int64_t{1} << 40),
               ErrorCode::kValue, op, ": x must be [batch, kv_heads, tokens, head_dim] of ",
               shape_text(cache), " behind ", past, " positions, got ", shape_text(x));
  const CachedHeads heads =
      cached_heads(op, cache, x.size(3), past + x.size(2), cache_format, part);
  cache_append(heads, past, x.size(2), x.data_ptr(), dtype, torch_threads());
}

Tensor cache_read(const Tensor& cache, std::int64_t positions, std::int64_t head_dim,
                  std::int64_t cache_format, std::int64_t part, ScalarType dtype) {
  const char* op = "cache_read";
  LOWBIT_CHECK(positions >= 0 && positions < (std::int64_t{1} << 40), ErrorCode::kValue, op,
               ": positions is ", positions);
  const CachedHeads heads = cached_heads(op, cache, head_dim, positions, cache_format, part);
  const DType out_dtype = float_dtype(op, "dtype", dtype, false);
  const std::int64_t sizes[4] = {cache.size(0), cache.size(1), positions, head_dim};
  Tensor out = empty_cpu(sizes, 4, dtype);
  lowbit::cache_read(heads, positions, out.data_ptr(), out_dtype, torch_threads());
  return out;
}

std::int64_t block_bytes_of(std::int64_t head_dim) {
  LOWBIT_CHECK(head_dim > 0 && head_dim < (1 << 20), ErrorCode::kValue,
               "cache_block_bytes: head_dim is ", head_dim);
  return cache_block_bytes(head_dim);
}

Tensor cache_memory(std::int64_t bytes) {
  LOWBIT_CHECK(bytes >= 0, ErrorCode::kValue, "cache_memory: bytes is ", bytes);
  return streamed_bytes(1, bytes, Streamed::kCaches);
}

Tensor fused_experts(const Tensor& x_given, std::int64_t handle, const Tensor& ids_given,
                     const Tensor& weights_given, std::int64_t precision) {
  const char* op = "fused_experts";
  const auto dense = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  const Tensor x = dense(x_given), ids = dense(ids_given), weights = dense(weights_given);
  LOWBIT_CHECK(x.dim() == 2, ErrorCode::kValue, op, ": x must be [tokens, hidden], got ",
               shape_text(x));
  const std::shared_ptr<const Block> block = block_of(op, handle);
  LOWBIT_CHECK(block->spec.mlp.experts > 0, ErrorCode::kValue, op, ": this block has no experts");
  check_cpu(op, "x", x);
  check_cpu(op, "ids", ids);
  check_cpu(op, "weights", weights);
  LOWBIT_CHECK(ids.scalar_type() == ScalarType::Long, ErrorCode::kType, op,
               ": ids must be int64, got ", torch::headeronly::toString(ids.scalar_type()));
  LOWBIT_CHECK(ids.dim() == 2 && ids.size(0) == x.size(0) && weights.dim() == 2 &&
                   weights.size(0) == ids.size(0) && weights.size(1) == ids.size(1),
               ErrorCode::kValue, op, ": ids and weights must be [", x.size(0),
               ", experts per token], got ", shape_text(ids), " and ", shape_text(weights));
  BlockCall call;
  call.dtype = float_dtype(op, "x", x.scalar_type(), false);
  call.x = x.data_ptr();
  call.tokens = x.size(0);
  call.hidden = x.size(1);
  call.precision = checked_precision(op, precision);
  check_hidden(op, block->spec, call);
  Tensor out = like(x);
  call.out = out.data_ptr();
  run_experts(block->spec, call, static_cast<const std::int64_t*>(ids.data_ptr()),
              weights.data_ptr(), float_dtype(op, "weights", weights.scalar_type(), false),
              ids.size(1), torch_threads());
  return out;
}

}  // namespace
}  // namespace lowbit::binding

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  using namespace lowbit::binding;
  m.impl("fused_blocks", LOWBIT_BOX(fused_blocks));
  m.impl("fused_project", LOWBIT_BOX(fused_project));
  m.impl("fused_experts", LOWBIT_BOX(fused_experts));
  m.impl("fused_columns", LOWBIT_BOX(fused_columns));
  m.impl("fused_attend", LOWBIT_BOX(fused_attend));
  m.impl("cache_append_", LOWBIT_BOX(cache_append_));
  m.impl("cache_read", LOWBIT_BOX(cache_read));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  using namespace lowbit::binding;
  m.impl("fused_register", LOWBIT_BOX(fused_register));
  m.impl("fused_release", LOWBIT_BOX(fused_release));
  m.impl("cache_block_bytes", LOWBIT_BOX(block_bytes_of));
  m.impl("cache_memory", LOWBIT_BOX(cache_memory));
}
