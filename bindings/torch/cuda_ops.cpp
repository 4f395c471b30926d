// The operators on CUDA tensors. `packed` is in device order here (src/cuda/device_layout.h):
// repack_to_device() and repack_from_device() translate, losslessly; ops.move_packed() in Python
// calls them whenever packed bytes change between devices.
//
// Everything is stable ABI of torch 2.11 plus one C function of libtorch_cuda, found at run time,
// so that this library loads into any torch >= 2.11 with CUDA and is never needed without.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/kernels.h"
#include "cuda/select.h"
#include "format/checks.h"
#include "reference/reference.h"

namespace lowbit::binding {
namespace {

using torch::stable::accelerator::DeviceGuard;

struct Device {
  int sm = 0;
  int sm_count = 0;
};

// Attributes of a device, read once: linear() must not ask the driver at every call.
const Device& device_facts(int index) {
  constexpr int kMostDevices = 64;
  static std::array<Device, kMostDevices> facts;
  static std::array<std::once_flag, kMostDevices> once;
  LOWBIT_CHECK(index >= 0 && index < kMostDevices, ErrorCode::kValue, "CUDA device ", index,
               " is beyond the ", kMostDevices, " that are supported");
  std::call_once(once[static_cast<std::size_t>(index)], [index] {
    int major = 0, minor = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    facts[static_cast<std::size_t>(index)] = {major * 10 + minor, count};
  });
  return facts[static_cast<std::size_t>(index)];
}

cuda::Stream current_stream(int device) {
  using Getter = AOTITorchError (*)(std::int32_t, void**);
  // torch has its CUDA library in the process already; a link to it would make us need it.
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Getter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                            : nullptr);
  }();
  LOWBIT_CHECK(
      getter != nullptr, ErrorCode::kResource,
      "torch's CUDA library (libtorch_cuda.so) is not loaded; is this a CUDA build of torch?");
  void* stream = nullptr;
  LOWBIT_CHECK(getter(device, &stream) == 0, ErrorCode::kResource,
               "torch has no current CUDA stream for device ", device);
  return static_cast<cuda::Stream>(stream);
}

void check_launch(const char* op, int error) {
  LOWBIT_CHECK(error == 0, ErrorCode::kResource, op, ": the CUDA kernel did not start: ",
               cudaGetErrorString(static_cast<cudaError_t>(error)));
}

int check_cuda(const char* op, const char* argument, const Tensor& tensor) {
  LOWBIT_CHECK(tensor.is_cuda(), ErrorCode::kValue, op, ": ", argument,
               " must be on the GPU like the other arguments; move all of them to one device");
  return tensor.get_device_index();
}

void check_same_device(const char* op, const char* argument, const Tensor& tensor, int device) {
  const int other = check_cuda(op, argument, tensor);
  LOWBIT_CHECK(other == device, ErrorCode::kValue, op, ": ", argument, " is on cuda:", other,
               " but packed is on cuda:", device, "; move all arguments to one device");
}

const void* packed_on_gpu(const char* op, const Tensor& packed, const Layout& layout,
                          std::int64_t matrices = 1) {
  check_packed(op, packed, layout, matrices,
               [](const char* name, const char* argument, const Tensor& tensor) {
                 check_cuda(name, argument, tensor);
               });
  const void* data = packed.data_ptr();
  LOWBIT_CHECK(reinterpret_cast<std::uintptr_t>(data) % kUnitBytes == 0, ErrorCode::kValue, op,
               ": packed must start at a multiple of ", kUnitBytes, " bytes; clone() aligns it");
  LOWBIT_CHECK(layout.k_padded < (std::int64_t{1} << 30) && layout.tiles < (std::int64_t{1} << 30),
               ErrorCode::kValue, op, ": ", layout.n, " x ", layout.k, " is too large for the GPU");
  return data;
}

Tensor empty_gpu(const std::int64_t* sizes, std::int64_t dim, ScalarType type, int device) {
  std::int64_t strides[64];
  LOWBIT_CHECK(dim <= 64, ErrorCode::kValue, "a tensor may have 64 dimensions, got ", dim);
  std::int64_t stride = 1;
  for (std::int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  const auto dtype = static_cast<std::int32_t>(
      torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type)));
  AtenTensorHandle handle = nullptr;
  LOWBIT_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cuda(),
                                        device, &handle) == 0,
               ErrorCode::kResource, "out of GPU memory for a tensor of ", stride,
               " elements; free some, or use a smaller batch");
  return Tensor(handle);
}

