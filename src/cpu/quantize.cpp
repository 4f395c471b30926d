// The public quantizers and dequantizers: checks, threads over row tiles, and everything that the
// vectorised kernels leave to plain code (odd strides, float64, extreme exponents).
#include "lowbit/quantize.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/float_environment.h"
#include "cpu/linear_driver.h"
#include "cpu/quantize_kernels.h"
#include "cpu/select.h"
#include "format/checks.h"
#include "lowbit/error.h"
#include "reference/reference.h"

namespace lowbit {
namespace {

using cpu::Codec;
using cpu::Coder;
using cpu::FloatEnvironment;
using cpu::QuantizeKernels;

// Runs of tiles per thread: a few, so that a thread that starts late holds nobody up.
constexpr std::int64_t kTasksPerThread = 4;

// nullptr: no vectorised kernels at this level.
const QuantizeKernels* active_kernels() {
  for (cpu::Isa isa = cpu::active_level(); isa != cpu::Isa::kScalar;
       isa = cpu::isa_info(isa).fallback) {
#ifdef LOWBIT_HAVE_AVX512VNNI
    if (isa == cpu::Isa::kAvx512Vnni) return &cpu::quantize_kernels_avx512();
#endif
#ifdef LOWBIT_HAVE_AVX2
    if (isa == cpu::Isa::kAvx2) return &cpu::quantize_kernels_avx2();
#endif
  }
  return nullptr;
}

Coder coder_of(const FormatInfo& info) {
  switch (info.code_kind) {
    case CodeKind::kInteger:
      if (info.scale_kind == ScaleKind::kGroupMinimum) return Coder::kMinimum;
      return info.code_min == 0 ? Coder::kSymmetric : Coder::kInteger;
    case CodeKind::kTable:
      return info.codebook[0] == 0 ? Coder::kMirrored : Coder::kTable;
    case CodeKind::kFloat:
      break;
  }
  if (info.scale_kind == ScaleKind::kRow) {
    return info.format == Format::kFp8E4M3 ? Coder::kFp8E4M3 : Coder::kFp8E5M2;
  }
  return info.format == Format::kFp16 ? Coder::kHalf : Coder::kBrain;
}

void fill_table(const FormatInfo& info, Codec* codec) {
  const int entries = static_cast<int>(info.codebook.size());
  std::copy(info.codebook.begin(), info.codebook.end(), codec->values);
  if (codec->coder == Coder::kMirrored) return;  // E2M1, whose thresholds are multiples of 1/4
  std::array<float, 15> thresholds;
  thresholds.fill(std::numeric_limits<float>::infinity());
  for (int code = 1; code < entries; ++code) {
    const float midpoint = (info.codebook[static_cast<std::size_t>(code) - 1] +
                            info.codebook[static_cast<std::size_t>(code)]) /
                           2;
    // Ties go to the even code: midpoints below an odd code still belong to the one before.
    thresholds[static_cast<std::size_t>(code) - 1] =
        code % 2 == 0 ? midpoint : std::nextafter(midpoint, HUGE_VALF);
  }
  codec->levels = entries == 16 ? 4 : 3;
  for (int step = 0; step < codec->levels; ++step) {
    for (int prefix = 0; prefix < 1 << (codec->levels - 1 - step); ++prefix) {
      codec->search[step][prefix] =
          thresholds[static_cast<std::size_t>(((2 * prefix + 1) << step) - 1)];
    }
  }
  // Bins of 1/16 over [-1, 1) hold one threshold at most, and none near an edge, where rounding
  // could choose the wrong bin.
  codec->bin_mul = codec->bin_add = 16.0f;
  std::fill(std::begin(codec->bin_threshold), std::end(codec->bin_threshold),
            std::numeric_limits<float>::infinity());
  for (int code = 1; code < entries; ++code) {
    const float threshold = thresholds[static_cast<std::size_t>(code) - 1];
    const int bin = static_cast<int>(threshold * codec->bin_mul + codec->bin_add);
    codec->bin_threshold[bin] = threshold;
    const auto place = static_cast<std::uint8_t>(code);
    for (int from = bin; from < 32; ++from) codec->place_code[32 + from] = place;
    for (int after = bin + 1; after < 32; ++after) codec->place_code[after] = place;
  }
}

const Codec& codec_of(Format format) {
  static const std::array<Codec, kFormatCount> codecs = [] {
    std::array<Codec, kFormatCount> all{};
    for (const FormatInfo& info : formats()) {
      Codec& codec = all[static_cast<std::size_t>(info.format)];
      codec.coder = coder_of(info);
      codec.bits = info.bits;
      codec.value_max = info.value_max;
      codec.low = static_cast<float>(info.code_min - info.zero_point);
      codec.high = static_cast<float>(info.code_max - info.zero_point);
      codec.zero_point = info.zero_point;
      codec.padding_code = info.padding_code;
      if (info.code_kind == CodeKind::kTable) fill_table(info, &codec);
    }
    return all;
  }();
  return codecs[static_cast<std::size_t>(format)];
}

struct Run {
  std::int64_t begin, end;
};

// Contiguous runs of `count` things over `tasks` tasks.
Run run_of(std::int64_t task, std::int64_t tasks, std::int64_t count) {
  const std::int64_t each = count / tasks;
  const std::int64_t more = count % tasks;  // this many tasks get one more
  const std::int64_t begin = task * each + std::min(task, more);
  return {begin, begin + each + (task < more ? 1 : 0)};
}

const void* element_address(const MatrixView& matrix, std::int64_t row, std::int64_t col) {
  const std::int64_t index = row * matrix.row_stride + col * matrix.col_stride;
  return static_cast<const char*>(matrix.data) +
         index * static_cast<std::int64_t>(dtype_bytes(matrix.dtype));
}

// Divides by 2^exponent with one rounding. A negative exponent multiplies by up to 2^170: two
// powers, both exact, because nothing gets larger than 2^22.
void divide_by_power(float* values, std::int64_t count, int exponent) {
  const float first = std::ldexp(1.0f, std::min(-exponent, 127));
  for (std::int64_t i = 0; i < count; ++i) values[i] *= first;
  if (-exponent <= 127) return;
  const float second = std::ldexp(1.0f, -exponent - 127);
  for (std::int64_t i = 0; i < count; ++i) values[i] *= second;
}

// Sources that the kernels cannot read where they are, copied a few tiles at a time: transposed if
// rows are contiguous, and in float32 where an exponent, float64 or other strides ask for it.
class Copies {
 public:
  // The copies lie in memory that the calling thread keeps: clearing and first touching a few
  // megabytes took a sixth of the time.
  Copies(const QuantizeKernels& kernels, const MatrixView& weight, int exponent)
      : kernels_(kernels),
        weight_(weight),
        exponent_(exponent),
        transposes_(weight.dtype != DType::kFloat64 && weight.row_stride == 1 &&
                    weight.col_stride != 1),
        element_bytes_(static_cast<std::int64_t>(dtype_bytes(weight.dtype))),
        stride_((weight.cols + 31) / 32 * 32 + kPad),
        batch_(std::clamp<std::int64_t>(
            kBatchBytes / (kTileRows * stride_ * element_bytes_) / 2 * 2, 2, 32)) {
    const std::int64_t transposed = transposes_ ? batch_ * kTileRows * stride_ * element_bytes_ : 0;
    transposed_ = cpu::thread_workspace(1, transposed + kTileRows * stride_ * 4);
    floats_ = reinterpret_cast<float*>(transposed_ + transposed);
  }

