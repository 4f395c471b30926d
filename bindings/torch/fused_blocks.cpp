// Descriptions of decoder blocks: numbers from describe.py, checked, into BlockSpec.
#include "fused_blocks.h"

#include <mutex>
#include <unordered_map>

namespace lowbit::binding {
namespace {

std::mutex g_mutex;
std::unordered_map<std::int64_t, std::shared_ptr<const Block>> g_blocks;
std::int64_t g_next = 1;

// Reads the numbers in the order in which describe.py writes them.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<std::int64_t>& integers,
         const std::vector<double>& floats)
      : tensors_(tensors), integers_(integers), floats_(floats) {}

  std::int64_t integer() {
    LOWBIT_CHECK(next_integer_ < integers_.size(), ErrorCode::kValue,
                 "fused_register: the description ends after ", integers_.size(),
                 " integers, and more are read; is it that of another version?");
    return integers_[next_integer_++];
  }
  int small() { return checked_int("fused_register", "a number of the description", integer()); }
  float real() {
    LOWBIT_CHECK(next_float_ < floats_.size(), ErrorCode::kValue,
                 "fused_register: the description ends after ", floats_.size(),
                 " floats, and more are read; is it that of another version?");
    return static_cast<float>(floats_[next_float_++]);
  }
  bool flag() { return integer() != 0; }
  Activation activation() {
    const std::int64_t number = integer();
    LOWBIT_CHECK(number >= 0 && number < kActivationCount, ErrorCode::kValue,
                 "fused_register: activation must be 0 to ", kActivationCount - 1, ", got ",
                 number);
    return static_cast<Activation>(number);
  }
  void finish() const {
    LOWBIT_CHECK(next_integer_ == integers_.size() && next_float_ == floats_.size(),
                 ErrorCode::kValue, "fused_register: the description has ", integers_.size(),
                 " integers and ", floats_.size(), " floats, of which ", next_integer_, " and ",
                 next_float_, " are read; is it that of another version?");
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
    LOWBIT_CHECK(kind >= 0 && kind <= 2, ErrorCode::kValue,
                 "fused_register: norm kind must be 0 to 2, got ", kind);
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
                 "fused_register: the step between columns of a gate must be 1 or 2, got ",
                 spec.step);
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
    LOWBIT_CHECK(count >= 0 && count <= 8, ErrorCode::kValue,
                 "fused_register: an input may have up to 8 projections, got ", count);
    std::vector<PackedMatrix> result;
    for (std::int64_t i = 0; i < count; ++i) {
      result.push_back(matrix(each));
    }
    return result;
  }

 private:
  const Tensor& at(std::int64_t index) const {
    LOWBIT_CHECK(index >= 0 && index < static_cast<std::int64_t>(tensors_.size()),
                 ErrorCode::kValue, "fused_register: tensor ", index, " is named, but there are ",
                 tensors_.size());
    return tensors_[static_cast<std::size_t>(index)];
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<std::int64_t>& integers_;
  const std::vector<double>& floats_;
  std::size_t next_integer_ = 0, next_float_ = 0;
};

// Every head of the map lies inside the projected columns.
void check_map(const HeadMap& map, int groups, int per_group, int head_dim, std::int64_t columns) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 40;
  const bool sane = map.offset >= 0 && map.group_stride >= 0 && map.head_stride >= 0 &&
                    map.offset < kLimit && map.group_stride < kLimit && map.head_stride < kLimit;
  LOWBIT_CHECK(sane && map.offset + (groups - 1) * map.group_stride +
                               (per_group - 1) * map.head_stride + head_dim <=
                           columns,
               ErrorCode::kValue, "fused_register: ", groups, " x ", per_group, " heads of size ",
               head_dim, " from column ", map.offset, " on must lie within the ", columns,
               " projected columns");
}