Tensor to_dtype(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  LOWBIT_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == 0,
               ErrorCode::kResource, "linear: torch's own linear failed on the dequantized weight");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- linear ---------------------------------------------------------------------------------

struct Rows {
  std::int64_t rows;
  std::int64_t stride;
};

// The rows of `x` as a matrix with one stride, if its leading dimensions collapse.
std::optional<Rows> rows_of(const Tensor& x) {
  const std::int64_t dim = x.dim();
  const std::int64_t k = x.size(dim - 1);
  if (k > 1 && x.stride(dim - 1) != 1) return std::nullopt;
  std::int64_t rows = 1;
  std::int64_t stride = k;
  for (std::int64_t d = dim - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) {
      stride = x.stride(d);
    } else if (x.stride(d) != rows * stride) {
      return std::nullopt;
    }
    rows *= x.size(d);
  }
  return Rows{rows, stride};
}

struct Linear {
  Tensor x;
  const Tensor& packed;
  std::optional<Tensor> bias;
  Layout layout;
  cuda::Geometry geometry;
  int exponent;
  Precision precision;
  DType x_dtype;
  const void* weight;
  Rows rows;
  int device;
  cuda::Stream stream;
};

bool aligned_rows(const Linear& call) {
  return reinterpret_cast<std::uintptr_t>(call.x.data_ptr()) % 16 == 0 &&
         (call.rows.rows <= 1 || call.rows.stride % 8 == 0);
}

Linear checked_linear(const char* op, const Tensor& x_given, const Tensor& packed,
                      const std::optional<Tensor>& bias, std::int64_t n, std::int64_t k,
                      std::int64_t format, std::int64_t group_size, std::int64_t exponent,
                      std::int64_t precision, std::int64_t matrices = 1) {
  const DType x_dtype = float_dtype(op, "x", x_given.scalar_type(), /*allow_double=*/false);
  const Layout layout =
      make_layout(checked_format(op, format), n, k, checked_int(op, "group_size", group_size));
  const void* weight = packed_on_gpu(op, packed, layout, matrices);
  const int device = packed.get_device_index();
  check_same_device(op, "x", x_given, device);
  const std::int64_t dim = x_given.dim();
  LOWBIT_CHECK(dim >= 1 && x_given.size(dim - 1) == k, ErrorCode::kValue, op,
               ": the last dimension of x must be ", k, " to go with a weight of ", n, " x ", k,
               ", got x ", shape_text(x_given));
  if (bias) {
    float_dtype(op, "bias", bias->scalar_type(), /*allow_double=*/false);
    check_same_device(op, "bias", *bias, device);
    LOWBIT_CHECK(bias->dim() == 1 && bias->size(0) == n, ErrorCode::kValue, op, ": bias must be [",
                 n, "], got ", shape_text(*bias));
    LOWBIT_CHECK(n <= 1 || bias->stride(0) == 1, ErrorCode::kValue, op,
                 ": bias must be contiguous; call contiguous() on it");
  }
  Linear call{x_given,
              packed,
              bias,
              layout,
              cuda::make_geometry(layout),
              checked_int(op, "exponent", exponent),
              checked_precision(op, precision),
              x_dtype,
              weight,
              {},
              device,
              nullptr};
  return call;
}

// Collapses and, for the fused kernels, aligns the rows of x. Needs the device guard.
void settle_rows(Linear& call) {
  std::optional<Rows> rows = rows_of(call.x);
  const bool half = call.x_dtype != DType::kFloat32;
  if (rows) call.rows = *rows;
  if (!rows || (half && call.layout.k % 8 == 0 && !aligned_rows(call))) {
    call.x = torch::stable::clone(torch::stable::contiguous(call.x));
    call.rows = *rows_of(call.x);
  }
}