  // Tile `tile` of a run of tiles that ends before tile_end, asked for in ascending order.
  cpu::SourceTile tile(std::int64_t tile, std::int64_t tile_end) {
    const std::int64_t row = tile * kTileRows;
    const int rows = static_cast<int>(std::min<std::int64_t>(kTileRows, weight_.rows - row));
    MatrixView source{element_address(weight_, row, 0),
                      weight_.dtype,
                      rows,
                      weight_.cols,
                      weight_.row_stride,
                      weight_.col_stride};
    if (transposes_) {
      if (tile >= transposed_end_) transpose(tile, tile_end);
      if (row + rows <= transposed_rows_end_) {
        source.data = transposed_ + (row - transposed_begin_) * stride_ * element_bytes_;
        source.row_stride = stride_;
        source.col_stride = 1;
        if (exponent_ == 0) return {source.data, source.dtype, stride_, rows, source.cols, false};
      }
    }
    widen(source);
    return {floats_, DType::kFloat32, stride_, rows, source.cols, false};
  }

 private:
  // Tiles that are transposed together: the more, the longer what is read of each column, as far as
  // the copy stays in the second-level cache (4 MiB of copies were 8 to 17 % slower).
  static constexpr std::int64_t kBatchBytes = 1 << 20;
  // Rows a multiple of 4 KiB apart would compete for the same lines of the caches.
  static constexpr std::int64_t kPad = 32;

