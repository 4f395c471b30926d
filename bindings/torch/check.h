// The checks at the door of every operator and the bridge between torch's types and ours.
// Order, per operator: dtype, device, contiguity, shape, alignment; then the kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "lowbit/error.h"
#include "lowbit/format.h"
#include "lowbit/linear.h"
#include "lowbit/memory.h"
#include "lowbit/quantize.h"
#include "lowbit/threads.h"

namespace lowbit::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws `lowbit::Error`, the text made of all parts.
template <typename... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(code, text.str());
}

// LOWBIT_CHECK(ok, ErrorCode::kValue, "linear: ...", got). A macro, because the parts of a text
// that is not needed must not be made: printing three shapes costs more than the call.
#define LOWBIT_CHECK(ok, ...)               \
  do {                                      \
    if (!(ok)) [[unlikely]] {               \
      ::lowbit::binding::fail(__VA_ARGS__); \
    }                                       \
  } while (false)

// The same as a function, for operators that touch files: its parts are always made.
template <typename... Parts>
void check(bool ok, ErrorCode code, const Parts&... parts) {
  LOWBIT_CHECK(ok, code, parts...);
}

// What the stable ABI lets through is a std::runtime_error, which Python sees as RuntimeError. The
// code travels in front of the text; python/ipex_llm/errors.py turns it into the right exception.
template <typename Body>
auto translate_errors(const Body& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw std::runtime_error(std::string("lowbit[") + error_code_name(error.code()) +
                             "]: " + error.what());
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(
        "lowbit[resource]: out of memory; free some, or use a smaller model or batch");
  }
}

// Wraps an operator for registration: LOWBIT_BOX(linear) is TORCH_BOX(linear) with the errors
// above.
template <auto Function>
struct Translated;
template <typename Result, typename... Args, Result (*Function)(Args...)>
struct Translated<Function> {
  static Result call(Args... args) {
    return translate_errors([&] { return Function(std::forward<Args>(args)...); });
  }
};
#define LOWBIT_BOX(function) TORCH_BOX((&::lowbit::binding::Translated<&function>::call))

// torch's own pool: no thread of ours, and torch.set_num_threads() is obeyed.
class TorchThreads final : public Threads {
 public:
  int count() const override { return static_cast<int>(torch::stable::get_num_threads()); }

  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const override {
    if (tasks <= 0) {
      return;
    }
    if (tasks == 1) {  // no reason to wake the pool
      body(0);
      return;
    }
    // Nothing may leave a pool thread through the C shim, which would turn it into a text on
    // stderr: the first exception is kept and rethrown here.
    std::exception_ptr failure;
    std::mutex failure_mutex;
    torch::stable::parallel_for(0, tasks, /*grain_size=*/1,
                                [&](std::int64_t begin, std::int64_t end) noexcept {
                                  try {
                                    for (std::int64_t task = begin; task < end; ++task) {
                                      body(task);
                                    }
                                  } catch (...) {
                                    const std::lock_guard<std::mutex> lock(failure_mutex);
                                    if (!failure) {
                                      failure = std::current_exception();
                                    }
                                  }
                                });
    if (failure) {
      std::rethrow_exception(failure);
    }
  }
};

inline const Threads& torch_threads() {
  static const TorchThreads threads;
  return threads;
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  const auto sizes = tensor.sizes();
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    text << (i == 0 ? "" : ", ") << sizes[i];
  }
  text << "]";
  return text.str();
}

inline DType float_dtype(const char* op, const char* argument, ScalarType type, bool allow_double) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      if (allow_double) {
        return DType::kFloat64;
      }
      [[fallthrough]];
    default:
      fail(ErrorCode::kType, op, ": ", argument, " must be float32, float16",
           allow_double ? ", bfloat16 or float64" : " or bfloat16", ", got ",
           torch::headeronly::toString(type), "; convert it first");
  }
}

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat64:
      return ScalarType::Double;
  }
  fail(ErrorCode::kType, "dtype number ", static_cast<int>(dtype), " is not one of ours");
}

inline void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  LOWBIT_CHECK(tensor.is_cpu(), ErrorCode::kValue, op, ": ", argument,
               " must be on the CPU like the other arguments; move all of them to one device");
}

inline Format checked_format(const char* op, std::int64_t format) {
  LOWBIT_CHECK(format >= 0 && format < kFormatCount, ErrorCode::kValue, op,
               ": format must be 0 to ", kFormatCount - 1, ", got ", format);
  return static_cast<Format>(format);
}

inline Precision checked_precision(const char* op, std::int64_t precision) {
  LOWBIT_CHECK(precision >= 0 && precision <= 3, ErrorCode::kValue, op,
               ": precision must be 0 (auto), 1 (fp32), 2 (bf16) or 3 (int8), got ", precision);
  return static_cast<Precision>(precision);
}

inline int checked_int(const char* op, const char* argument, std::int64_t value) {
  // Far beyond any exponent or group size, and far from overflow in what follows.
  LOWBIT_CHECK(value >= -(1 << 20) && value <= (1 << 20), ErrorCode::kValue, op, ": ", argument,
               " is out of range: expected at most 2^20 either way, got ", value);
  return static_cast<int>(value);
}