cuda::FusedArgs fused_args(const Linear& call, const Tensor& out) {
  cuda::FusedArgs args{};
  args.packed = call.weight;
  args.geometry = call.geometry;
  args.exponent = call.exponent;
  args.x = call.x.data_ptr();
  args.dtype = call.x_dtype;
  args.x_stride = call.rows.stride;
  if (call.bias) {
    args.bias = call.bias->data_ptr();
    args.bias_dtype = float_dtype("linear", "bias", call.bias->scalar_type(), false);
  }
  args.out = out.data_ptr();
  args.out_stride = call.layout.n;
  args.m = call.rows.rows;
  args.sm_count = device_facts(call.device).sm_count;
  return args;
}

Tensor empty_out(const Linear& call) {
  std::array<std::int64_t, 64> sizes;
  const std::int64_t dim = call.x.dim();
  for (std::int64_t d = 0; d < dim; ++d) sizes[static_cast<std::size_t>(d)] = call.x.size(d);
  sizes[static_cast<std::size_t>(dim - 1)] = call.layout.n;
  return empty_gpu(sizes.data(), dim, scalar_type(call.x_dtype), call.device);
}

Tensor through_cublas(const Linear& call, cuda::Path path) {
  const ScalarType compute =
      path == cuda::Path::kExact ? ScalarType::Float : scalar_type(call.x_dtype);
  Tensor weight = [&] {
    if (path == cuda::Path::kDirect) {  // row-major already: a view of the packed bytes
      const std::int64_t sizes[] = {call.layout.n, call.layout.k};
      const std::int64_t strides[] = {call.layout.k_padded, 1};
      return torch::stable::from_blob(
          const_cast<void*>(call.weight), {sizes, 2}, {strides, 2},
          torch::stable::Device(torch::headeronly::DeviceType::CUDA, call.device), compute);
    }
    const std::int64_t sizes[] = {call.layout.n, call.layout.k};
    Tensor scratch = empty_gpu(sizes, 2, compute, call.device);
    const cuda::DequantizeArgs args{call.weight,
                                    call.geometry,
                                    call.exponent,
                                    scratch.data_ptr(),
                                    path == cuda::Path::kExact ? DType::kFloat32 : call.x_dtype,
                                    call.layout.k,
                                    0,
                                    call.layout.n,
                                    /*exact=*/false};
    check_launch("linear", cuda::dequantize(args, call.stream));
    return scratch;
  }();
  std::optional<Tensor> bias;
  if (call.bias) bias = to_dtype(*call.bias, compute);
  return to_dtype(torch_linear(to_dtype(call.x, compute), weight, bias), scalar_type(call.x_dtype));
}

// fp8 weights by fp8 tensor cores; x is quantized into scratch of torch's allocator.
Tensor through_eight(const Linear& call, const char* op, const cuda::QmmShape& shape) {
  Tensor out = empty_out(call);
  const std::int64_t bytes[] = {call.rows.rows, call.layout.k};
  const Tensor codes = empty_gpu(bytes, 2, ScalarType::Byte, call.device);
  const Tensor scales = empty_gpu(bytes, 1, ScalarType::Float, call.device);
  const cuda::EightArgs args{fused_args(call, out), codes.data_ptr(),
                             static_cast<float*>(scales.data_ptr())};
  check_launch(op, cuda::qmm_eight(args, shape, call.stream));
  return out;
}

cuda::Problem problem_of(const Linear& call) {
  const Device& facts = device_facts(call.device);
  return {call.rows.rows, call.layout.n,  call.layout.k,      call.geometry, call.exponent,
          call.x_dtype,   call.precision, aligned_rows(call), facts.sm,      facts.sm_count};
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              std::int64_t n, std::int64_t k, std::int64_t format, std::int64_t group_size,
              std::int64_t exponent, std::int64_t precision) {
  Linear call =
      checked_linear("linear", x, packed, bias, n, k, format, group_size, exponent, precision);
  const DeviceGuard guard(call.device);
  call.stream = current_stream(call.device);
  settle_rows(call);
  if (call.rows.rows == 0 || n == 0) return empty_out(call);
  const cuda::Choice choice = cuda::select(problem_of(call));
  if (choice.path == cuda::Path::kQmv || choice.path == cuda::Path::kQmm) {
    Tensor out = empty_out(call);
    const cuda::FusedArgs args = fused_args(call, out);
    check_launch("linear", choice.path == cuda::Path::kQmv
                               ? cuda::qmv(args, choice.qmv, call.stream)
                               : cuda::qmm(args, choice.qmm, call.stream));
    return out;
  }
  if (choice.path == cuda::Path::kEight) return through_eight(call, "linear", choice.qmm);
  return through_cublas(call, choice.path);
}

