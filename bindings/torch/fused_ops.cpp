// The fused decoder-block operators: arguments checked, then lowbit/fused.h.
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "fused_blocks.h"
#include "lowbit/fused.h"
#include "packed_cache.h"

namespace lowbit::binding {
namespace {

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
               ": cos and sin must have one dtype, got ",
               torch::headeronly::toString(cos->scalar_type()), " and ",
               torch::headeronly::toString(sin->scalar_type()));
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
                 ErrorCode::kValue, op,
                 ": cos and sin must have one shape and the same strides, got shapes ",
                 shape_text(*cos), " and ", shape_text(*sin));
  }
  LOWBIT_CHECK(cos->size(dim - 2) == call.tokens &&
                   (dim == 2 || cos->size(0) == 1 || cos->size(0) == call.batch),
               ErrorCode::kValue, op, ": cos must be [1 or ", call.batch, ", ", call.tokens,
               ", width], got ", shape_text(*cos));
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
                 ": keys and values must have one dtype, got ",
                 torch::headeronly::toString(keys.scalar_type()), " and ",
                 torch::headeronly::toString(values.scalar_type()));
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
  LOWBIT_CHECK(past >= 0 && past < (std::int64_t{1} << 40), ErrorCode::kValue, op,
               ": past must be 0 to 2^40 - 1, got ", past);
  LOWBIT_CHECK(keys.size() == values.size(), ErrorCode::kValue, op,
               ": as many keys as values are needed, got ", keys.size(), " and ", values.size());
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
    LOWBIT_CHECK(spec.mlp.experts == 0, ErrorCode::kValue, op, ": block ", i,
                 " has experts, which need the choices of a router; call fused_experts");
    if (spec.attention.heads > 0) {
      LOWBIT_CHECK(i < keys.size(), ErrorCode::kValue, op,
                   ": each block with attention needs keys and values, got ", keys.size(), " for ",
                   handles.size(), " blocks");
      const bool cross = spec.attention.cross;
      LOWBIT_CHECK(keys[i].dim() == 4, ErrorCode::kValue, op, ": keys must have 4 dimensions, got ",
                   shape_text(keys[i]));
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
  LOWBIT_CHECK(keys.dim() == 4, ErrorCode::kValue, op, ": keys must have 4 dimensions, got ",
               shape_text(keys));
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
}
