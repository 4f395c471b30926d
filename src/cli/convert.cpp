// A float checkpoint into a low-bit save: one chunk of rows at a time, so that memory is bounded by
// a chunk and its packed bytes, whatever the size of the model or of a tensor.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>

#include "cli/commands.h"
#include "cli/job.h"
#include "io/os.h"
#include "lowbit/error.h"
#include "lowbit/file.h"
#include "lowbit/quantize.h"
#include "reference/reference.h"

namespace lowbit::cli {
namespace {

constexpr std::uint64_t kChunkBytes = 32 << 20;  // several times the caches, so threads stay busy
constexpr std::uint64_t kMaxPlanBytes = 256'000'000;

// Bytes at a multiple of 64, as the quantizers want them.
class Buffer {
 public:
  std::byte* get(std::uint64_t bytes) {
    if (bytes > size_) {
      owner_.reset(new std::byte[bytes + 64]);
      size_ = bytes;
      auto address = reinterpret_cast<std::uintptr_t>(owner_.get());
      data_ = owner_.get() + (64 - address % 64) % 64;
    }
    return data_;
  }

 private:
  std::unique_ptr<std::byte[]> owner_;
  std::uint64_t size_ = 0;
  std::byte* data_ = nullptr;
};

class Progress {
 public:
  Progress(std::uint64_t total, bool quiet) : total_(total), quiet_(quiet) {}
  // Bytes that an earlier run has done: they say nothing about this one's speed.
  void skip(std::uint64_t bytes) { done_ += bytes, skipped_ += bytes; }
  void add(std::uint64_t bytes) {
    done_ += bytes;
    if (quiet_) return;
    auto now = std::chrono::steady_clock::now();
    int percent =
        total_ ? static_cast<int>(100.0 * static_cast<double>(done_) / static_cast<double>(total_))
               : 100;
    if (percent < next_ && now - said_ < std::chrono::seconds(10)) return;
    next_ = percent / 5 * 5 + 5;
    said_ = now;
    double seconds = std::chrono::duration<double>(now - start_).count();
    double left = seconds * static_cast<double>(total_ - done_) /
                  static_cast<double>(std::max<std::uint64_t>(done_ - skipped_, 1));
    std::fprintf(stderr, "lowbit: %3d %%, %.2f of %.2f GB, %.0f s left\n", percent,
                 static_cast<double>(done_) / 1e9, static_cast<double>(total_) / 1e9, left);
  }

 private:
  std::uint64_t total_, done_ = 0, skipped_ = 0;
  bool quiet_;
  int next_ = 5;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), said_ = start_;
};

std::uint64_t bytes_of(FileDType dtype) {
  return static_cast<std::uint64_t>(file_dtype_info(dtype).bytes);
}

// Rows [begin, end) of one matrix of a tensor.
struct Chunk {
  std::int64_t matrix, begin, end;
  std::int64_t padded;  // rows as packed: a matrix of several is padded to whole tiles with zeros
};

// What rows of a chunk take: values, packed bytes, and the mapped pages of the source.
std::uint64_t chunk_bytes(const Item& item, const Layout& layout, std::int64_t rows) {
  return static_cast<std::uint64_t>(rows) *
         (static_cast<std::uint64_t>(layout.k) * (bytes_of(item.saved.dtype) + 8) +
          static_cast<std::uint64_t>(layout.tile_bytes) / kTileRows + 1);
}

void check_memory(const Item& item, std::uint64_t budget) {
  if (!item.saved.format) return;
  std::uint64_t least = chunk_bytes(item, packed_shape(item.saved).layout, kTileRows);
  if (least > budget)
    throw Error(ErrorCode::kResource, "convert: tensor " + json::quote(item.saved.name) +
                                          " needs " + std::to_string(least) +
                                          " bytes of memory, --max-memory allows " +
                                          std::to_string(budget) + "; raise it");
}

class Converter {
 public:
  Converter(SaveWriter& writer, const ConvertArgs& args, const Threads& threads, Progress& progress)
      : writer_(writer), threads_(threads), progress_(progress), budget_(args.max_memory) {}

  void plain(const Item& item) {
    const std::int64_t elements = item.source.elements();
    const std::int64_t step = static_cast<std::int64_t>(
        std::clamp<std::uint64_t>(budget_ / 4, 4096, kChunkBytes) / bytes_of(item.saved.dtype));
    for (std::int64_t at = 0; at < elements; at += step) {
      const std::int64_t end = std::min(elements, at + step);
      if (item.source.direct(item.saved.dtype)) {
        writer_.write(item.source.mapped(at, end));
      } else {
        const std::uint64_t bytes =
            static_cast<std::uint64_t>(end - at) * bytes_of(item.saved.dtype);
        std::byte* values = values_.get(bytes);
        item.source.read(at, end, *float_type(item.saved.dtype), values, threads_);
        writer_.write({values, static_cast<std::size_t>(bytes)});
      }
      item.source.release(at, end);
    }
    progress_.add(item.source.bytes());
  }

