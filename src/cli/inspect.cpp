// inspect, verify and bench.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "cli/commands.h"
#include "io/json.h"
#include "io/os.h"
#include "lowbit/dispatch.h"
#include "lowbit/error.h"
#include "lowbit/file.h"
#include "lowbit/gguf.h"
#include "lowbit/linear.h"
#include "lowbit/quantize.h"

namespace lowbit::cli {
namespace {

std::string shape_text(const std::vector<std::int64_t>& shape, const char* between) {
  std::string text;
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i ? between : "") + std::to_string(shape[i]);
  return text;
}

bool is_save(const std::string& path) {
  return os::exists(os::join(path, kManifestName));
}

// One line of the table, from a save or from a plain file.
struct Row {
  std::string name, type, shape, logical;
  std::uint64_t bytes;
  int group_size = 0, exponent = 0;
  std::string file;
};

std::vector<Row> rows_of_save(const SavedDirectory& saved) {
  std::vector<Row> rows;
  for (std::size_t i = 0; i < saved.manifest.tensors.size(); ++i) {
    const SavedTensor& tensor = saved.manifest.tensors[i];
    std::string logical(file_dtype_info(tensor.dtype).torch_name);
    rows.push_back({tensor.name,
                    tensor.format ? std::string(format_info(*tensor.format).name) : logical,
                    shape_text(tensor.shape, ", "), logical, saved.stored[i]->bytes,
                    tensor.group_size, tensor.exponent, saved.manifest.files[tensor.file].name});
  }
  return rows;
}

std::vector<Row> rows_of_file(const TensorFile& file) {
  std::vector<Row> rows;
  for (const FileTensor& tensor : file.header().tensors) {
    std::string type(file_dtype_info(tensor.dtype).torch_name);
    rows.push_back(
        {tensor.name, type, shape_text(tensor.shape, ", "), type, tensor.bytes, 0, 0, ""});
  }
  return rows;
}

std::vector<Row> rows_of_gguf(const GgufFile& file) {
  std::vector<Row> rows;
  for (const GgufTensor& tensor : file.header().tensors) {
    const GgmlTypeInfo& type = ggml_type_info(tensor.type);
    rows.push_back({tensor.name, std::string(type.name), shape_text(tensor.shape, ", "), "float32",
                    tensor.bytes, type.block_elems > 1 ? type.block_elems : 0, 0, ""});
  }
  return rows;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds of one call, the best of as many as fit.
template <class Body>
double best_time(double seconds, const Body& body) {
  body();
  double best = 1e30;
  auto start = std::chrono::steady_clock::now();
  do {
    auto one = std::chrono::steady_clock::now();
    body();
    best = std::min(best, seconds_since(one));
  } while (seconds_since(start) < seconds);
  return best;
}

}  // namespace

void inspect(const InspectArgs& args) {
  std::vector<Row> rows;
  if (args.json && args.path.ends_with(".gguf")) {
    std::printf("%s\n", describe_gguf(GgufFile::open(args.path)->header()).c_str());
    return;
  }
  std::string options = "null", ties = "{}";
  if (is_save(args.path)) {
    SavedDirectory saved = open_saved(args.path, {.verify = false});
    rows = rows_of_save(saved);
    options = saved.manifest.options;
    std::string text;
    for (const auto& [alias, target] : saved.manifest.ties)
      text += (text.empty() ? "" : ", ") + json::quote(alias) + ": " + json::quote(target);
    ties = "{" + text + "}";
  } else if (args.path.ends_with(".gguf")) {
    rows = rows_of_gguf(*GgufFile::open(args.path));
  } else {
    rows = rows_of_file(*TensorFile::open(args.path));
  }
  if (args.json) {
    std::printf("{\"options\": %s, \"ties\": %s, \"tensors\": [", options.c_str(), ties.c_str());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const Row& row = rows[i];
      std::printf(
          "%s\n  {\"name\": %s, \"type\": \"%s\", \"dtype\": \"%s\", \"shape\": [%s], "
          "\"bytes\": %llu, \"group_size\": %d, \"exponent\": %d}",
          i ? "," : "", json::quote(row.name).c_str(), row.type.c_str(), row.logical.c_str(),
          row.shape.c_str(), static_cast<unsigned long long>(row.bytes), row.group_size,
          row.exponent);
    }
    std::printf("\n]}\n");
    return;
  }
  std::size_t width = 6;
  std::uint64_t bytes = 0;
  for (const Row& row : rows) width = std::max(width, row.name.size());
  std::printf("%-*s  %-10s %5s  %14s  %s\n", static_cast<int>(width), "tensor", "type", "group",
              "bytes", "shape");
  for (const Row& row : rows) {
    bytes += row.bytes;
    std::string group = row.group_size ? std::to_string(row.group_size) : "-";
    std::printf("%-*s  %-10s %5s  %14llu  [%s]\n", static_cast<int>(width), row.name.c_str(),
                row.type.c_str(), group.c_str(), static_cast<unsigned long long>(row.bytes),
                row.shape.c_str());
  }
  std::printf("%zu tensors, %llu bytes\n", rows.size(), static_cast<unsigned long long>(bytes));
  if (options != "null") std::printf("options: %s\n", options.c_str());
  if (ties != "{}") std::printf("ties: %s\n", ties.c_str());
}