// ---- experts --------------------------------------------------------------------------------

// Expert by expert, for what no grouped kernel takes. Waits for the device: the rows of each are
// known there.
Tensor expert_by_expert(const Linear& call, const Tensor& ends_on_gpu, std::int64_t format,
                        std::int64_t group_size, std::int64_t precision) {
  Tensor out = empty_out(call);
  const Tensor ends =
      torch::stable::to(ends_on_gpu, torch::stable::Device(torch::headeronly::DeviceType::CPU, 0));
  std::int64_t begin = 0;
  for (std::int64_t expert = 0; expert < ends.size(0); ++expert) {
    const std::int64_t end = std::min<std::int64_t>(
        static_cast<const std::int32_t*>(ends.data_ptr())[expert], call.rows.rows);
    if (end <= begin) continue;
    Tensor x = call.x, packed = call.packed, part = out;
    x = torch::stable::narrow(x, 0, begin, end - begin);
    packed = torch::stable::narrow(packed, 0, expert * call.layout.tiles, call.layout.tiles);
    part = torch::stable::narrow(part, 0, begin, end - begin);
    torch::stable::copy_(part, linear(x, packed, std::nullopt, call.layout.n, call.layout.k, format,
                                      group_size, call.exponent, precision));
    begin = end;
  }
  return out;
}

Linear checked_grouped(const char* op, const Tensor& x, const Tensor& packed, const Tensor& ends,
                       std::int64_t n, std::int64_t k, std::int64_t format, std::int64_t group_size,
                       std::int64_t exponent, std::int64_t precision) {
  LOWBIT_CHECK(ends.scalar_type() == ScalarType::Int && ends.dim() == 1 &&
                   (ends.size(0) <= 1 || ends.stride(0) == 1),
               ErrorCode::kValue, op,
               ": ends must be a contiguous int32 vector, where the rows of each expert end, got ",
               torch::headeronly::toString(ends.scalar_type()), " ", shape_text(ends));
  LOWBIT_CHECK(x.dim() == 2 && x.size(0) < (std::int64_t{1} << 22), ErrorCode::kValue, op,
               ": x must be [rows, ", k, "] with fewer than 2^22 rows, got ", shape_text(x));
  Linear call = checked_linear(op, x, packed, std::nullopt, n, k, format, group_size, exponent,
                               precision, ends.size(0));
  check_same_device(op, "ends", ends, call.device);
  return call;
}

cuda::FusedArgs grouped_args(const Linear& call, const Tensor& ends, const Tensor& out) {
  cuda::FusedArgs args = fused_args(call, out);
  args.ends = static_cast<const std::int32_t*>(ends.data_ptr());
  args.experts = static_cast<int>(ends.size(0));
  return args;
}

// x [rows, k] sorted by expert times packed [experts * tiles, tile_bytes]; ends int32 [experts]
// ascends: rows ends[e - 1] to ends[e] belong to expert e. Rows past the last end are undefined.
Tensor linear_grouped(const Tensor& x, const Tensor& packed, const Tensor& ends, std::int64_t n,
                      std::int64_t k, std::int64_t format, std::int64_t group_size,
                      std::int64_t exponent, std::int64_t precision) {
  Linear call = checked_grouped("linear_grouped", x, packed, ends, n, k, format, group_size,
                                exponent, precision);
  const DeviceGuard guard(call.device);
  call.stream = current_stream(call.device);
  settle_rows(call);
  if (call.rows.rows == 0 || n == 0 || ends.size(0) == 0) return empty_out(call);
  const cuda::GroupedChoice choice =
      cuda::select_grouped(problem_of(call), static_cast<int>(ends.size(0)));
  if (choice.path == cuda::Path::kScratch) {
    return expert_by_expert(call, ends, format, group_size, precision);
  }
  Tensor out = empty_out(call);
  const cuda::FusedArgs args = grouped_args(call, ends, out);
  check_launch("linear_grouped", choice.path == cuda::Path::kQmv
                                     ? cuda::qmv_grouped(args, choice.run, choice.qmv, call.stream)
                                     : cuda::qmm(args, choice.qmm, call.stream));
  return out;
}

