// A float checkpoint into a low-bit save: one tensor at a time, rows in chunks, so that memory is
// bounded by one packed tensor and one chunk whatever the model's size.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>

#include "cli/checkpoint.h"
#include "cli/commands.h"
#include "cli/names.h"
#include "format/floats.h"
#include "io/os.h"
#include "lowbit/error.h"
#include "lowbit/file.h"
#include "lowbit/quantize.h"

namespace lowbit::cli {
namespace {

constexpr std::uint64_t kChunkBytes = 32 << 20;  // several times the caches, so threads stay busy
constexpr std::uint64_t kMaxPlanBytes = 256'000'000;

[[noreturn]] void refuse(const std::string& text) {
  throw Error(ErrorCode::kValue, text);
}

std::optional<DType> float_type(FileDType dtype) {
  switch (dtype) {
    case FileDType::kF16:
      return DType::kFloat16;
    case FileDType::kBF16:
      return DType::kBFloat16;
    case FileDType::kF32:
      return DType::kFloat32;
    case FileDType::kF64:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

std::optional<FileDType> dtype_named(std::string_view name) {
  if (name.starts_with("torch.")) name.remove_prefix(6);
  for (const FileDTypeInfo& info : file_dtypes())
    if (info.torch_name == name) return info.dtype;
  return std::nullopt;
}

// ---- what becomes of each tensor
// -----------------------------------------------------------------

struct Item {
  SavedTensor saved;
  const FileTensor* source;
  const TensorFile* file;
};

struct Job {
  std::vector<Item> items;
  std::vector<std::pair<std::string, std::string>> ties;
  std::string options;
};

std::string quoted_list(const std::vector<std::string>& items) {
  std::string text = "[";
  for (std::size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + json::quote(items[i]);
  return text + "]";
}

const std::string* text_of(const json::Value& config, std::string_view key) {
  const json::Value* value = config.find(key);
  return value ? value->string() : nullptr;
}

// The dtype that transformers would load the model in.
std::optional<FileDType> model_dtype(const json::Value& config) {
  for (std::string_view key : {"dtype", "torch_dtype"})
    if (const std::string* name = text_of(config, key))
      if (std::optional<FileDType> dtype = dtype_named(*name); dtype && float_type(*dtype))
        return dtype;
  return std::nullopt;
}

bool is_causal(const json::Value& config) {
  const json::Value* architectures = config.find("architectures");
  if (!architectures || !architectures->array()) return false;
  for (const json::Value& name : *architectures->array())
    if (name.string() && name.string()->ends_with("ForCausalLM")) return true;
  return false;
}

bool excluded(const std::vector<std::string>& patterns, std::string_view name) {
  std::string_view owner = name.substr(0, name.rfind('.'));
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return name_matches(pattern, name) || name_matches(pattern, owner);
  });
}

Item item_of(const Checkpoint& checkpoint, std::size_t index, std::optional<FileDType> dtype) {
  const auto& [source, file] = checkpoint.tensors[index];
  if (source->dtype == FileDType::kF8E4M3 || source->dtype == FileDType::kF8E5M2)
    refuse(file->path() + ": tensor " + json::quote(source->name) +
           " is fp8, whose scales lie elsewhere; convert a bf16 version of the model");
  Item item{{}, source, file};
  item.saved.name = source->name;
  item.saved.dtype = dtype && float_type(source->dtype) ? *dtype : source->dtype;
  item.saved.shape = source->shape;
  return item;
}

Job job_from_names(const ConvertArgs& args, const Checkpoint& checkpoint) {
  Job job;
  Format format = parse_format(args.low_bit);
  int group_size = make_layout(format, 1, 1, args.group_size).group_size;
  std::optional<FileDType> dtype = model_dtype(checkpoint.config);

  constexpr std::string_view kHead = "lm_head.weight";
  std::string table;
  bool has_head = false;
  for (const auto& tensor : checkpoint.tensors) {
    has_head |= tensor.first->name == kHead;
    if (tensor.first->name.ends_with("embed_tokens.weight")) table = tensor.first->name;
  }
  const json::Value* tie = checkpoint.config.find("tie_word_embeddings");
  bool says_tied = tie && tie->boolean() && *tie->boolean();
  // Checkpoints leave a tied head out; one that has it nevertheless is overruled by the table.
  bool tied = !table.empty() && is_causal(checkpoint.config) && (says_tied || !has_head);

  std::vector<std::string> unknown;
  for (std::size_t i = 0; i < checkpoint.tensors.size(); ++i) {
    const FileTensor& source = *checkpoint.tensors[i].first;
    if (is_dropped(source.name) || (tied && source.name == kHead)) continue;
    Item item = item_of(checkpoint, i, dtype);
    bool is_matrix = source.shape.size() >= 2 && float_type(source.dtype) && source.bytes > 0;
    bool keep = !is_matrix || excluded(args.not_converted, source.name) ||
                (tied && source.name == table && excluded(args.not_converted, kHead));
    if (!keep) {
      Role role = role_of(source.name);
      bool merged =
          source.name.find(".experts.") != std::string::npos;  // into 3-D, by transformers
      if (role == Role::kUnknown || source.shape.size() != 2 || merged) {
        unknown.push_back(source.name);
        continue;
      }
      if (role == Role::kLinear || (tied && source.name == table)) {
        item.saved.format = format;
        item.saved.group_size = group_size;
      }
    }
    job.items.push_back(std::move(item));
  }
  if (!unknown.empty()) {
    std::string text = checkpoint.directory + ": the names of " + std::to_string(unknown.size()) +
                       " tensors do not tell what they are:";
    for (std::size_t i = 0; i < unknown.size() && i < 10; ++i) text += "\n  " + unknown[i];
    if (unknown.size() > 10) text += "\n  ... and " + std::to_string(unknown.size() - 10) + " more";
    refuse(text +
           "\nGive --plan with the JSON of ipex_llm.plan(model).to_dict(), or name them in "
           "--not-convert");
  }
  if (tied) job.ties.emplace_back(kHead, table);
  job.options =
      "{\"cpu_embedding\": false, \"disable_optimize_pre\": false, \"embedding_qtype\": null, "
      "\"group_size\": " +
      std::to_string(args.group_size) +
      ", \"lightweight_bmm\": false, \"low_bit\": " + json::quote(format_info(format).name) +
      ", \"modules_to_not_convert\": " + quoted_list(args.not_converted) +
      ", \"optimize_llm\": true}";
  return job;
}

Job job_from_plan(const ConvertArgs& args, const Checkpoint& checkpoint) {
  json::Value plan = json::parse(os::read_text(args.plan, kMaxPlanBytes), args.plan);
  auto bad = [&](const std::string& what) { refuse(args.plan + ": " + what); };
  const json::Value* parameters = plan.find("parameters");
  const json::Value* options = plan.find("options");
  if (!parameters || !parameters->array() || !options || !options->object())
    bad("is not the JSON of ipex_llm.plan(...).to_dict()");

  std::map<std::string_view, std::size_t> by_name;
  for (std::size_t i = 0; i < checkpoint.tensors.size(); ++i)
    by_name.emplace(checkpoint.tensors[i].first->name, i);
  Job job;
  std::set<std::string_view> used;
  for (const json::Value& parameter : *parameters->array()) {
    const json::Value* names = parameter.find("names");
    const std::string* dtype = text_of(parameter, "dtype");
    if (!names || !names->array() || names->array()->empty() || !dtype)
      bad("lacks names or dtypes");
    std::optional<std::size_t> index;
    std::string first;
    for (const json::Value& name : *names->array()) {
      if (!name.string()) bad("has a name that is not a string");
      if (first.empty()) {
        first = *name.string();
      } else {
        job.ties.emplace_back(*name.string(), first);
      }
      auto it = by_name.find(*name.string());
      if (it == by_name.end()) continue;
      used.insert(it->first);
      if (!index) index = it->second;
    }
    if (!index)
      refuse(args.plan + ": parameter " + json::quote(first) + " is not in " +
             checkpoint.directory + "; is it the plan of this model?");
    Item item = item_of(checkpoint, *index, dtype_named(*dtype));
    item.saved.name = first;
    const json::Value* shape = parameter.find("shape");
    std::vector<std::int64_t> sizes;
    if (!shape || !shape->array()) bad("parameter " + json::quote(first) + " has no shape");
    for (const json::Value& size : *shape->array())
      sizes.push_back(size.integer() ? *size.integer() : -1);
    if (sizes != item.source->shape)
      bad("parameter " + json::quote(first) + " has another shape in the checkpoint");
    if (const std::string* low_bit = text_of(parameter, "low_bit")) {
      item.saved.format = parse_format(*low_bit);
      const json::Value* group = parameter.find("group_size");
      if (group && group->integer()) item.saved.group_size = static_cast<int>(*group->integer());
      const json::Value* transposed = parameter.find("transposed");
      item.saved.transposed = transposed && transposed->boolean() && *transposed->boolean();
      const json::Value* stored = parameter.find("stored_shape");
      if (stored && stored->array()) {
        for (const json::Value& size : *stored->array())
          item.saved.stored_shape.push_back(size.integer() ? *size.integer() : -1);
        if (item.saved.stored_shape == item.saved.shape) item.saved.stored_shape.clear();
      }
    }
    job.items.push_back(std::move(item));
  }
  std::optional<FileDType> dtype = model_dtype(checkpoint.config);
  for (std::size_t i = 0; i < checkpoint.tensors.size(); ++i) {
    const std::string& name = checkpoint.tensors[i].first->name;
    if (!used.contains(name) && !is_dropped(name))
      job.items.push_back(item_of(checkpoint, i, dtype));
  }
  json::Object kept;
  for (const auto& option : *options->object())
    if (option.first != "torch_dtype") kept.push_back(option);
  job.options = json::dump(json::Value(std::move(kept)));
  return job;
}

// ---- memory
// --------------------------------------------------------------------------------------

// Bytes at a multiple of 64, as the quantizers want them.
class Buffer {
 public:
  explicit Buffer(std::uint64_t bytes) : bytes_(bytes), owner_(new std::byte[bytes + 64]) {
    auto address = reinterpret_cast<std::uintptr_t>(owner_.get());
    data_ = owner_.get() + (64 - address % 64) % 64;
  }
  std::byte* data() const { return data_; }
  std::span<std::byte> span() const { return {data_, static_cast<std::size_t>(bytes_)}; }

 private:
  std::uint64_t bytes_;
  std::unique_ptr<std::byte[]> owner_;
  std::byte* data_;
};

double load_float(DType type, const std::byte* p) {
  if (type == DType::kFloat64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  std::uint32_t bits = std::to_integer<std::uint32_t>(p[0]) | std::to_integer<std::uint32_t>(p[1])
                                                                  << 8;
  if (type == DType::kFloat16) return decode_float(kHalfKind, bits);
  if (type == DType::kBFloat16) return std::bit_cast<float>(bits << 16);
  float v;
  std::memcpy(&v, p, 4);
  return v;
}

void store_float(DType type, double v, std::byte* p) {
  if (type == DType::kFloat64) {
    std::memcpy(p, &v, 8);
    return;
  }
  if (type == DType::kFloat32) {
    float f = static_cast<float>(v);
    std::memcpy(p, &f, 4);
    return;
  }
  // Every source is a float32 at least in range, and rounding to float32 first would round twice.
  std::uint32_t bits = encode_float(type == DType::kFloat16 ? kHalfKind : kBrainKind, v);
  p[0] = static_cast<std::byte>(bits);
  p[1] = static_cast<std::byte>(bits >> 8);
}

// `count` elements cast from one float type to another, on all threads.
void cast(DType from, const std::byte* in, DType to, std::byte* out, std::int64_t count,
          const Threads& threads) {
  const std::size_t in_bytes = dtype_bytes(from), out_bytes = dtype_bytes(to);
  constexpr std::int64_t kPiece = 1 << 16;
  threads.run((count + kPiece - 1) / kPiece, [&](std::int64_t piece) {
    std::int64_t end = std::min(count, (piece + 1) * kPiece);
    for (std::int64_t i = piece * kPiece; i < end; ++i)
      store_float(to, load_float(from, in + static_cast<std::size_t>(i) * in_bytes),
                  out + static_cast<std::size_t>(i) * out_bytes);
  });
}

// ---- the work
// --------------------------------------------------------------------------------------

class Progress {
 public:
  Progress(std::uint64_t total, bool quiet) : total_(total), quiet_(quiet) {}
  void add(std::uint64_t bytes) {
    done_ += bytes;
    int percent =
        total_ ? static_cast<int>(100.0 * static_cast<double>(done_) / static_cast<double>(total_))
               : 100;
    if (quiet_ || percent < next_) return;
    next_ = percent / 5 * 5 + 5;
    double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    double left =
        done_ ? seconds * static_cast<double>(total_ - done_) / static_cast<double>(done_) : 0;
    std::fprintf(stderr, "lowbit: %3d %%, %.2f of %.2f GB, %.0f s left\n", percent,
                 static_cast<double>(done_) / 1e9, static_cast<double>(total_) / 1e9, left);
  }

 private:
  std::uint64_t total_, done_ = 0;
  bool quiet_;
  int next_ = 5;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class Converter {
 public:
  Converter(SaveWriter& writer, const ConvertArgs& args, const Threads& threads, Progress& progress)
      : writer_(writer), args_(args), threads_(threads), progress_(progress) {}

  void plain(const Item& item) {
    const FileTensor& source = *item.source;
    const std::byte* data = item.file->data(source).data();
    std::uint64_t elements = source.bytes / static_cast<std::uint64_t>(bytes_of(source.dtype));
    const std::uint64_t step = kChunkBytes / static_cast<std::uint64_t>(bytes_of(source.dtype));
    for (std::uint64_t at = 0; at < elements; at += step) {
      std::uint64_t count = std::min(step, elements - at);
      std::span<const std::byte> piece(data + at * bytes_of(source.dtype),
                                       count * bytes_of(source.dtype));
      if (item.saved.dtype == source.dtype) {
        writer_.write(piece);
      } else {
        Buffer out(count * bytes_of(item.saved.dtype));
        cast(*float_type(source.dtype), piece.data(), *float_type(item.saved.dtype), out.data(),
             static_cast<std::int64_t>(count), threads_);
        writer_.write(out.span());
      }
      item.file->release(piece);
      progress_.add(piece.size());
    }
  }

  void packed(const Item& item, std::size_t index) {
    PackedShape shape = packed_shape(item.saved);
    std::uint64_t need = shape.bytes() + 2 * kChunkBytes;
    if (shape.matrices != 1)
      need += matrix_elements(shape) * static_cast<std::uint64_t>(shape.matrices) * 4;
    if (need > args_.max_memory)
      throw Error(ErrorCode::kResource, "convert: tensor " + json::quote(item.saved.name) +
                                            " needs " + std::to_string(need) +
                                            " bytes of memory, --max-memory allows " +
                                            std::to_string(args_.max_memory) + "; raise it");
    Buffer out(shape.bytes());
    std::memset(out.data(), 0, out.span().size());
    int exponent = shape.matrices == 1 ? matrix(item, shape.layout, out) : stack(item, shape, out);
    writer_.set_exponent(index, exponent);
    writer_.write(out.span());
    progress_.add(item.source->bytes);
  }

 private:
  static std::uint64_t bytes_of(FileDType dtype) {
    return static_cast<std::uint64_t>(file_dtype_info(dtype).bytes);
  }
  static std::uint64_t matrix_elements(const PackedShape& shape) {
    return static_cast<std::uint64_t>(shape.layout.tiles * kTileRows * shape.layout.k);
  }

  // Rows [begin, end) of the matrix as it is packed. Holds a cast copy if one is needed.
  MatrixView rows(const Item& item, const Layout& layout, std::int64_t begin, std::int64_t end,
                  std::unique_ptr<Buffer>& copy) const {
    const FileTensor& source = *item.source;
    DType type = *float_type(source.dtype);
    const std::byte* data = item.file->data(source).data();
    MatrixView view{data, type, end - begin, layout.k, layout.k, 1};
    if (item.saved.transposed) {
      view.row_stride = 1;
      view.col_stride = layout.n;
    }
    std::int64_t first = begin * view.row_stride;
    view.data = data + static_cast<std::uint64_t>(first) * bytes_of(source.dtype);
    if (item.saved.dtype == source.dtype) return view;
    DType wanted = *float_type(item.saved.dtype);
    std::int64_t count = (end - begin) * layout.k;
    copy = std::make_unique<Buffer>(static_cast<std::uint64_t>(count) * dtype_bytes(wanted));
    if (item.saved.transposed) {
      for (std::int64_t r = 0; r < end - begin; ++r)
        for (std::int64_t c = 0; c < layout.k; ++c)
          store_float(
              wanted,
              load_float(type, data + static_cast<std::uint64_t>(begin + r + c * layout.n) *
                                          bytes_of(source.dtype)),
              copy->data() + static_cast<std::uint64_t>(r * layout.k + c) * dtype_bytes(wanted));
    } else {
      cast(type, static_cast<const std::byte*>(view.data), wanted, copy->data(), count, threads_);
    }
    return {copy->data(), wanted, end - begin, layout.k, layout.k, 1};
  }

  void check_finite(const Item& item, const MatrixView& view, std::int64_t first_row) const {
    std::int64_t bad = first_nonfinite(view, threads_);
    if (bad < 0) return;
    refuse(item.file->path() + ": tensor " + json::quote(item.saved.name) +
           " holds a value that is not finite at row " +
           std::to_string(first_row + bad / view.cols) + ", column " +
           std::to_string(bad % view.cols) +
           ", which no low-bit type can represent; repair the checkpoint or name the module in "
           "--not-convert");
  }

  // Chunks of whole tiles: bytes of a tile do not depend on other tiles unless the tensor needs an
  // exponent, and whether it does is known from any chunk that would have one.
  int matrix(const Item& item, const Layout& layout, const Buffer& out) {
    std::uint64_t row_bytes = static_cast<std::uint64_t>(layout.k) * 8;
    std::int64_t step = std::max<std::int64_t>(
        kTileRows, static_cast<std::int64_t>(kChunkBytes / std::max<std::uint64_t>(1, row_bytes)) /
                       kTileRows * kTileRows);
    if (item.saved.transposed) step = layout.n;  // a chunk of columns would touch every page
    bool whole = false;
    for (std::int64_t begin = 0; begin < layout.n && !whole; begin += step) {
      std::int64_t end = std::min(layout.n, begin + step);
      std::unique_ptr<Buffer> copy;
      MatrixView view = rows(item, layout, begin, end, copy);
      check_finite(item, view, begin);
      Layout part = make_layout(layout.format, end - begin, layout.k, layout.group_size);
      std::span<std::byte> target =
          out.span().subspan(static_cast<std::size_t>(begin / kTileRows * layout.tile_bytes),
                             static_cast<std::size_t>(part.bytes()));
      int exponent = quantize(view, part, target, threads_);
      whole = exponent != 0;
      if (!item.saved.transposed)
        item.file->release(
            item.file->data(*item.source)
                .subspan(static_cast<std::size_t>(begin * layout.k) * bytes_of(item.source->dtype),
                         static_cast<std::size_t>((end - begin) * layout.k) *
                             bytes_of(item.source->dtype)));
    }
    int exponent = 0;
    if (whole) {
      std::unique_ptr<Buffer> copy;
      MatrixView view = rows(item, layout, 0, layout.n, copy);
      check_finite(item, view, 0);
      exponent = quantize(view, layout, out.span(), threads_);
    }
    item.file->release(item.file->data(*item.source));
    return exponent;
  }

  // Several matrices are packed as one of all their rows, each padded to whole tiles with zeros.
  int stack(const Item& item, const PackedShape& shape, const Buffer& out) {
    const Layout& one = shape.layout;
    DType type = *float_type(item.source->dtype), wanted = *float_type(item.saved.dtype);
    std::uint64_t padded = matrix_elements(shape);
    Buffer rows(padded * static_cast<std::uint64_t>(shape.matrices) * dtype_bytes(wanted));
    std::memset(rows.data(), 0, rows.span().size());
    const std::byte* data = item.file->data(*item.source).data();
    const std::uint64_t size = bytes_of(item.source->dtype);
    threads_.run(shape.matrices, [&](std::int64_t m) {
      const std::byte* from = data + static_cast<std::uint64_t>(m * one.n * one.k) * size;
      std::byte* to = rows.data() + static_cast<std::uint64_t>(m) * padded * dtype_bytes(wanted);
      for (std::int64_t r = 0; r < one.n; ++r)
        for (std::int64_t c = 0; c < one.k; ++c) {
          std::int64_t at = item.saved.transposed ? c * one.n + r : r * one.k + c;
          store_float(wanted, load_float(type, from + static_cast<std::uint64_t>(at) * size),
                      to + static_cast<std::uint64_t>(r * one.k + c) * dtype_bytes(wanted));
        }
    });
    Layout all =
        make_layout(one.format, shape.matrices * one.tiles * kTileRows, one.k, one.group_size);
    MatrixView view{rows.data(), wanted, all.n, one.k, one.k, 1};
    check_finite(item, view, 0);
    int exponent = quantize(view, all, out.span(), threads_);
    item.file->release(item.file->data(*item.source));
    return exponent;
  }

  SaveWriter& writer_;
  const ConvertArgs& args_;
  const Threads& threads_;
  Progress& progress_;
};

}  // namespace

void convert(const ConvertArgs& args, const Threads& threads) {
  Checkpoint checkpoint = open_checkpoint(args.source);
  Job job = args.plan.empty() ? job_from_names(args, checkpoint) : job_from_plan(args, checkpoint);

  SaveRequest request;
  request.directory = args.destination;
  request.max_shard_bytes = args.max_shard_bytes;
  request.extra_files = companion_files(checkpoint);
  request.manifest.options = job.options;
  request.manifest.ties = job.ties;
  std::map<std::string, const Item*> by_name;
  std::uint64_t total = 0;
  for (const Item& item : job.items) {
    request.manifest.tensors.push_back(item.saved);
    by_name.emplace(item.saved.name, &item);
    total += item.source->bytes;
  }
  SaveWriter writer(std::move(request));
  Progress progress(total, args.quiet);
  Converter converter(writer, args, threads, progress);
  for (std::size_t index : writer.order()) {
    const Item& item = *by_name.at(writer.tensors()[index].name);
    if (item.saved.format) {
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
