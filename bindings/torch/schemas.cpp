// Every operator's schema, in one place. Numbers: `format` is lowbit::Format, `precision` is
// lowbit::Precision; `packed` is uint8 [tiles, tile_bytes] (docs/formats.md), several matrices one
// after the other. In python/ipex_llm: fake kernels in ops.py, autograd in autograd.py, the path
// for devices without kernels in plain.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lowbit, m) {
  // x [..., k], bias [n] or none -> [..., n] in the dtype of x.
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int n, int k, int format, int group_size, "
      "int exponent, int precision) -> Tensor");
  // The same without an autograd formula: what eager inference calls (autograd.py).
  m.def(
      "linear_forward(Tensor x, Tensor packed, Tensor? bias, int n, int k, int format, "
      "int group_size, int exponent, int precision) -> Tensor");
  // weight [..., n, k] -> packed bytes of every matrix, and one exponent (int64, 0-d, CPU) for all.
  m.def("quantize(Tensor weight, int format, int group_size) -> (Tensor packed, Tensor exponent)");
  // The same packed bytes in memory like that which quantize() takes (lowbit/memory.h).
  m.def("copy_packed(Tensor packed) -> Tensor");
  // -> float tensor of `shape` [..., n, k].
  m.def(
      "dequantize(Tensor packed, int[] shape, int format, int group_size, int exponent, "
      "ScalarType dtype) -> Tensor");
  // Codes and scales that exist already (include/lowbit/pack.h): codes uint8 [..., n, k], scales
  // and minima float16 [..., n, groups], or float32 [..., n] for fp8 -> packed bytes of every
  // matrix.
  m.def(
      "pack_codes(Tensor codes, Tensor scales, Tensor? minima, int format, int group_size) -> "
      "Tensor packed");
  // The inverse; minima are [..., n, 0] where the format has none.
  m.def(
      "unpack_codes(Tensor packed, int[] shape, int format, int group_size) -> "
      "(Tensor codes, Tensor scales, Tensor minima)");
  // Rows of one matrix: ids [...] -> [..., k].
  m.def(
      "embedding(Tensor packed, Tensor ids, int n, int k, int format, int group_size, "
      "int exponent, ScalarType dtype) -> Tensor");
  // Row-major flat index of the first NaN or infinity, or -1.
  m.def("first_nonfinite(Tensor x) -> int");

  // The table of formats, one line each: name, bits, code kind, scale kind, zero point, padding
  // code, codebook. Python keeps no copy of it.
  m.def("format_table() -> str");
  // A saved directory (docs/files.md): the text of its manifest, and its tensors in the manifest's
  // order, over memory that is mapped privately or read.
  m.def("file_open(str directory, bool mmap, bool verify) -> (str manifest, Tensor[] tensors)");
  // One safetensors file of any maker, as strictly checked.
  m.def("safetensors_open(str path, bool mmap) -> (str[] names, Tensor[] tensors)");
  // A GGUF model of one file or several (include/lowbit/gguf.h): describe_gguf() and outline_gguf()
  // of its header, and the blocks of its tensors in the order of the former; all but the
  // description uint8 [bytes].
  m.def("gguf_open(str path, bool mmap) -> (str description, Tensor outline, Tensor[] blocks)");
  // The table of ggml's types, one line each: number, name, elements and bytes of a block, number
  // of the exact format or -1, its group size, whether it has values.
  m.def("ggml_types() -> str");
  // Blocks of a matrix [n, k] of ggml type `type` -> floats [n, k], or the given rows (int64 [m]).
  m.def(
      "ggml_dequantize(Tensor blocks, int type, int n, int k, Tensor? rows, ScalarType dtype) -> "
      "Tensor");
  // ... -> packed bytes in the type's exact format; not lossless: the bytes are undefined.
  m.def(
      "ggml_pack(Tensor blocks, int type, int n, int k, Tensor? rows) -> "
      "(Tensor packed, int exponent, bool lossless)");
  // The inverse.
  m.def(
      "ggml_unpack(Tensor packed, int n, int k, int format, int group_size, int exponent, "
      "Tensor? rows, int type) -> (Tensor blocks, bool lossless)");
  // A handle for a save to come; aborting it does nothing unless the save has begun.
  m.def("file_save_handle() -> int handle");
  // Begins a save: the names of the request's tensors in the order in which their bytes must be
  // written.
  m.def(
      "file_save_begin(int handle, str directory, str request, int max_shard_bytes, "
      "str[] extra_names, Tensor[] extra_contents) -> str[] order");
  m.def("file_save_write(int handle, Tensor data) -> ()");
  m.def("file_save_commit(int handle) -> str manifest");
  m.def("file_save_abort(int handle) -> ()");

  // Decoder blocks (include/lowbit/fused.h). A block is registered once: its description as numbers
  // (python/ipex_llm/fuse/describe.py writes them, fused_ops.cpp reads them) and the tensors these
  // point to, which the handle keeps alive.
  m.def("fused_register(Tensor[] tensors, int[] integers, float[] floats) -> int handle");
  m.def("fused_release(int handle) -> ()");
  // Runs blocks one after the other; keys and values [batch, kv_heads, capacity, head_dim] of every
  // block get the new positions behind the `past` ones they hold; a cross attention reads all of
  // them. Masks: bool or float, broadcast against [batch, heads, tokens, positions].
  // `cache_format` is lowbit::CacheFormat; quantized keys and values are uint8 [batch, kv_heads,
  // blocks, block_bytes].
  m.def(
      "fused_blocks(Tensor x, int[] handles, Tensor? cos, Tensor? sin, Tensor[] keys, "
      "Tensor[] values, int past, Tensor? mask, Tensor? cross_mask, bool causal, int precision, "
      "int cache_format=0) -> Tensor");
  // Quantized keys (part 0) or values (part 1): x [batch, kv_heads, tokens, head_dim] to the
  // positions from `past` on, and positions [0, positions) back.
  m.def("cache_append_(Tensor(a!) cache, Tensor x, int past, int cache_format, int part) -> ()");
  m.def(
      "cache_read(Tensor cache, int positions, int head_dim, int cache_format, int part, "
      "ScalarType dtype) -> Tensor");
  m.def("cache_block_bytes(int head_dim) -> int");
  // Memory for keys or values, uint8 [1, bytes], in huge pages where that pays.
  m.def("cache_memory(int bytes) -> Tensor");
  // An attention half in two parts, for caches that are not ours.
  m.def(
      "fused_project(Tensor x, int handle, Tensor? cos, Tensor? sin, int precision) -> "
      "(Tensor q, Tensor k, Tensor v)");
  m.def("fused_columns(Tensor x, int handle, int precision) -> (Tensor normed, Tensor columns)");
  m.def(
      "fused_attend(Tensor x, int handle, Tensor q, Tensor keys, Tensor values, Tensor? mask, "
      "bool causal, int precision) -> Tensor");
  // Experts in one 3-D tensor: x [tokens, hidden]; ids int64 and weights [tokens, experts per
  // token].
  m.def("fused_experts(Tensor x, int handle, Tensor ids, Tensor weights, int precision) -> Tensor");

  // Freed memory that the allocator keeps, to the system (lowbit/memory.h).
  m.def("return_freed_memory() -> ()");

  m.def("isa() -> str");
  m.def("describe_isa() -> str");
  m.def("available_isas() -> str");
  m.def("force_isa(str name) -> ()");
}
