// lowbit_bench [--shapes 4096x4096,...] [--formats sym_int4,...] [--m 1,2,...] [--precisions
// fp32,...]
//              [--threads 2] [--group 64] [--seconds 0.4] [--json FILE] [--clock wall|cpu]
//
// For every case: a ring of packed matrices larger than the last-level cache, one tile of each case
// compared with the scalar reference before any timing, then rounds of (limit, kernel, limit,
// kernel) so that both see the same second of a shared machine. Reported: the median time, GB/s of
// weight bytes, operations, and the median of the per-round ratios to the limit that rules the
// case: read bandwidth, or the peak of the instruction the path is made of.
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/linear_driver.h"
#include "cpu/select.h"
#include "limits.h"
#include "lowbit/dispatch.h"
#include "lowbit/error.h"
#include "lowbit/linear.h"
#include "spin_threads.h"
#include "support.h"

namespace lowbit::bench {
namespace {

// Wall clock; or, with one thread, the processor time of the calling thread, which another program
// on the same cores cannot stretch.
bool g_cpu_clock = false;

double now() {
  if (g_cpu_clock) {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Twice the last-level cache, so that weights come from memory; at least 192 MiB, because a virtual
// machine may see less of the cache than it has.
std::int64_t default_ring() {
  std::int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  cache = sysconf(_SC_LEVEL3_CACHE_SIZE) >> 20;
#endif
  return std::max<std::int64_t>(192, 2 * cache);
}

struct Options {
  std::vector<std::string> shapes = {"4096x4096", "14336x4096", "4096x14336", "2048x5632",
                                     "49152x576"};
  std::vector<std::string> formats, m = {"1", "2", "4", "8", "16", "32", "64", "128", "512"};
  std::vector<std::string> precisions = {"auto"};
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  int group = 64;
  std::int64_t ring = default_ring();  // MiB of weights that calls walk over
  double seconds = 0.4;
  std::string json;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

Precision parse_precision(const std::string& name) {
  const std::map<std::string, Precision> names = {{"auto", Precision::kAuto},
                                                  {"fp32", Precision::kFp32},
                                                  {"bf16", Precision::kBf16},
                                                  {"int8", Precision::kInt8}};
  const auto found = names.find(name);
  if (found == names.end()) {
    throw Error(ErrorCode::kValue,
                "bench: precision must be auto, fp32, bf16 or int8, got " + name);
  }
  return found->second;
}

// The peak that rules a path is told by its name: "<isa>.<compute>....".
Rate rate_of(const cpu::Path& path) {
  const std::string name = path.name;
  if (name.find(".int8") != std::string::npos) return Rate::kInt8;
  return name.find(".bf16.") != std::string::npos ? Rate::kBf16 : Rate::kF32;
}

double factor_of(const cpu::Path& path) {
  return std::string(path.name).find(".int8x2.") != std::string::npos ? 2.0 : 1.0;
}

// Rows of the first, a middle and the last tile, for the first and the last tokens, against the
// reference: the largest error relative to the largest exact output.
double verify(const LinearArgs& args) {
  constexpr std::int64_t kTokens = 13;  // token blocks of every kernel end within 13
  const std::int64_t rows = std::min<std::int64_t>(args.layout.n, kTileRows);
  const std::int64_t tokens = std::min(args.m, kTokens);
  std::vector<float> expected(static_cast<std::size_t>(tokens * rows));
  double worst = 0, largest = 1e-30;
  for (const std::int64_t tile : {std::int64_t{0}, args.layout.tiles / 2, args.layout.tiles - 1}) {
    LinearArgs part = args;
    const std::int64_t first = tile * kTileRows;
    part.layout = make_layout(args.layout.format, std::min(kTileRows + 0l, args.layout.n - first),
                              args.layout.k, args.layout.group_size);
    part.packed = static_cast<const std::byte*>(args.packed) + tile * args.layout.tile_bytes;
    part.out = expected.data();
    part.out_stride = part.layout.n;
    part.out_dtype = DType::kFloat32;
    part.m = tokens;
    for (const std::int64_t token : {std::int64_t{0}, args.m - tokens}) {
      part.x = static_cast<const std::uint16_t*>(args.x) + token * args.x_stride;
      reference::linear(part);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const float* out = static_cast<const float*>(args.out) + (token + t) * args.out_stride;
        for (std::int64_t r = 0; r < part.layout.n; ++r) {
          const double exact = expected[static_cast<std::size_t>(t * part.layout.n + r)];
          largest = std::max(largest, std::fabs(exact));
          // Written so that a NaN counts.
          const double error = std::fabs(out[first + r] - exact);
          if (!(error <= worst)) worst = error;
        }
      }
      if (args.m <= tokens) break;
    }
  }
  return worst / largest;
}

int run(const Options& options) {
  const SpinThreads threads(options.threads);
  const std::int64_t ring_bytes = options.ring << 20;
  std::ofstream json;
  if (!options.json.empty()) json.open(options.json);
  if (json) json << "[\n";
  bool first_record = true, any_wrong = false;
  std::mt19937_64 rng(1);
  std::printf("# %s; %d threads\n", describe_isa().c_str(), options.threads);
  std::printf("%-10s %-12s %5s %-5s %9s %8s %8s %6s %6s  %s\n", "format", "shape", "m", "prec",
              "us", "GB/s", "GOPS", "bw%", "peak%", "path");
  std::atomic<std::uint64_t> sink{0};
  for (const std::string& shape : options.shapes) {
    const std::int64_t n = std::atoll(shape.c_str());
    const std::int64_t k = std::atoll(shape.c_str() + shape.find('x') + 1);
    std::vector<float> weight(static_cast<std::size_t>(16 * 64 * k));
    std::normal_distribution<float> normal(0.0f, 0.02f);
    for (float& value : weight) value = normal(rng);
    for (const FormatInfo& info : formats()) {
      if (!options.formats.empty() && std::find(options.formats.begin(), options.formats.end(),
                                                info.name) == options.formats.end()) {
        continue;
      }
      const Layout layout = make_layout(info.format, n, k, info.grouped() ? options.group : 0);
      // --ring 0: one copy, for kernels timed out of the cache.
      const std::int64_t copies =
          std::max<std::int64_t>(1, (ring_bytes + layout.bytes() - 1) / layout.bytes());
      Bytes ring = allocate(copies * layout.bytes());
      // 1024 distinct rows repeated; quantizing them is not what is measured.
      const std::int64_t distinct = std::min<std::int64_t>(n, 16 * 64);
      const Layout sample = make_layout(info.format, distinct, k, layout.group_size);
      const MatrixView view{weight.data(), DType::kFloat32, distinct, k, k, 1};
      Bytes packed = allocate(sample.bytes());
      const int exponent = quantize(
          view, sample, std::span(packed.get(), static_cast<std::size_t>(sample.bytes())), threads);
      for (std::int64_t copy = 0; copy < copies; ++copy) {
        for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
          std::memcpy(ring.get() + copy * layout.bytes() + tile * layout.tile_bytes,
                      packed.get() + tile % sample.tiles * layout.tile_bytes,
                      static_cast<std::size_t>(layout.tile_bytes));
        }
      }
      for (const std::string& precision_name : options.precisions) {
        for (const std::string& tokens : options.m) {
          const std::int64_t m = std::atoll(tokens.c_str());
          const Precision precision = parse_precision(precision_name);
          std::vector<std::uint16_t> x(static_cast<std::size_t>(m * k));
          std::normal_distribution<float> unit;
          for (std::uint16_t& value : x) {
            const float sampled = unit(rng);
            std::uint32_t bits;
            std::memcpy(&bits, &sampled, 4);
            value = static_cast<std::uint16_t>(bits >> 16);
          }
          const Bytes out = allocate(m * n * 4);  // begins at a cache line, as tensors do
          LinearArgs args{};
          args.x = x.data();
          args.x_dtype = DType::kBFloat16;
          args.x_stride = k;
          args.packed = ring.get();
          args.layout = layout;
          args.exponent = exponent;
          args.out = out.get();
          args.out_dtype = DType::kFloat32;
          args.out_stride = n;
          args.m = m;
          args.precision = precision;
          linear(args, threads);
          const double error = verify(args);
          // Wrong code is off by the outputs' own size; int8 activations by about 1 %.
          const bool good = error < (precision == Precision::kFp32 ? 1e-3 : 0.04);
          if (!good) {
            std::printf("%-10s %-12s %5lld %-5s wrong by %.3g of the largest output: not timed\n",
                        std::string(info.name).c_str(), shape.c_str(), static_cast<long long>(m),
                        precision_name.c_str(), error);
            std::fflush(stdout);
            if (json) {
              json << (first_record ? "" : ",\n") << "{\"format\": \"" << info.name
                   << "\", \"n\": " << n << ", \"k\": " << k << ", \"m\": " << m
                   << ", \"precision\": \"" << precision_name << "\", \"wrong\": true}";
              first_record = false;
            }
            any_wrong = true;
            continue;
          }
          const cpu::Path& path = cpu::select_linear(cpu::active_level(), layout, precision, m);
          const Rate rate = rate_of(path);
          const double operations = 2.0 * static_cast<double>(m * n * k);
          std::vector<double> times, bandwidths, peaks, read_ratios, peak_ratios;
          std::int64_t at = 0;
          const auto next = [&] {
            at = (at + 1) % copies;
            return ring.get() + at * layout.bytes();
          };
          double spent = 0;
          // Enough calls per timing that the clock and the region's start do not show.
          int calls = 1;
          for (int round = 0; round < 64 && (spent < options.seconds || round < 6); ++round) {
            double start = now();
            for (int i = 0; i < calls; ++i) {
              args.packed = next();
              linear(args, threads);
            }
            const double kernel = (now() - start) / calls;
            if (round == 0) {  // warms up
              calls = static_cast<int>(4e-3 / kernel) + 1;
              continue;
            }
            const std::int64_t read_calls = std::min<std::int64_t>(calls, copies);
            start = now();
            for (std::int64_t i = 0; i < read_calls; ++i) {
              const std::byte* bytes = next();
              threads.run(options.threads, [&](std::int64_t task) {
                const std::int64_t begin = layout.bytes() * task / options.threads;
                const std::int64_t end = layout.bytes() * (task + 1) / options.threads;
                sink += read_all(bytes + begin, end - begin);
              });
            }
            const double read = (now() - start) / static_cast<double>(read_calls);
            std::vector<double> burnt(static_cast<std::size_t>(options.threads));
            start = now();
            threads.run(options.threads, [&](std::int64_t task) {
              burnt[static_cast<std::size_t>(task)] = burn(rate, 1500000);
            });
            const double burning = now() - start;
            double peak = 0;
            for (double ops : burnt) peak += ops / burning;
            times.push_back(kernel);
            bandwidths.push_back(static_cast<double>(layout.bytes()) / read);
            peaks.push_back(peak);
            read_ratios.push_back(read / kernel);
            peak_ratios.push_back(peak > 0 ? operations * factor_of(path) / kernel / peak : 0);
            spent += kernel * calls + read * static_cast<double>(read_calls) + burning;
          }
          const double time = median(times);
          std::printf("%-10s %-12s %5lld %-5s %9.1f %8.2f %8.1f %6.1f %6.1f  %s\n",
                      std::string(info.name).c_str(), shape.c_str(), static_cast<long long>(m),
                      precision_name.c_str(), time * 1e6,
                      static_cast<double>(layout.bytes()) / time / 1e9, operations / time / 1e9,
                      100 * median(read_ratios), 100 * median(peak_ratios), path.name);
          std::fflush(stdout);
          if (json) {
            json << (first_record ? "" : ",\n") << "{\"format\": \"" << info.name
                 << "\", \"n\": " << n << ", \"k\": " << k << ", \"m\": " << m
                 << ", \"group_size\": " << layout.group_size << ", \"precision\": \""
                 << precision_name << "\", \"path\": \"" << path.name << "\", \"isa\": \""
                 << active_isa() << "\", \"threads\": " << options.threads
                 << ", \"seconds\": " << time << ", \"weight_bytes\": " << layout.bytes()
                 << ", \"operations\": " << operations
                 << ", \"read_bandwidth\": " << median(bandwidths)
                 << ", \"peak\": " << median(peaks) << ", \"peak_of\": \"" << rate_name(rate)
                 << "\", \"bandwidth_ratio\": " << median(read_ratios)
                 << ", \"peak_ratio\": " << median(peak_ratios) << ", \"rounds\": " << times.size()
                 << ", \"fastest\": " << *std::min_element(times.begin(), times.end())
                 << ", \"error\": " << error << "}";
            first_record = false;
          }
        }
      }
    }
  }
  if (json) json << "\n]\n";
  if (json) json.close();
  if (!options.json.empty() && !json) {
    throw Error(ErrorCode::kIo, "bench: cannot write " + options.json);
  }
  return any_wrong ? 1 : 0;
}

}  // namespace
}  // namespace lowbit::bench

int main(int argc, char** argv) {
  using lowbit::bench::split;
  lowbit::bench::Options options;
  try {
    for (int i = 1; i + 1 < argc; i += 2) {
      const std::string flag = argv[i], value = argv[i + 1];
      if (flag == "--clock")
        lowbit::bench::g_cpu_clock = value == "cpu";
      else if (flag == "--shapes")
        options.shapes = split(value);
      else if (flag == "--formats")
        options.formats = split(value);
      else if (flag == "--m")
        options.m = split(value);
      else if (flag == "--precisions")
        options.precisions = split(value);
      else if (flag == "--threads")
        options.threads = std::atoi(value.c_str());
      else if (flag == "--ring")
        options.ring = std::atoll(value.c_str());
      else if (flag == "--group")
        options.group = std::atoi(value.c_str());
      else if (flag == "--seconds")
        options.seconds = std::atof(value.c_str());
      else if (flag == "--json")
        options.json = value;
      else
        throw lowbit::Error(lowbit::ErrorCode::kValue, "bench: unknown option " + flag);
    }
    return lowbit::bench::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