// linear_grouped() in a named way. variant = {qmv, run, tiles_per_warp, warps_n, warps_k, splits,
// early} or {qmm, rows, tokens, early}.
Tensor linear_grouped_variant(const Tensor& x, const Tensor& packed, const Tensor& ends,
                              std::int64_t n, std::int64_t k, std::int64_t format,
                              std::int64_t group_size, std::int64_t exponent,
                              const std::vector<std::int64_t>& variant) {
  Linear call = checked_grouped("linear_grouped_variant", x, packed, ends, n, k, format, group_size,
                                exponent, 0);
  const DeviceGuard guard(call.device);
  call.stream = current_stream(call.device);
  settle_rows(call);
  const bool qmv = variant.size() == 7 && variant[0] == static_cast<int>(cuda::Path::kQmv);
  LOWBIT_CHECK(qmv || (variant.size() == 4 && variant[0] == static_cast<int>(cuda::Path::kQmm)),
               ErrorCode::kValue,
               "linear_grouped_variant: expected 7 numbers for qmv (0) or 4 for qmm (1), got ",
               variant.size());
  const auto field = [&](std::size_t i) { return static_cast<int>(variant.at(i)); };
  Tensor out = empty_out(call);
  const cuda::FusedArgs args = grouped_args(call, ends, out);
  check_launch(
      "linear_grouped_variant",
      qmv ? cuda::qmv_grouped(args, field(1),
                              {field(2), field(3), field(4), field(5), field(6) != 0}, call.stream)
          : cuda::qmm(args, {field(1), field(2), 1, field(3) != 0}, call.stream));
  return out;
}

// linear() by a named path and launch shape: what benchmarks sweep and tests force.
// variant = {path, ...}: qmv tiles_per_warp, warps_n, warps_k, splits, early; qmm rows, tokens,
// splits, early; eight tokens, splits, early.
Tensor linear_variant(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                      std::int64_t n, std::int64_t k, std::int64_t format, std::int64_t group_size,
                      std::int64_t exponent, const std::vector<std::int64_t>& variant) {
  Linear call =
      checked_linear("linear_variant", x, packed, bias, n, k, format, group_size, exponent, 0);
  const DeviceGuard guard(call.device);
  call.stream = current_stream(call.device);
  settle_rows(call);
  LOWBIT_CHECK(!variant.empty(), ErrorCode::kValue, "linear_variant: variant is empty");
  const auto path = static_cast<cuda::Path>(variant[0]);
  const auto field = [&](std::size_t i) { return static_cast<int>(variant.at(i)); };
  if (path == cuda::Path::kQmv || path == cuda::Path::kQmm) {
    LOWBIT_CHECK(variant.size() == (path == cuda::Path::kQmv ? 6u : 5u), ErrorCode::kValue,
                 "linear_variant: qmv takes 6 numbers, qmm 5, got ", variant.size());
    Tensor out = empty_out(call);
    const cuda::FusedArgs args = fused_args(call, out);
    check_launch(
        "linear_variant",
        path == cuda::Path::kQmv
            ? cuda::qmv(args, {field(1), field(2), field(3), field(4), field(5) != 0}, call.stream)
            : cuda::qmm(args, {field(1), field(2), field(3), field(4) != 0}, call.stream));
    return out;
  }
  if (path == cuda::Path::kEight) {
    LOWBIT_CHECK(variant.size() == 4u && call.x_dtype != DType::kFloat32, ErrorCode::kValue,
                 "linear_variant: eight takes 4 numbers and 16-bit activations");
    return through_eight(call, "linear_variant", {128, field(1), field(2), field(3) != 0});
  }
  return through_cublas(call, path);
}

