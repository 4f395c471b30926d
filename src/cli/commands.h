// The commands of the lowbit program. Each throws lowbit::Error; main turns that into an exit code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lowbit/threads.h"

namespace lowbit::cli {

struct ConvertArgs {
  std::string source, destination;
  std::string low_bit = "sym_int4";
  int group_size = 0;
  std::vector<std::string> not_converted;
  std::string plan;  // file with the JSON of ipex_llm.plan(...).to_dict()
  std::uint64_t max_shard_bytes = 4'000'000'000;
  std::uint64_t max_memory = 400'000'000;
  bool quiet = false;
};
void convert(const ConvertArgs& args, const Threads& threads);

struct InspectArgs {
  std::string path;
  bool json = false;
};
void inspect(const InspectArgs& args);

void verify(const std::string& path, const Threads& threads);

struct BenchArgs {
  std::vector<std::string> formats;  // empty: all
  std::int64_t m = 1, n = 4096, k = 4096;
  double seconds = 0.5;  // per format
};
void bench(const BenchArgs& args, const Threads& threads);

}  // namespace lowbit::cli
