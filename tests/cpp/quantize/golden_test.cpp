// Packed bytes are a file format: they may never move. tests/data/golden holds them;
// docs/formats.md says how the weights behind them are made, and a decoder in tests/python reads
// them from that page alone. LOWBIT_WRITE_GOLDEN=1 writes the files again, for a new format only.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>

#include "lowbit/linear.h"
#include "quantize/matrices.h"

namespace lowbit::testing {
namespace {

struct Case {
  const FormatInfo* info;
  bool extreme;  // weights so small or large that the exponent is not 0
  std::int64_t n, k;
  int power;  // weights are 16-bit integers times 2^power

  std::string name() const { return std::string(info->name) + (extreme ? "-exponent" : ""); }
};

// 17 rows: a second tile that is nearly all padding. 148 inputs at group size 64: a pair of groups,
// then a lone one that is short (32 inputs, 20 of them real).
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const FormatInfo& info : formats()) {
    all.push_back({&info, false, 17, info.grouped() ? 148 : 36, -18});
    const int power = info.format == Format::kBf16         ? 113   // the largest float32
                      : info.format == Format::kFp16       ? 4     // beyond 65504
                      : info.scale_kind == ScaleKind::kRow ? -149  // subnormal float32
                                                           : -40;  // scales below 2^-14
    all.push_back({&info, true, 2, 33, power});
  }
  return all;
}

// The formula of docs/formats.md.
Matrix weights(const Case& c) {
  Matrix weight(DType::kFloat32, c.n, c.k);
  std::uint32_t state = 12345u + static_cast<std::uint32_t>(c.info->format);
  weight.fill([&](std::int64_t i, std::int64_t j) {
    state = state * 1664525u + 1013904223u;
    const int value = i == 0 && j == 0 ? 32767 : static_cast<int>(state >> 16) - 32768;
    return std::ldexp(value, c.power);
  });
  return weight;
}

std::string path_of(const std::string& name) {
  return std::string(LOWBIT_TEST_DATA) + "/golden/" + name;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool writing() {
  return std::getenv("LOWBIT_WRITE_GOLDEN") != nullptr;
}

TEST(Golden, PackedBytesHaveNotMoved) {
  std::ostringstream index;
  index << "[\n";
  bool first = true;
  for (const Case& c : cases()) {
    Matrix weight = weights(c);
    const Layout layout = make_layout(c.info->format, c.n, c.k);
    PackedBuffer packed(layout), again(layout, 0x77);
    const int exponent = reference::quantize(weight.view(), layout, packed.span());
    EXPECT_EQ(exponent != 0, c.extreme) << c.name();
    EXPECT_EQ(quantize(weight.view(), layout, again.span()), exponent) << c.name();
    EXPECT_TRUE(again == packed) << c.name();
    const std::string bytes(reinterpret_cast<const char*>(packed.span().data()),
                            packed.span().size());
    if (writing()) std::ofstream(path_of(c.name() + ".bin"), std::ios::binary) << bytes;
    const std::string golden = read_file(path_of(c.name() + ".bin"));
    ASSERT_EQ(bytes.size(), golden.size()) << c.name();
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      ASSERT_EQ(bytes[i], golden[i]) << c.name() << " at byte " << i;
    }
    index << (first ? "" : ",\n") << "  {\"file\": \"" << c.name() << ".bin\", \"low_bit\": \""
          << c.info->name << "\", \"seed\": " << 12345 + static_cast<int>(c.info->format)
          << ", \"power\": " << c.power << ", \"n\": " << c.n << ", \"k\": " << c.k
          << ", \"group_size\": " << layout.group_size << ", \"exponent\": " << exponent << "}";
    first = false;
  }
  index << "\n]\n";
  if (writing()) std::ofstream(path_of("index.json")) << index.str();
  EXPECT_EQ(index.str(), read_file(path_of("index.json")));
}

}  // namespace
}  // namespace lowbit::testing