  // Bytes of a tile do not depend on other tiles unless the tensor needs an exponent, and whether
  // it does is known from any chunk that would have one. Hardly any does: then it starts anew.
  void packed(const Item& item, std::size_t index) {
    const PackedShape shape = packed_shape(item.saved);
    int exponent = 0;
    bool again = !for_each_chunk(item, shape, [&](const Chunk& chunk) {
      const Layout part = layout_of(shape.layout, chunk);
      std::span<std::byte> out(packed_.get(static_cast<std::uint64_t>(part.bytes())),
                               static_cast<std::size_t>(part.bytes()));
      if (quantize(rows(item, shape, chunk), part, out, threads_) != 0) return false;
      writer_.write(out);
      return true;
    });
    if (again) {
      writer_.restart_tensor();
      reference::ScaleRange range;
      for_each_chunk(item, shape, [&](const Chunk& chunk) {
        const Layout part = layout_of(shape.layout, chunk);
        const MatrixView view = rows(item, shape, chunk);
        std::vector<reference::ScaleRange> ranges(static_cast<std::size_t>(part.tiles));
        threads_.run(part.tiles, [&](std::int64_t tile) {
          ranges[static_cast<std::size_t>(tile)] = reference::tile_range(view, part, tile);
        });
        for (const reference::ScaleRange& one : ranges) range.merge(one);
        return true;
      });
      exponent = reference::exponent_for(format_info(shape.layout.format), range);
      writer_.set_exponent(index, exponent);
      for_each_chunk(item, shape, [&](const Chunk& chunk) {
        const Layout part = layout_of(shape.layout, chunk);
        const MatrixView view = rows(item, shape, chunk);
        std::byte* out = packed_.get(static_cast<std::uint64_t>(part.bytes()));
        threads_.run(part.tiles, [&](std::int64_t tile) {
          reference::quantize_tile(view, part, exponent, tile, out + tile * part.tile_bytes);
        });
        writer_.write({out, static_cast<std::size_t>(part.bytes())});
        return true;
      });
    }
    progress_.add(item.source.bytes());
  }

 private:
  static Layout layout_of(const Layout& layout, const Chunk& chunk) {
    return make_layout(layout.format, chunk.padded, layout.k, layout.group_size);
  }

  // Runs body on whole tiles in order until it says false; says whether it never did.
  template <class Body>
  bool for_each_chunk(const Item& item, const PackedShape& shape, const Body& body) {
    const Layout& layout = shape.layout;
    const std::uint64_t tile = std::max<std::uint64_t>(1, chunk_bytes(item, layout, kTileRows));
    const std::uint64_t chunk = std::min(4 * kChunkBytes, budget_);
    std::int64_t step =
        static_cast<std::int64_t>(std::max<std::uint64_t>(1, chunk / tile)) * kTileRows;
    for (std::int64_t m = 0; m < shape.matrices; ++m)
      for (std::int64_t begin = 0; begin < layout.n; begin += step) {
        const std::int64_t end = std::min(layout.n, begin + step);
        std::int64_t padded = end - begin;
        if (shape.matrices > 1) padded = (padded + kTileRows - 1) / kTileRows * kTileRows;
        if (!body({m, begin, end, padded})) return false;
        const std::int64_t start = m * layout.n * layout.k;
        if (item.saved.transposed) {  // every chunk looks at all pages of its matrix
          item.source.release(start, start + layout.n * layout.k);
        } else {
          item.source.release(start + begin * layout.k, start + end * layout.k);
        }
      }
    return true;
  }

  // The rows of a chunk as they are packed: mapped, or as a copy where they are stored otherwise.
  MatrixView rows(const Item& item, const PackedShape& shape, const Chunk& chunk) {
    const std::int64_t n = shape.layout.n, k = shape.layout.k, start = chunk.matrix * n * k;
    const FileDType dtype = item.saved.dtype;
    const DType wanted = *float_type(dtype);
    const std::int64_t count = chunk.end - chunk.begin;
    MatrixView view{nullptr, wanted, chunk.padded, k, k, 1};
    if (item.source.direct(dtype) && chunk.padded == count) {
      std::int64_t first = item.saved.transposed ? chunk.begin : chunk.begin * k;
      view.data = item.source.mapped(start + first, start + first + 1).data();
      if (item.saved.transposed) {
        view.row_stride = 1;
        view.col_stride = n;
      }
    } else {
      const std::uint64_t size = bytes_of(dtype);
      std::byte* values = values_.get(static_cast<std::uint64_t>(chunk.padded * k) * size);
      view.data = values;
      if (item.saved.transposed) {  // [k, n]: a piece of each row
        view.row_stride = 1;
        view.col_stride = chunk.padded;
        if (chunk.padded != count)
          std::memset(values, 0, static_cast<std::size_t>(chunk.padded * k) * size);
        threads_.run(k, [&](std::int64_t c) {
          item.source.read(start + c * n + chunk.begin, start + c * n + chunk.end, wanted,
                           values + static_cast<std::uint64_t>(c * chunk.padded) * size,
                           serial_threads());
        });
      } else {
        item.source.read(start + chunk.begin * k, start + chunk.end * k, wanted, values, threads_);
        std::memset(values + static_cast<std::uint64_t>(count * k) * size, 0,
                    static_cast<std::size_t>((chunk.padded - count) * k) * size);
      }
    }
    check_finite(item, view, chunk);
    return view;
  }

