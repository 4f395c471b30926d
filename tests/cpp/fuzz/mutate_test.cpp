// The fuzz targets without libFuzzer, which not every compiler has: seeds of the corpus, mutated by
// a generator of fixed seed, so that each run of `make test` tries the same inputs, under
// sanitizers as well. It follows no coverage; `make fuzz` does, for longer.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "targets.h"

namespace lowbit::fuzz {
namespace {

constexpr int kInputs = 20'000;             // per target: about a second under sanitizers
constexpr std::size_t kMaxBytes = 1 << 13;  // longer inputs find nothing that these do not

// What readers decide on: structure, numbers at the edges, the words of the formats.
constexpr std::string_view kWords[] = {"{",
                                       "}",
                                       "[",
                                       "]",
                                       "\"",
                                       ",",
                                       ":",
                                       "\\",
                                       "\\u0000",
                                       "\\ud800",
                                       "\\udc00",
                                       "null",
                                       "true",
                                       "-",
                                       "0",
                                       "1",
                                       "-1",
                                       "127",
                                       "128",
                                       "255",
                                       "256",
                                       "65535",
                                       "2147483647",
                                       "2147483648",
                                       "4294967295",
                                       "4294967296",
                                       "9007199254740993",
                                       "9223372036854775807",
                                       "9223372036854775808",
                                       "18446744073709551615",
                                       "1e999",
                                       "0.0",
                                       "1E-5",
                                       "NaN",
                                       "\"dtype\"",
                                       "\"shape\"",
                                       "\"data_offsets\"",
                                       "\"__metadata__\"",
                                       "\"F32\"",
                                       "\"BF16\"",
                                       "\"U8\"",
                                       "\"BOOL\"",
                                       "\"weight_map\"",
                                       "\"tensors\"",
                                       "\"files\"",
                                       "\"ties\"",
                                       "\"sym_int4\"",
                                       "\"nf3\"",
                                       "\"group_size\"",
                                       "\"exponent\"",
                                       "\"transposed\"",
                                       "\"stored_shape\"",
                                       ".safetensors",
                                       "../",
                                       "*",
                                       "?",
                                       "[!a]",
                                       "\xc0\x80",
                                       "\xed\xa0\x80",
                                       "\xf4\x90\x80\x80",
                                       "\xef\xbb\xbf"};

using Random = std::mt19937;  // equal everywhere, unlike the distributions

std::size_t below(Random& random, std::size_t limit) {
  return limit ? random() % limit : 0;
}

// One small change at a random place.
void mutate(std::string& input, const std::vector<std::string>& seeds, Random& random) {
  std::size_t at = below(random, input.size() + 1);
  std::size_t length = std::min(input.size() - at, 1 + below(random, 32));
  switch (below(random, 8)) {
    case 0:
      if (at < input.size()) input[at] = static_cast<char>(input[at] ^ 1 << below(random, 8));
      break;
    case 1:
      if (at < input.size()) input[at] = static_cast<char>(random());
      break;
    case 2:
      input.erase(at, length);
      break;
    case 3:
      input.insert(at, input.substr(below(random, input.size() + 1), length));
      break;
    case 4: {
      const std::string& other = seeds[below(random, seeds.size())];
      input.insert(at, other.substr(below(random, other.size() + 1), 1 + below(random, 64)));
      break;
    }
    case 5:
      input.insert(at, kWords[below(random, std::size(kWords))]);
      break;
    case 6: {  // a number or word gives way to another
      std::size_t end = at;
      while (end < input.size() && std::isalnum(static_cast<unsigned char>(input[end]))) ++end;
      input.replace(at, end - at, kWords[below(random, std::size(kWords))]);
      break;
    }
    case 7: {  // binary fields: a little-endian integer near an edge
      std::uint64_t value = (std::uint64_t{1} << below(random, 64)) - below(random, 3);
      for (std::size_t i = at; i < std::min(input.size(), at + 8); ++i, value >>= 8)
        input[i] = static_cast<char>(value);
      break;
    }
  }
  if (input.size() > kMaxBytes) input.resize(kMaxBytes);
}

std::vector<std::string> seeds_of(const std::string& target) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(LOWBIT_CORPUS "/" + target))
    paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> seeds;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return seeds;
}

class Fuzz : public testing::TestWithParam<const Target*> {};

TEST_P(Fuzz, MutatedSeedsAreReadOrRefused) {
  const Target& target = *GetParam();
  const std::vector<std::string> seeds = seeds_of(target.name);
  ASSERT_FALSE(seeds.empty()) << "no seeds in " LOWBIT_CORPUS "/" << target.name;
  for (const std::string& seed : seeds) run(target, seed);
  Random random(1);
  for (int i = 0; i < kInputs; ++i) {
    std::string input = seeds[below(random, seeds.size())];
    for (std::size_t changes = 1 + below(random, 6); changes > 0; --changes)
      mutate(input, seeds, random);
    SCOPED_TRACE("input " + std::to_string(i) + " of " + target.name);
    ASSERT_NO_THROW(run(target, input)) << testing::PrintToString(input);
  }
}

std::vector<const Target*> all() {
  std::vector<const Target*> found;
  for (const Target& target : targets()) found.push_back(&target);
  return found;
}

INSTANTIATE_TEST_SUITE_P(Readers, Fuzz, testing::ValuesIn(all()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace lowbit::fuzz