  void transpose(std::int64_t tile, std::int64_t tile_end) {
    const std::int64_t block = 64 / element_bytes_;
    transposed_begin_ = tile * kTileRows;
    transposed_end_ = std::min(tile + batch_, tile_end);
    // Whole blocks, of which the last may reach into the next run; what is left of one at the end
    // of the matrix is copied plainly.
    const std::int64_t end = (transposed_end_ * kTileRows + block - 1) / block * block;
    transposed_rows_end_ = std::min(end, weight_.rows / block * block);
    if (transposed_rows_end_ > transposed_begin_) {
      kernels_.transpose(element_address(weight_, transposed_begin_, 0),
                         static_cast<int>(element_bytes_), weight_.col_stride,
                         transposed_rows_end_ - transposed_begin_, weight_.cols, transposed_,
                         stride_);
    }
  }

  void widen(const MatrixView& source) {
    for (std::int64_t r = 0; r < source.rows; ++r) {
      float* out = floats_ + r * stride_;
      if (source.dtype != DType::kFloat64 && source.col_stride == 1) {
        kernels_.widen(element_address(source, r, 0), source.dtype, source.cols, out);
      } else {
        for (std::int64_t k = 0; k < source.cols; ++k) {
          out[k] = static_cast<float>(reference::element(source, r, k));
        }
      }
      if (exponent_ != 0) divide_by_power(out, source.cols, exponent_);
    }
  }

  const QuantizeKernels& kernels_;
  const MatrixView& weight_;
  const int exponent_;
  const bool transposes_;
  const std::int64_t element_bytes_, stride_, batch_;
  std::int64_t transposed_begin_ = 0, transposed_rows_end_ = 0, transposed_end_ = 0;  // rows, tiles
  std::byte* transposed_;
  float* floats_;
};

// One pass over all tiles with a given exponent.
reference::ScaleRange quantize_pass(const QuantizeKernels* kernels, const MatrixView& weight,
                                    const Layout& layout, int exponent, std::byte* packed,
                                    const Threads& threads) {
  const Codec& codec = codec_of(layout.format);
  const bool vectors = kernels != nullptr && weight.dtype != DType::kFloat64 && exponent == 0;
  const bool direct = vectors && weight.col_stride == 1;
  const bool columns = vectors && !direct && weight.row_stride == 1;
  // Sources that are copied: a buffer per task.
  const std::int64_t per_thread = direct || kernels == nullptr ? kTasksPerThread : 1;
  // Two tiles of columns are a cache line of 16-bit weights.
  const std::int64_t together = columns ? 2 : 1;
  const std::int64_t shares = (layout.tiles + together - 1) / together;
  const std::int64_t tasks = std::min<std::int64_t>(shares, threads.count() * per_thread);
  std::vector<reference::ScaleRange> ranges(static_cast<std::size_t>(tasks));
  std::atomic<bool> out_of_memory{false};
  threads.run(tasks, [&](std::int64_t task) {
    const FloatEnvironment environment;
    reference::ScaleRange& range = ranges[static_cast<std::size_t>(task)];
    const Run share = run_of(task, tasks, shares);
    const Run run{share.begin * together, std::min(share.end * together, layout.tiles)};
    std::optional<Copies> copies;
    try {
      if (columns) {
        const std::int64_t row = run.begin * kTileRows;
        const cpu::SourceColumns source{element_address(weight, row, 0), weight.dtype,
                                        weight.col_stride,
                                        std::min(run.end * kTileRows, layout.n) - row, layout.k};
        std::byte* workspace = cpu::thread_workspace(1, kernels->columns_workspace(source, layout));
        return kernels->quantize_columns(source, layout, codec,
                                         packed + run.begin * layout.tile_bytes, workspace, &range);
      }
      if (kernels != nullptr && !direct) copies.emplace(*kernels, weight, exponent);
    } catch (...) {
      out_of_memory = true;
      return;
    }
    for (std::int64_t tile = run.begin; tile < run.end; ++tile) {
      std::byte* packed_tile = packed + tile * layout.tile_bytes;
      const std::int64_t row = tile * kTileRows;
      const int rows = static_cast<int>(std::min<std::int64_t>(kTileRows, layout.n - row));
      if (kernels == nullptr) {
        range.merge(reference::tile_range(weight, layout, tile));
        if (range.finite) {
          reference::quantize_tile(weight, layout, exponent, tile, packed_tile);
        }
      } else if (direct) {
        kernels->quantize_tile({element_address(weight, row, 0), weight.dtype, weight.row_stride,
                                rows, layout.k, tile + 1 < layout.tiles},
                               layout, codec, packed_tile, &range);
      } else {
        kernels->quantize_tile(copies->tile(tile, run.end), layout, codec, packed_tile, &range);
      }
    }
  });
  if (out_of_memory) {
    throw Error(ErrorCode::kResource, "quantize: no memory for copies of a few rows of " +
                                          std::to_string(layout.k) + " inputs; use fewer threads");
  }
  reference::ScaleRange range;
  for (const reference::ScaleRange& part : ranges) range.merge(part);
  return range;
}

// Whether float32 arithmetic with the scale times 2^exponent gives the correctly rounded weight:
// the product must be exact. fp16 scales are multiples of 2^-24 below 2^16; the margin leaves room
// for code values. A float32 row scale may be anything.
bool exact_in_float32(const FormatInfo& info, int exponent) {
  if (info.scale_kind == ScaleKind::kRow) return exponent == 0;
  return exponent >= -100 && exponent <= 100;
}

void dequantize_row_plainly(const std::byte* packed, const Layout& layout, int exponent,
                            std::int64_t row, const MutableMatrixView& out, std::int64_t out_row) {
  const std::byte* tile = packed + row / kTileRows * layout.tile_bytes;
  for (std::int64_t k = 0; k < layout.k; ++k) {
    reference::store_weight(
        out, out_row, k,
        reference::weight_at(tile, layout, exponent, static_cast<int>(row % kTileRows), k));
  }
}

void* element_address(const MutableMatrixView& matrix, std::int64_t row) {
  return static_cast<char*>(matrix.data) +
         row * matrix.row_stride * static_cast<std::int64_t>(dtype_bytes(matrix.dtype));
}

// The kernels for this output, or nullptr if plain code has to write it.
const QuantizeKernels* dequantize_kernels(const Layout& layout, int exponent,
                                          const MutableMatrixView& out) {
  const bool plain = out.dtype == DType::kFloat64 || out.col_stride != 1 ||
                     !exact_in_float32(format_info(layout.format), exponent);
  return plain ? nullptr : active_kernels();
}

// Flat index of the first bad element of `count` contiguous ones, or -1.
std::int64_t first_nonfinite_run(const QuantizeKernels* kernels, const void* data, DType dtype,
                                 std::int64_t count) {
  if (dtype == DType::kFloat64) {
    // From here on a float64 rounds to an infinite float32.
    constexpr double kLimit = 0x1.ffffffp+127;
    const double* values = static_cast<const double*>(data);
    for (std::int64_t i = 0; i < count; ++i) {
      if (!(std::fabs(values[i]) < kLimit)) return i;
    }
    return -1;
  }
  if (kernels != nullptr) return kernels->first_nonfinite(data, dtype, count);
  const MatrixView view{data, dtype, 1, count, count, 1};
  for (std::int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(reference::element(view, 0, i))) return i;
  }
  return -1;
}

}  // namespace