// What select() would do, for benchmarks and for people: "qmv 7 1 16 1: few tokens ...".
std::string linear_choice(const Tensor& x, const Tensor& packed, std::int64_t n, std::int64_t k,
                          std::int64_t format, std::int64_t group_size, std::int64_t exponent,
                          std::int64_t precision) {
  Linear call = checked_linear("linear_choice", x, packed, std::nullopt, n, k, format, group_size,
                               exponent, precision);
  const DeviceGuard guard(call.device);
  settle_rows(call);
  const cuda::Choice choice = cuda::select(problem_of(call));
  std::ostringstream text;
  text << cuda::path_name(choice.path);
  if (choice.path == cuda::Path::kQmv) {
    text << ' ' << choice.qmv.tiles_per_warp << ' ' << choice.qmv.warps_n << ' '
         << choice.qmv.warps_k << ' ' << choice.qmv.splits;
  } else if (choice.path == cuda::Path::kQmm) {
    text << ' ' << choice.qmm.rows << ' ' << choice.qmm.tokens << ' ' << choice.qmm.splits;
  }
  text << ": " << choice.reason;
  return text.str();
}

// ---- moving, quantize, dequantize, embedding -------------------------------------------------

Tensor repack(const char* op, const Tensor& packed, std::int64_t k, std::int64_t format,
              std::int64_t group_size, bool to_device) {
  LOWBIT_CHECK(packed.dim() == 2, ErrorCode::kValue, op,
               ": packed must be [tiles, tile_bytes], got ", shape_text(packed));
  const Layout layout = make_layout(checked_format(op, format), packed.size(0) * kTileRows, k,
                                    checked_int(op, "group_size", group_size));
  const void* from = packed_on_gpu(op, packed, layout);
  const int device = packed.get_device_index();
  const DeviceGuard guard(device);
  const std::int64_t sizes[] = {packed.size(0), packed.size(1)};
  Tensor out = empty_gpu(sizes, 2, ScalarType::Byte, device);
  const cuda::Geometry geometry = cuda::make_geometry(layout);
  const cuda::Stream stream = current_stream(device);
  check_launch(
      op, to_device
              ? cuda::pack_for_device(geometry, layout.tiles, from, out.data_ptr(), stream)
              : cuda::unpack_from_device(geometry, layout.tiles, from, out.data_ptr(), stream));
  return out;
}

Tensor repack_to_device(const Tensor& packed, std::int64_t k, std::int64_t format,
                        std::int64_t group_size) {
  return repack("repack_to_device", packed, k, format, group_size, true);
}

Tensor repack_from_device(const Tensor& packed, std::int64_t k, std::int64_t format,
                          std::int64_t group_size) {
  return repack("repack_from_device", packed, k, format, group_size, false);
}

