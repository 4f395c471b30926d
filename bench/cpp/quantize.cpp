// lowbit_quantize_bench [--shape 4096x4096] [--formats sym_int4,...] [--threads 2] [--group 64]
//                       [--ring 256] [--seconds 0.3]
//
// Quantizing from float32, float16 and bfloat16, rows and transposed, against the bandwidth with
// which the same source is read. A ring of sources larger than the last-level cache (--ring, MiB;
// 0: one source, to see the arithmetic alone); one tile of each case is compared with the reference
// before any timing. Reported: the median of GB/s of source bytes, and of the per-round ratios.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "limits.h"
#include "lowbit/dispatch.h"
#include "lowbit/error.h"
#include "lowbit/linear.h"
#include "lowbit/quantize.h"
#include "spin_threads.h"
#include "support.h"

namespace lowbit::bench {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Options {
  std::int64_t n = 4096, k = 4096, ring = 256;
  std::vector<std::string> formats;
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  int group = 64;
  double seconds = 0.3;
};

struct Source {
  const char* name;
  DType dtype;
  bool transposed;
};
constexpr Source kSources[] = {
    {"float32", DType::kFloat32, false},   {"float16", DType::kFloat16, false},
    {"bfloat16", DType::kBFloat16, false}, {"float32^T", DType::kFloat32, true},
    {"float16^T", DType::kFloat16, true},  {"bfloat16^T", DType::kBFloat16, true},
};

// Normal weights of deviation 0.02.
void fill(std::byte* to, DType dtype, std::int64_t count) {
  std::mt19937_64 rng(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  constexpr std::int64_t kDistinct = 1 << 16;
  const std::int64_t bytes = static_cast<std::int64_t>(dtype_bytes(dtype));
  for (std::int64_t i = 0; i < std::min(count, kDistinct); ++i) {
    const float value = normal(rng);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::kFloat32) std::memcpy(to + 4 * i, &bits, 4);
    if (dtype == DType::kBFloat16) std::memcpy(to + 2 * i, reinterpret_cast<char*>(&bits) + 2, 2);
    if (dtype == DType::kFloat16) {
      // Normal halves only: exponent rebiased, mantissa cut.
      const std::uint32_t exponent = std::max((bits >> 23 & 255u), 114u) - 112;
      const auto half = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | exponent << 10 |
                                                   (bits >> 13 & 1023u));
      std::memcpy(to + 2 * i, &half, 2);
    }
  }
  for (std::int64_t i = kDistinct; i < count; i += kDistinct) {
    std::memcpy(to + i * bytes, to,
                static_cast<std::size_t>(std::min(kDistinct, count - i) * bytes));
  }
}

int run(const Options& options) {
  const SpinThreads threads(options.threads);
  std::printf("# %s; %d threads; GB/s of source bytes (%% of the bandwidth that reads them)\n",
              describe_isa().c_str(), options.threads);
  std::atomic<std::uint64_t> sink{0};
  for (const Source& source : kSources) {
    const auto element = static_cast<std::int64_t>(dtype_bytes(source.dtype));
    const std::int64_t bytes = options.n * options.k * element;
    const std::int64_t copies = std::max<std::int64_t>(1, (options.ring << 20) / bytes);
    Bytes ring = allocate(copies * bytes);
    fill(ring.get(), source.dtype, copies * options.n * options.k);
    const auto view = [&](std::int64_t copy, std::int64_t rows) {
      return MatrixView{ring.get() + copy * bytes,
                        source.dtype,
                        rows,
                        options.k,
                        source.transposed ? 1 : options.k,
                        source.transposed ? options.n : 1};
    };
    for (const FormatInfo& info : formats()) {
      if (!options.formats.empty() && std::find(options.formats.begin(), options.formats.end(),
                                                info.name) == options.formats.end()) {
        continue;
      }
      const int group = info.grouped() ? options.group : 0;
      const Layout layout = make_layout(info.format, options.n, options.k, group);
      const Layout tile =
          make_layout(info.format, std::min(options.n, kTileRows + 0l), options.k, group);
      Bytes packed = allocate(layout.bytes()), expected = allocate(tile.bytes());
      const auto pack = [&](std::int64_t copy) {
        return quantize(view(copy, options.n), layout,
                        std::span(packed.get(), static_cast<std::size_t>(layout.bytes())), threads);
      };
      const int exponent = pack(0);
      const int tile_exponent = reference::quantize(
          view(0, tile.n), tile, std::span(expected.get(), static_cast<std::size_t>(tile.bytes())));
      if (exponent != tile_exponent ||
          std::memcmp(packed.get(), expected.get(), static_cast<std::size_t>(tile.bytes())) != 0) {
        std::fprintf(stderr, "bench: %s from %s: bytes differ from the reference's\n",
                     std::string(info.name).c_str(), source.name);
        return 1;
      }
      std::vector<double> rates, ratios;
      double spent = 0;
      for (std::int64_t round = 0; round < 5 || spent < options.seconds; ++round) {
        double start = now();
        pack(round % copies);
        const double packing = now() - start;
        const std::byte* from = ring.get() + (round + copies / 2) % copies * bytes;
        start = now();
        threads.run(options.threads, [&](std::int64_t task) {
          const std::int64_t begin = bytes * task / options.threads / 64 * 64;
          const std::int64_t end = bytes * (task + 1) / options.threads / 64 * 64;
          sink += read_all(from + begin, end - begin);
        });
        const double reading = now() - start;
        rates.push_back(static_cast<double>(bytes) / packing / 1e9);
        ratios.push_back(reading / packing);
        spent += packing + reading;
      }
      std::printf("%-11s %-10s %7.2f GB/s %6.1f %%\n", source.name, std::string(info.name).c_str(),
                  median(rates), 100 * median(ratios));
      std::fflush(stdout);
    }
  }
  return 0;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace
}  // namespace lowbit::bench

int main(int argc, char** argv) {
  lowbit::bench::Options options;
  try {
    for (int i = 1; i + 1 < argc; i += 2) {
      const std::string flag = argv[i], value = argv[i + 1];
      if (flag == "--shape") {
        options.n = std::atoll(value.c_str());
        options.k = std::atoll(value.c_str() + value.find('x') + 1);
      } else if (flag == "--formats") {
        options.formats = lowbit::bench::split(value);
      } else if (flag == "--threads") {
        options.threads = std::atoi(value.c_str());
      } else if (flag == "--group") {
        options.group = std::atoi(value.c_str());
      } else if (flag == "--ring") {
        options.ring = std::atoll(value.c_str());
      } else if (flag == "--seconds") {
        options.seconds = std::atof(value.c_str());
      } else {
        throw lowbit::Error(lowbit::ErrorCode::kValue, "bench: unknown option " + flag);
      }
    }
    return lowbit::bench::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