  void check_finite(const Item& item, const MatrixView& view, const Chunk& chunk) const {
    std::int64_t bad = first_nonfinite(view, threads_);
    if (bad < 0) return;
    throw Error(ErrorCode::kValue,
                item.source.parts[0].stored.file->path() + ": tensor " +
                    json::quote(item.saved.name) + " holds a value that is not finite at row " +
                    std::to_string(chunk.begin + bad / view.cols) + ", column " +
                    std::to_string(bad % view.cols) +
                    (chunk.matrix ? " of matrix " + std::to_string(chunk.matrix) : "") +
                    ", which no low-bit type can represent; repair the checkpoint or name the "
                    "module in --not-convert");
  }

  SaveWriter& writer_;
  const Threads& threads_;
  Progress& progress_;
  const std::uint64_t budget_;
  Buffer values_, packed_;
};

// Which source this is: what a changed checkpoint, or one under the same name, would not have.
std::string identity(const Checkpoint& checkpoint,
                     const std::vector<std::pair<std::string, std::string>>& companions) {
  auto digest_of = [](std::string_view text) {
    return digest_text(digest(std::as_bytes(std::span(text.data(), text.size()))));
  };
  std::string text;
  for (const auto& file : checkpoint.files)
    text += file->path() + " " + std::to_string(file->bytes()) + " " +
            std::to_string(os::modified(file->path())) + " " +
            digest_text(digest(file->header_data())) + "\n";
  for (const auto& [name, contents] : companions) text += name + " " + digest_of(contents) + "\n";
  return text;
}

[[noreturn]] void refuse_byte_order() {
  throw Error(ErrorCode::kValue,
              "convert: this machine is big-endian, where saves are read and "
              "not made; convert elsewhere and copy the directory");
}

}  // namespace

void convert(const ConvertArgs& args, const Threads& threads) {
  if (std::endian::native != std::endian::little)
    refuse_byte_order();  // values are read and packed as they lie in the file
  Checkpoint checkpoint = open_checkpoint(args.source);
  Job job = args.plan.empty()
                ? job_from_names(args, checkpoint)
                : job_from_plan(os::read_text(args.plan, kMaxPlanBytes), args.plan, checkpoint);

  SaveRequest request;
  request.directory = args.destination;
  request.max_shard_bytes = args.max_shard_bytes;
  request.extra_files = companion_files(checkpoint, job.options);
  request.resume_key = identity(checkpoint, request.extra_files);
  request.manifest.options = job.options;
  request.manifest.ties = job.ties;
  std::map<std::string, const Item*> by_name;
  std::uint64_t total = 0;
  for (const Item& item : job.items) {
    request.manifest.tensors.push_back(item.saved);
    by_name.emplace(item.saved.name, &item);
    total += item.source.bytes();
  }
  Progress progress(total, args.quiet);
  for (const Item& item : job.items) check_memory(item, args.max_memory);
  SaveWriter writer(std::move(request));
  if (writer.resumed() > 0 && !args.quiet)
    std::fprintf(stderr, "lowbit: %zu of %zu tensors are there from an interrupted conversion\n",
                 writer.resumed(), writer.order().size());
  Converter converter(writer, args, threads, progress);
  std::size_t position = 0;
  for (std::size_t index : writer.order()) {
    const Item& item = *by_name.at(writer.tensors()[index].name);
    if (position++ < writer.resumed()) {
      progress.skip(item.source.bytes());
    } else if (item.saved.format) {
      converter.packed(item, index);
    } else {
      converter.plain(item);
    }
  }
  Manifest manifest = writer.commit();
  if (args.quiet) return;
  std::uint64_t bytes = 0;
  for (const SavedFile& file : manifest.files) bytes += file.bytes;
  std::fprintf(stderr, "lowbit: %s: %zu tensors, %.2f GB\n", args.destination.c_str(),
               manifest.tensors.size(), static_cast<double>(bytes) / 1e9);
}

}  // namespace lowbit::cli