// The same bytes as the CPU's quantizer gives. Waits for the device once, for the exponent.
std::tuple<Tensor, Tensor> quantize(const Tensor& weight_given, std::int64_t format,
                                    std::int64_t group_size) {
  const char* op = "quantize";
  DType dtype = float_dtype(op, "weight", weight_given.scalar_type(), /*allow_double=*/true);
  const int device = check_cuda(op, "weight", weight_given);
  const Stack stack = stack_of(op, "weight", weight_given.sizes().data(), weight_given.dim());
  const int group = checked_int(op, "group_size", group_size);
  const Layout layout = make_layout(checked_format(op, format), stack.n, stack.k, group);
  const DeviceGuard guard(device);
  Tensor weight = weight_given;
  if (dtype == DType::kFloat64) {  // rounded to float32 first, as on the CPU
    weight = to_dtype(weight, ScalarType::Float);
    dtype = DType::kFloat32;
  }
  if (weight.dim() > 2) weight = torch::stable::contiguous(weight);
  const std::int64_t sizes[] = {stack.matrices * layout.tiles, layout.tile_bytes};
  Tensor canonical = empty_gpu(sizes, 2, ScalarType::Byte, device);
  int exponent = 0;
  if (stack.matrices * layout.bytes() > 0) {
    const std::int64_t range_bytes = sizeof(cuda::QuantizeRange);
    const Tensor range_on_gpu = empty_gpu(&range_bytes, 1, ScalarType::Byte, device);
    const FormatInfo& info = format_info(layout.format);
    cuda::QuantizeArgs args{};
    args.weight = weight.data_ptr();
    args.dtype = dtype;
    args.geometry = cuda::make_geometry(layout);
    args.matrices = stack.matrices;
    args.row_stride = weight.dim() == 2 ? weight.stride(0) : stack.k;
    args.col_stride = weight.dim() == 2 ? weight.stride(1) : 1;
    args.value_max = info.value_max;
    args.code_low = static_cast<float>(info.code_min - info.zero_point);
    args.code_high = static_cast<float>(info.code_max - info.zero_point);
    args.far_negative = info.code_kind == CodeKind::kInteger && info.code_min == 0;
    args.padding_code = info.padding_code;
    args.canonical = canonical.data_ptr();
    args.range = static_cast<cuda::QuantizeRange*>(range_on_gpu.data_ptr());
    const cuda::Stream stream = current_stream(device);
    const auto copy_back = [&](void* to, const void* from, std::size_t bytes) {
      check_launch(op, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
      check_launch(op, cudaStreamSynchronize(stream));
    };
    check_launch(op, cuda::quantize_scales(args, stream));
    cuda::QuantizeRange found;
    copy_back(&found, args.range, sizeof found);
    if (found.nonfinite != INT64_MAX) {
      const std::int64_t row = found.nonfinite / stack.k, col = found.nonfinite % stack.k;
      double value = 0;  // room for any dtype
      const auto size = static_cast<std::int64_t>(dtype_bytes(dtype));
      copy_back(&value,
                static_cast<const std::byte*>(args.weight) +
                    (row * args.row_stride + col * args.col_stride) * size,
                static_cast<std::size_t>(size));
      throw_nonfinite({&value, dtype, stack.matrices * stack.n, stack.k, 0, 0}, found.nonfinite);
    }
    const reference::ScaleRange range{found.largest, found.smallest, found.largest_minimum,
                                      found.smallest_minimum, true};
    exponent = reference::exponent_for(info, range);
    if (exponent != 0) {
      args.exponent = exponent;
      check_launch(op, cuda::quantize_scales(args, stream));
    }
    check_launch(op, cuda::quantize_codes(args, stream));
  }
  Tensor exponent_tensor = empty_cpu(nullptr, 0, ScalarType::Long);
  *static_cast<std::int64_t*>(exponent_tensor.data_ptr()) = exponent;
  return {repack(op, canonical, stack.k, format, group_size, true), exponent_tensor};
}

Tensor dequantize(const Tensor& packed, const std::vector<std::int64_t>& shape, std::int64_t format,
                  std::int64_t group_size, std::int64_t exponent, ScalarType dtype) {
  const DType out_dtype = float_dtype("dequantize", "dtype", dtype, /*allow_double=*/true);
  const auto dim = static_cast<std::int64_t>(shape.size());
  LOWBIT_CHECK(dim >= 2, ErrorCode::kValue,
               "dequantize: shape must have at least two dimensions, got ", dim);
  std::int64_t matrices = 1;
  for (std::int64_t d = 0; d < dim - 2; ++d) matrices *= shape[static_cast<std::size_t>(d)];
  const std::int64_t n = shape[static_cast<std::size_t>(dim - 2)];
  const std::int64_t k = shape[static_cast<std::size_t>(dim - 1)];
  const Layout layout = make_layout(checked_format("dequantize", format), n, k,
                                    checked_int("dequantize", "group_size", group_size));
  const void* source = packed_on_gpu("dequantize", packed, layout, matrices);
  const int device = packed.get_device_index();
  const DeviceGuard guard(device);
  // float64 is float32 widened: there is no third set of kernels for it.
  const DType compute = out_dtype == DType::kFloat64 ? DType::kFloat32 : out_dtype;
  Tensor out = empty_gpu(shape.data(), dim, scalar_type(compute), device);
  const cuda::Stream stream = current_stream(device);
  const auto matrix_bytes = static_cast<std::size_t>(n * k) * dtype_bytes(compute);
  for (std::int64_t i = 0; i < matrices && matrix_bytes > 0; ++i) {
    const cuda::DequantizeArgs args{
        static_cast<const std::byte*>(source) + i * layout.bytes(),
        cuda::make_geometry(layout),
        checked_int("dequantize", "exponent", exponent),
        static_cast<std::byte*>(out.data_ptr()) + static_cast<std::size_t>(i) * matrix_bytes,
        compute,
        k,
        0,
        n,
        /*exact=*/true};
    check_launch("dequantize", cuda::dequantize(args, stream));
  }
  return to_dtype(out, dtype);
}

Tensor embedding(const Tensor& packed, const Tensor& ids_given, std::int64_t n, std::int64_t k,
                 std::int64_t format, std::int64_t group_size, std::int64_t exponent,
                 ScalarType dtype) {
  const DType out_dtype = float_dtype("embedding", "dtype", dtype, /*allow_double=*/true);
  const ScalarType ids_type = ids_given.scalar_type();
  LOWBIT_CHECK(ids_type == ScalarType::Long || ids_type == ScalarType::Int, ErrorCode::kType,
               "embedding: ids must be int64 or int32, got ",
               torch::headeronly::toString(ids_type));
  const Layout layout = make_layout(checked_format("embedding", format), n, k,
                                    checked_int("embedding", "group_size", group_size));
  const void* source = packed_on_gpu("embedding", packed, layout);
  const int device = packed.get_device_index();
  check_same_device("embedding", "ids", ids_given, device);
  const DeviceGuard guard(device);
  const Tensor ids = torch::stable::contiguous(to_dtype(ids_given, ScalarType::Long));
  const std::int64_t dim = ids.dim();
  LOWBIT_CHECK(dim < 64, ErrorCode::kValue, "embedding: ids may have 63 dimensions, got ", dim);
  std::array<std::int64_t, 64> sizes;
  for (std::int64_t d = 0; d < dim; ++d) sizes[static_cast<std::size_t>(d)] = ids.size(d);
  sizes[static_cast<std::size_t>(dim)] = k;
  const DType compute = out_dtype == DType::kFloat64 ? DType::kFloat32 : out_dtype;
  Tensor out = empty_gpu(sizes.data(), dim + 1, scalar_type(compute), device);
  const cuda::EmbeddingArgs args{source,
                                 cuda::make_geometry(layout),
                                 checked_int("embedding", "exponent", exponent),
                                 static_cast<const std::int64_t*>(ids.data_ptr()),
                                 ids.numel(),
                                 out.data_ptr(),
                                 compute};
  check_launch("embedding", cuda::embedding(args, current_stream(device)));
  return to_dtype(out, dtype);
}

}  // namespace
}  // namespace lowbit::binding