void verify(const std::string& path, const Threads& threads) {
  auto start = std::chrono::steady_clock::now();
  std::uint64_t bytes = 0;
  std::size_t tensors = 0;
  const char* what;
  if (path.ends_with(".gguf")) {
    auto file = GgufFile::open(path);
    bytes = file->bytes();
    tensors = file->header().tensors.size();
    what = "the header is right; a GGUF file has no digests";
  } else if (is_save(path) || !path.ends_with(".safetensors")) {
    SavedDirectory saved = open_saved(path, {}, threads);
    for (const SavedFile& file : saved.manifest.files) bytes += file.bytes;
    tensors = saved.manifest.tensors.size();
    what = "manifest, headers and every digest are right";
  } else {
    auto file = TensorFile::open(path);
    bytes = file->bytes();
    tensors = file->header().tensors.size();
    what = "the header is right; a plain safetensors file has no digests";
  }
  std::printf("%s: %zu tensors, %llu bytes: %s (%.2f s)\n", path.c_str(), tensors,
              static_cast<unsigned long long>(bytes), what, seconds_since(start));
}

void bench(const BenchArgs& args, const Threads& threads) {
  std::printf("%s; %d threads; m=%lld n=%lld k=%lld\n", describe_isa().c_str(), threads.count(),
              static_cast<long long>(args.m), static_cast<long long>(args.n),
              static_cast<long long>(args.k));
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> weight(static_cast<std::size_t>(args.n * args.k));
  std::vector<float> x(static_cast<std::size_t>(args.m * args.k)),
      out(static_cast<std::size_t>(args.m * args.n));
  for (float& v : weight) v = normal(random);
  for (float& v : x) v = normal(random);

  std::vector<std::string> names = args.formats;
  if (names.empty())
    for (const FormatInfo& info : formats()) names.emplace_back(info.name);
  std::printf("%-10s %12s %14s %12s %12s\n", "format", "packed MB", "quantize GB/s", "linear us",
              "linear GB/s");
  for (const std::string& name : names) {
    Layout layout = make_layout(parse_format(name), args.n, args.k);
    std::uint64_t bytes = static_cast<std::uint64_t>(layout.bytes());
    os::Memory packed = os::Memory::anonymous(std::max<std::uint64_t>(bytes, 1));
    std::span<std::byte> span(packed.data(), static_cast<std::size_t>(bytes));
    MatrixView view{weight.data(), DType::kFloat32, args.n, args.k, args.k, 1};
    double quantizing = best_time(args.seconds / 2, [&] { quantize(view, layout, span, threads); });
    LinearArgs linear_args{};
    linear_args.x = x.data();
    linear_args.x_dtype = linear_args.out_dtype = linear_args.bias_dtype = DType::kFloat32;
    linear_args.x_stride = args.k;
    linear_args.packed = packed.data();
    linear_args.layout = layout;
    linear_args.out = out.data();
    linear_args.out_stride = args.n;
    linear_args.m = args.m;
    double running = best_time(args.seconds / 2, [&] { linear(linear_args, threads); });
    std::printf("%-10s %12.2f %14.2f %12.1f %12.2f\n", name.c_str(),
                static_cast<double>(bytes) / 1e6,
                static_cast<double>(weight.size() * 4) / quantizing / 1e9, running * 1e6,
                static_cast<double>(bytes) / running / 1e9);
  }
}

}  // namespace lowbit::cli