// An uninitialized contiguous CPU tensor. The C shim rather than torch::stable::empty: that one
// looks the operator up by its name at every call.
inline Tensor empty_cpu(const std::int64_t* sizes, std::int64_t dim, ScalarType type) {
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
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0,
                               &handle) != 0) {
    fail(ErrorCode::kResource, "cannot allocate ", stride,
         " elements; free memory, or use a smaller model or batch");
  }
  return Tensor(handle);
}

// Memory as a uint8 tensor [rows, columns], in huge pages where that pays.
inline Tensor streamed_bytes(std::int64_t rows, std::int64_t columns, Streamed what) {
  const std::int64_t sizes[] = {rows, columns};
  const std::int64_t strides[] = {columns, 1};
  const auto bytes = static_cast<std::size_t>(rows * columns);
  if (bytes < kStreamedBytes) return empty_cpu(sizes, 2, ScalarType::Byte);
  std::shared_ptr<std::byte> memory = allocate_streamed(bytes, what);
  return torch::stable::from_blob(memory.get(), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte, [memory](void*) {});
}

// Memory for the packed bytes of `tiles` tiles.
inline Tensor empty_packed(std::int64_t tiles, std::int64_t tile_bytes) {
  return streamed_bytes(tiles, tile_bytes, Streamed::kWeights);
}

using DeviceCheck = void (*)(const char* op, const char* name, const Tensor& tensor);

// Packed bytes as quantize() makes them, on the device that `check_device` accepts.
inline void check_packed(const char* op, const Tensor& packed, const Layout& layout,
                         std::int64_t matrices, DeviceCheck check_device = check_cpu) {
  LOWBIT_CHECK(packed.scalar_type() == ScalarType::Byte, ErrorCode::kType, op,
               ": packed must be uint8, got ", torch::headeronly::toString(packed.scalar_type()));
  check_device(op, "packed", packed);
  LOWBIT_CHECK(packed.is_contiguous(), ErrorCode::kValue, op,
               ": packed must be contiguous; pass the tensor as quantize() made it");
  LOWBIT_CHECK(packed.dim() == 2 && packed.size(0) == matrices * layout.tiles &&
                   packed.size(1) == layout.tile_bytes,
               ErrorCode::kValue, op, ": packed must be [", matrices * layout.tiles, ", ",
               layout.tile_bytes, "] for ", matrices, " matrix(es) of ", layout.n, " x ", layout.k,
               " in ", format_info(layout.format).name, " with group size ", layout.group_size,
               ", got ", shape_text(packed),
               "; are n, k, format and group_size those it was packed with?");
}

inline bool aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % kUnitBytes == 0;
}

// The packed bytes of `matrices` matrices of one layout: uint8 [matrices * tiles, tile_bytes],
// contiguous, 64-byte aligned. Returns their address.
inline std::byte* checked_packed(const char* op, const Tensor& packed, const Layout& layout,
                                 std::int64_t matrices = 1) {
  check_packed(op, packed, layout, matrices);
  void* data = packed.data_ptr();
  LOWBIT_CHECK(aligned(data), ErrorCode::kValue, op, ": packed must start at a multiple of ",
               kUnitBytes, " bytes; clone() aligns it");
  return static_cast<std::byte*>(data);
}

// The same for the length of one call. torch's own allocations are aligned and used in place;
// bytes that are not (an AOTInductor package keeps its constants in malloc's memory) are copied,
// and `holder` keeps the copy alive.
inline const std::byte* aligned_packed(const char* op, const Tensor& packed, const Layout& layout,
                                       std::optional<Tensor>& holder, std::int64_t matrices = 1) {
  check_packed(op, packed, layout, matrices);
  const auto* data = static_cast<const std::byte*>(packed.data_ptr());
  if (aligned(data)) [[likely]] {
    return data;
  }
  const std::int64_t sizes[] = {packed.size(0), packed.size(1)};
  holder = empty_cpu(sizes, 2, ScalarType::Byte);
  auto* copy = static_cast<std::byte*>(holder->data_ptr());
  std::memcpy(copy, data, static_cast<std::size_t>(sizes[0] * sizes[1]));
  return copy;
}

// A tensor [..., n, k] as a stack of matrices.
struct Stack {
  std::int64_t matrices, n, k;
};

inline Stack stack_of(const char* op, const char* argument, const std::int64_t* sizes,
                      std::int64_t dim) {
  LOWBIT_CHECK(dim >= 2, ErrorCode::kValue, op, ": ", argument,
               " must have at least two dimensions, got ", dim);
  Stack stack{1, sizes[dim - 2], sizes[dim - 1]};
  for (std::int64_t d = 0; d < dim - 2; ++d) {
    LOWBIT_CHECK(!__builtin_mul_overflow(stack.matrices, sizes[d], &stack.matrices),
                 ErrorCode::kValue, op, ": ", argument, " has too many elements");
  }
  return stack;
}

}  // namespace lowbit::binding