// The operators that exist only with a GPU; the others' schemas are in schemas.cpp.
STABLE_TORCH_LIBRARY_FRAGMENT(lowbit, m) {
  m.def("repack_to_device(Tensor packed, int k, int format, int group_size) -> Tensor");
  m.def("repack_from_device(Tensor packed, int k, int format, int group_size) -> Tensor");
  m.def(
      "linear_variant(Tensor x, Tensor packed, Tensor? bias, int n, int k, int format, "
      "int group_size, int exponent, int[] variant) -> Tensor");
  m.def(
      "linear_grouped(Tensor x, Tensor packed, Tensor ends, int n, int k, int format, "
      "int group_size, int exponent, int precision) -> Tensor");
  m.def(
      "linear_grouped_variant(Tensor x, Tensor packed, Tensor ends, int n, int k, int format, "
      "int group_size, int exponent, int[] variant) -> Tensor");
  m.def(
      "linear_choice(Tensor x, Tensor packed, int n, int k, int format, int group_size, "
      "int exponent, int precision) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CUDA, m) {
  using namespace lowbit::binding;
  m.impl("linear", LOWBIT_BOX(linear));
  m.impl("linear_forward", LOWBIT_BOX(linear));
  m.impl("linear_variant", LOWBIT_BOX(linear_variant));
  m.impl("linear_choice", LOWBIT_BOX(linear_choice));
  m.impl("linear_grouped", LOWBIT_BOX(linear_grouped));
  m.impl("linear_grouped_variant", LOWBIT_BOX(linear_grouped_variant));
  m.impl("quantize", LOWBIT_BOX(quantize));
  m.impl("dequantize", LOWBIT_BOX(dequantize));
  m.impl("embedding", LOWBIT_BOX(embedding));
  m.impl("repack_to_device", LOWBIT_BOX(repack_to_device));
  m.impl("repack_from_device", LOWBIT_BOX(repack_from_device));
}