int quantize(const MatrixView& weight, const Layout& layout, std::span<std::byte> packed,
             const Threads& threads) {
  check_quantize(weight, layout, packed);
  if (layout.n == 0 || layout.k == 0) {
    std::fill(packed.begin(), packed.end(), std::byte{0});
    return 0;
  }
  const FloatEnvironment environment;  // the exponent rule compares subnormals, too
  const QuantizeKernels* kernels = active_kernels();
  const reference::ScaleRange range =
      quantize_pass(kernels, weight, layout, 0, packed.data(), threads);
  if (!range.finite) throw_nonfinite(weight, first_nonfinite(weight, threads));
  // The first pass assumed 0, which holds for nearly every matrix; the others are packed again.
  const int exponent = reference::exponent_for(format_info(layout.format), range);
  if (exponent != 0) quantize_pass(kernels, weight, layout, exponent, packed.data(), threads);
  return exponent;
}

void dequantize(std::span<const std::byte> packed, const Layout& layout, int exponent,
                const MutableMatrixView& out, const Threads& threads) {
  check_dequantize(packed, layout, out);
  if (layout.n == 0 || layout.k == 0) return;
  const QuantizeKernels* kernels = dequantize_kernels(layout, exponent, out);
  const Codec& codec = codec_of(layout.format);
  const float power = kernels != nullptr ? std::ldexp(1.0f, exponent) : 1.0f;
  const std::int64_t tasks =
      std::min<std::int64_t>(layout.tiles, threads.count() * kTasksPerThread);
  threads.run(tasks, [&](std::int64_t task) {
    const FloatEnvironment environment;
    const Run run = run_of(task, tasks, layout.tiles);
    for (std::int64_t tile = run.begin; tile < run.end; ++tile) {
      const std::int64_t row = tile * kTileRows;
      const int rows = static_cast<int>(std::min<std::int64_t>(kTileRows, layout.n - row));
      if (kernels != nullptr) {
        kernels->dequantize_tile(
            packed.data() + tile * layout.tile_bytes, layout, codec, power,
            {element_address(out, row), out.dtype, out.row_stride, rows, layout.k});
        continue;
      }
      for (int r = 0; r < rows; ++r) {
        dequantize_row_plainly(packed.data(), layout, exponent, row + r, out, row + r);
      }
    }
  });
}