void check_columns(std::int64_t at, std::int64_t width, std::int64_t columns) {
  LOWBIT_CHECK(at >= 0 && width >= 0 && at <= columns && width <= columns - at, ErrorCode::kValue,
               "fused_register: columns ", at, " to ", at + width, " must lie within the ", columns,
               " projected columns");
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
  LOWBIT_CHECK(!a.in.empty(), ErrorCode::kValue,
               "fused_register: attention needs a projection of its input, got none");
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
               "fused_register: a norm over all heads must come before the rotation");
  a.q_norm = in.norm(a.norm_over_heads ? std::int64_t{a.heads} * a.head_dim : a.head_dim);
  a.k_norm = in.norm(a.norm_over_heads ? std::int64_t{a.kv_heads} * a.head_dim : a.head_dim);
  const std::int64_t rope = in.integer();
  LOWBIT_CHECK(rope >= 0 && rope <= 3, ErrorCode::kValue,
               "fused_register: rope kind must be 0 to 3, got ", rope);
  a.rope.kind = static_cast<RopeKind>(rope);
  a.rope.begin = in.small();
  a.rope.width = in.small();
  a.rope.table_step = in.small();
  LOWBIT_CHECK(a.rope.begin >= 0 && a.rope.width >= 0 && a.rope.width % 2 == 0 &&
                   a.rope.begin + a.rope.width <= a.head_dim && a.rope.table_step >= 1 &&
                   a.rope.table_step <= 2,
               ErrorCode::kValue, "fused_register: an even number of values within a head of size ",
               a.head_dim, " must be rotated, by tables of step 1 or 2; got values ", a.rope.begin,
               " to ", a.rope.begin + a.rope.width, " and step ", a.rope.table_step);
  LOWBIT_CHECK(a.latent.width == 0 || rope == 0 || a.rope.begin >= a.head_dim - a.latent.tail,
               ErrorCode::kValue, "fused_register: only the last ", a.latent.tail,
               " values of a head of size ", a.head_dim, " may be rotated, got those from ",
               a.rope.begin, " on");
  a.cross = in.flag();
  a.sinks = in.vector(a.heads, &a.sinks_dtype);
  a.gate_width = in.small();
  a.gate = {in.integer(), in.integer(), in.integer()};
  a.gate_activation = in.activation();
  LOWBIT_CHECK(a.gate_width == 0 || a.gate_width == 1 || a.gate_width == a.values(),
               ErrorCode::kValue, "fused_register: a head of size ", a.values(),
               " has no gate, one, or one for each value; got ", a.gate_width);
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
               "fused_register: the width of an MLP must be 0 to 2^40 - 1, got ", m.width);
  m.experts = in.integer();
  const std::int64_t each = m.experts == 0 ? 1 : m.experts;
  LOWBIT_CHECK(each > 0 && each < (1 << 20), ErrorCode::kValue,
               "fused_register: experts must be 0 to 2^20 - 1, got ", m.experts);
  m.in = in.matrices(each);
  const std::int64_t columns = columns_of(m.in);
  m.gate_offset = in.integer();
  m.up_offset = in.integer();
  m.gated = in.flag();
  m.activation = in.activation();
  m.gate = in.gate();
  LOWBIT_CHECK(m.activation != Activation::kXielu || (m.gate.positive && m.gate.negative),
               ErrorCode::kValue, "fused_register: xielu needs both of its parameters");
  const std::int64_t span = (m.width - 1) * m.gate.step + 1;  // of the columns that are read
  LOWBIT_CHECK(!m.in.empty() && m.gate_offset >= 0 && m.up_offset >= 0 &&
                   m.gate_offset <= columns - span && (!m.gated || m.up_offset <= columns - span),
               ErrorCode::kValue, "fused_register: ", span, " columns of an MLP from ",
               m.gate_offset, " (gate) and ", m.up_offset, " (up) on must lie within its ", columns,
               " projected columns");
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

}  // namespace

std::int64_t columns_of(const std::vector<PackedMatrix>& matrices) {
  std::int64_t columns = 0;
  for (const PackedMatrix& matrix : matrices) {
    columns += matrix.layout.n;
  }
  return columns;
}

std::shared_ptr<const Block> block_of(const char* op, std::int64_t handle) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = g_blocks.find(handle);
  LOWBIT_CHECK(found != g_blocks.end(), ErrorCode::kValue, op, ": no block has the handle ", handle,
               "; was it released?");
  return found->second;
}

}  // namespace lowbit::binding

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  using namespace lowbit::binding;
  m.impl("fused_register", LOWBIT_BOX(fused_register));
  m.impl("fused_release", LOWBIT_BOX(fused_release));
}