void dequantize_rows(std::span<const std::byte> packed, const Layout& layout, int exponent,
                     std::span<const std::int64_t> rows, const MutableMatrixView& out,
                     const Threads& threads) {
  check_rows(packed, layout, rows, out);
  if (rows.empty() || layout.k == 0) return;
  const QuantizeKernels* kernels = dequantize_kernels(layout, exponent, out);
  const Codec& codec = codec_of(layout.format);
  const float power = kernels != nullptr ? std::ldexp(1.0f, exponent) : 1.0f;
  const auto one = [&](std::int64_t i) {
    const std::int64_t row = rows[static_cast<std::size_t>(i)];
    if (kernels == nullptr) {
      return dequantize_row_plainly(packed.data(), layout, exponent, row, out, i);
    }
    kernels->dequantize_row(packed.data() + row / kTileRows * layout.tile_bytes, layout, codec,
                            power, static_cast<int>(row % kTileRows),
                            {element_address(out, i), out.dtype, out.row_stride, 1, layout.k});
  };
  if (rows.size() == 1) {  // a token being decoded: no fork
    const FloatEnvironment environment;
    return one(0);
  }
  const std::int64_t tasks = std::min<std::int64_t>(out.rows, threads.count() * kTasksPerThread);
  threads.run(tasks, [&](std::int64_t task) {
    const FloatEnvironment environment;
    const Run run = run_of(task, tasks, out.rows);
    for (std::int64_t i = run.begin; i < run.end; ++i) one(i);
  });
}

std::int64_t first_nonfinite(const MatrixView& matrix, const Threads& threads) {
  static_cast<void>(dtype_bytes(matrix.dtype));  // throws for a dtype that is not float
  if (matrix.rows <= 0 || matrix.cols <= 0) return -1;
  const QuantizeKernels* kernels = active_kernels();
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  const bool flat =
      matrix.col_stride == 1 && (matrix.row_stride == matrix.cols || matrix.rows == 1);
  // Rows that lie side by side are scanned as columns; only a find is looked up in row order.
  const bool columns = !flat && matrix.col_stride != 1 && matrix.row_stride == 1;
  const std::int64_t count = flat ? matrix.rows * matrix.cols : columns ? matrix.cols : matrix.rows;
  const std::int64_t tasks = std::min<std::int64_t>(count, threads.count() * kTasksPerThread);
  std::vector<std::int64_t> found(static_cast<std::size_t>(tasks), kNone);
  threads.run(tasks, [&](std::int64_t task) {
    std::int64_t& first = found[static_cast<std::size_t>(task)];
    const Run run = run_of(task, tasks, count);
    if (flat) {
      const MatrixView line{matrix.data, matrix.dtype, 1, count, count, 1};
      const std::int64_t i = first_nonfinite_run(kernels, element_address(line, 0, run.begin),
                                                 matrix.dtype, run.end - run.begin);
      if (i >= 0) first = run.begin + i;
      return;
    }
    for (std::int64_t i = run.begin; i < run.end && (columns || first == kNone); ++i) {
      if (columns) {
        const void* column = element_address(matrix, 0, i);
        const std::int64_t row = first_nonfinite_run(kernels, column, matrix.dtype, matrix.rows);
        if (row >= 0) first = std::min(first, row * matrix.cols + i);
      } else if (matrix.col_stride == 1) {
        const void* row = element_address(matrix, i, 0);
        const std::int64_t col = first_nonfinite_run(kernels, row, matrix.dtype, matrix.cols);
        if (col >= 0) first = i * matrix.cols + col;
      } else {
        for (std::int64_t col = 0; col < matrix.cols && first == kNone; ++col) {
          const auto value = static_cast<float>(reference::element(matrix, i, col));
          if (!std::isfinite(value)) first = i * matrix.cols + col;
        }
      }
    }
  });
  const std::int64_t first = *std::min_element(found.begin(), found.end());
  return first == kNone ? -1 : first;
}

}  // namespace lowbit
