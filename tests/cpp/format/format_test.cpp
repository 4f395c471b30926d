// The format table, names, and the layout against an independent packer.
#include "lowbit/format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "lowbit/error.h"
#include "lowbit/threads.h"
#include "reference/reference.h"

namespace lowbit {
namespace {

using ::testing::HasSubstr;

template <typename Function>
std::string value_error(const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kValue);
    return error.what();
  }
  ADD_FAILURE() << "expected an error";
  return "";
}

TEST(Formats, TheThirteenNamesInDocumentedOrder) {
  const std::vector<std::string_view> documented = {
      "sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "nf3", "nf4",
      "fp4",      "fp8",       "fp8_e4m3", "fp8_e5m2",  "fp16",     "bf16"};
  EXPECT_EQ(std::vector(format_names().begin(), format_names().end()), documented);
  std::set<Format> parsed;
  for (std::string_view name : documented) parsed.insert(parse_format(name));
  EXPECT_EQ(parsed.size(), static_cast<std::size_t>(kFormatCount));
  EXPECT_EQ(parse_format("fp8"), parse_format("fp8_e5m2"));
  for (const FormatInfo& info : formats()) {
    EXPECT_EQ(parse_format(info.name), info.format);
    EXPECT_EQ(&format_info(info.format), &info);
  }
}

TEST(Formats, UnknownNamesListAllThirteen) {
  for (const char* name : {"", "int4", "SYM_INT4", "fp8 ", "nf44"}) {
    const std::string text = value_error([&] { parse_format(name); });
    EXPECT_THAT(text, HasSubstr("'" + std::string(name) + "'"));
    for (std::string_view known : format_names()) {
      EXPECT_THAT(text, HasSubstr("'" + std::string(known) + "'"));
    }
  }
  EXPECT_THAT(value_error([] { format_info(static_cast<Format>(12)); }), HasSubstr("got 12"));
}

// The table's bits per weight, as the documentation promises them at group size 64.
TEST(Formats, BitsPerWeight) {
  const std::map<std::string_view, double> promised = {
      {"sym_int4", 4.25}, {"asym_int4", 4.5}, {"sym_int5", 5.25}, {"asym_int5", 5.5},
      {"sym_int8", 8.25}, {"nf4", 4.25},      {"nf3", 3.25},      {"fp4", 4.25},
      {"fp16", 16},       {"bf16", 16}};
  for (const auto& [name, bits] : promised) {
    const Layout layout = make_layout(parse_format(name), 4096, 4096);
    EXPECT_EQ(8.0 * static_cast<double>(layout.bytes()) / (4096.0 * 4096.0), bits) << name;
  }
  for (Format format : {Format::kFp8E4M3, Format::kFp8E5M2}) {
    EXPECT_EQ(make_layout(format, 4096, 4096).bytes(), 4096 * 4096 + 4096 * 4);
  }
}

TEST(Formats, CodesFitTheirBitsAndPaddingDecodesToZero) {
  for (const FormatInfo& info : formats()) {
    EXPECT_LT(info.code_max, 1 << info.bits);
    EXPECT_LE(info.code_min, info.code_max);
    EXPECT_EQ(reference::code_value(info, info.padding_code), 0) << info.name;
    if (info.code_kind == CodeKind::kTable) {
      EXPECT_EQ(info.codebook.size(), std::size_t{1} << info.bits);
    }
    double largest = 0;
    for (int code = info.code_min; code <= info.code_max; ++code) {
      const double value = reference::code_value(info, static_cast<std::uint32_t>(code));
      if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
    }
    EXPECT_EQ(largest, static_cast<double>(info.value_max)) << info.name;
  }
}

TEST(Errors, EveryCodeHasItsOwnWord) {
  std::set<std::string> names;
  for (ErrorCode code : {ErrorCode::kValue, ErrorCode::kType, ErrorCode::kIo, ErrorCode::kNotFound,
                         ErrorCode::kCorrupt, ErrorCode::kResource}) {
    names.insert(error_code_name(code));
  }
  EXPECT_EQ(names,
            (std::set<std::string>{"value", "type", "io", "not_found", "corrupt", "resource"}));
}

TEST(Threads, TheSerialOneRunsEveryTaskOnceInOrder) {
  std::vector<std::int64_t> ran;
  serial_threads().run(5, [&](std::int64_t i) { ran.push_back(i); });
  EXPECT_EQ(ran, (std::vector<std::int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(serial_threads().count(), 1);
}

// Writes the stream of one row tile from beginning to end, following the drawings and using none of
// the library's offsets: whatever comes next is appended.
class StreamPacker {
 public:
  StreamPacker(const FormatInfo& info, std::int64_t k, int group)
      : info_(info), k_padded_((k + 31) / 32 * 32), group_(info.grouped() ? group : k_padded_) {}

  // code(r, k) for all padded inputs; scale(r, g) and minimum(r, g) are raw bits.
  template <typename Code, typename Scale, typename Minimum>
  std::vector<unsigned char> pack(Code code, Scale scale, Minimum minimum) {
    bytes_.clear();
    const std::int64_t groups = info_.grouped() ? (k_padded_ + group_ - 1) / group_ : 1;
    if (info_.scale_kind == ScaleKind::kRow) {
      for (int r = 0; r < 16; ++r) append(scale(r, 0), 4);
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      codes_offsets.push_back(static_cast<std::int64_t>(bytes_.size()));
      const std::int64_t begin = g * group_;
      pack_codes(begin, std::min(group_, k_padded_ - begin), code);
      if (info_.scale_kind == ScaleKind::kGroup && (g % 2 == 1 || g + 1 == groups)) {
        for (std::int64_t half = g - g % 2; half < g - g % 2 + 2; ++half) {
          scales_offsets.push_back(static_cast<std::int64_t>(bytes_.size()));
          for (int r = 0; r < 16; ++r) append(half < groups ? scale(r, half) : 0, 2);
        }
      }
      if (info_.scale_kind == ScaleKind::kGroupMinimum) {
        scales_offsets.push_back(static_cast<std::int64_t>(bytes_.size()));
        for (int r = 0; r < 16; ++r) append(scale(r, g), 2);
        for (int r = 0; r < 16; ++r) append(minimum(r, g), 2);
      }
    }
    return bytes_;
  }

  std::vector<std::int64_t> codes_offsets, scales_offsets;

 private:
  void append(std::uint32_t value, int count) {
    for (int i = 0; i < count; ++i) bytes_.push_back(static_cast<unsigned char>(value >> (8 * i)));
  }

  template <typename Code>
  void pack_codes(std::int64_t begin, std::int64_t inputs, Code code) {
    if (info_.bits == 16) {
      for (std::int64_t k = 0; k < inputs; k += 2) {
        for (int r = 0; r < 16; ++r) {
          append(code(r, begin + k), 2);
          append(code(r, begin + k + 1), 2);
        }
      }
      return;
    }
    // Low bits: `parts` inputs, 4 apart, share a byte.
    const int low_bits = info_.bits == 3 ? 2 : info_.bits == 8 ? 8 : 4;
    const int parts = 8 / low_bits;
    for (std::int64_t k = 0; k < inputs; k += 4 * parts) {
      for (int r = 0; r < 16; ++r) {
        for (int b = 0; b < 4; ++b) {
          std::uint32_t byte = 0;
          for (int p = 0; p < parts; ++p) {
            byte |= (code(r, begin + k + b + 4 * p) & ((1u << low_bits) - 1)) << (p * low_bits);
          }
          append(byte, 1);
        }
      }
    }
    if (info_.bits != 3 && info_.bits != 5) return;
    for (std::int64_t k = 0; k < inputs; k += 4) {
      for (int pair = 0; pair < 8; ++pair) {  // a byte holds two rows of four inputs
        std::uint32_t byte = 0;
        for (int bit = 0; bit < 8; ++bit) {
          byte |= (code(2 * pair + bit / 4, begin + k + bit % 4) >> low_bits & 1) << bit;
        }
        append(byte, 1);
      }
    }
  }

  const FormatInfo& info_;
  std::int64_t k_padded_, group_;
  std::vector<unsigned char> bytes_;
};

TEST(Layout, EveryOffsetAndEveryBitIsWhereAStreamOfTheDrawingPutsIt) {
  for (const FormatInfo& info : formats()) {
    const std::vector<int> groups =
        info.grouped() ? std::vector<int>{32, 64, 128, 256} : std::vector<int>{0};
    for (int group : groups) {
      for (std::int64_t k : {1, 31, 32, 33, 64, 65, 96, 160, 300, 512, 549}) {
        SCOPED_TRACE(::testing::Message() << info.name << " g" << group << " k" << k);
        const Layout layout = make_layout(info.format, 16, k, group);
        const auto code = [&](int r, std::int64_t i) {
          const auto mixed = static_cast<std::uint32_t>(r * 40503 + i * 30011 + r * i * 7);
          return mixed >> 3 & ((1u << info.bits) - 1);
        };
        const auto scale = [](int r, std::int64_t g) {
          return static_cast<std::uint32_t>(0x3000 + 16 * g + r);
        };
        const auto minimum = [](int r, std::int64_t g) {
          return static_cast<std::uint32_t>(0x5000 + 16 * g + r);
        };
        StreamPacker packer(info, k, group);
        const std::vector<unsigned char> stream = packer.pack(code, scale, minimum);
        ASSERT_EQ(layout.tile_bytes, static_cast<std::int64_t>(stream.size()));
        EXPECT_EQ(layout.tile_bytes % 64, 0);
        for (std::int64_t g = 0; g < layout.groups; ++g) {
          const auto at = static_cast<std::size_t>(g);
          ASSERT_EQ(layout.codes_offset(g), packer.codes_offsets[at]);
          EXPECT_EQ(layout.codes_offset(g) % 64, 0);
          if (info.grouped()) {
            ASSERT_EQ(layout.scales_offset(g), packer.scales_offsets[at]);
          }
          if (info.scale_kind == ScaleKind::kGroupMinimum) {
            ASSERT_EQ(layout.minima_offset(g), packer.scales_offsets[at] + 32);
          }
        }
        const auto* tile = reinterpret_cast<const std::byte*>(stream.data());
        for (int r = 0; r < 16; ++r) {
          for (std::int64_t i = 0; i < layout.k_padded; ++i) {
            ASSERT_EQ(reference::code_at(tile, layout, r, i), code(r, i)) << r << " " << i;
          }
        }
      }
    }
  }
}

TEST(Layout, SizesAddUp) {
  for (const FormatInfo& info : formats()) {
    for (std::int64_t n : {1, 15, 16, 17, 100}) {
      for (std::int64_t k : {1, 32, 100, 1000}) {
        const Layout layout = make_layout(info.format, n, k);
        EXPECT_EQ(layout.tiles, (n + 15) / 16);
        EXPECT_EQ(layout.k_padded % 32, 0);
        EXPECT_GE(layout.k_padded, k);
        EXPECT_LT(layout.k_padded, k + 32);
        EXPECT_EQ(layout.bytes(), layout.tiles * layout.tile_bytes);
        std::int64_t inputs = 0;
        for (std::int64_t g = 0; g < layout.groups; ++g) inputs += layout.group_inputs(g);
        EXPECT_EQ(inputs, layout.k_padded);
      }
    }
  }
}

TEST(Layout, WrongGroupsAndSizesAreRefused) {
  EXPECT_EQ(make_layout(Format::kNf4, 8, 8).group_size, 64);
  for (int group : {-64, 1, 16, 48, 512}) {
    EXPECT_THAT(value_error([&] { make_layout(Format::kNf4, 8, 8, group); }),
                HasSubstr("32, 64, 128 or 256, got " + std::to_string(group)));
  }
  for (Format format : {Format::kFp8E4M3, Format::kFp8E5M2, Format::kFp16, Format::kBf16}) {
    EXPECT_THAT(value_error([&] { make_layout(format, 8, 8, 64); }), HasSubstr("no groups"));
  }
  EXPECT_THAT(value_error([] { make_layout(Format::kNf4, -1, 8); }), HasSubstr("n=-1"));
  EXPECT_THAT(value_error([] { make_layout(Format::kNf4, 8, -8); }), HasSubstr("k=-8"));
}

TEST(Layout, SizesThatWouldOverflowAreRefused) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  for (const FormatInfo& info : formats()) {
    for (const auto& [n, k] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {kMost, 1},
             {1, kMost},
             {kMost, kMost},
             {std::int64_t{1} << 32, std::int64_t{1} << 32},
             {0, kMost},
             {kMost, 0}}) {
      EXPECT_THAT(value_error([&, n = n, k = k] { make_layout(info.format, n, k); }),
                  HasSubstr("overflows"));
    }
    // The largest that pass still have positive sizes.
    const Layout wide = make_layout(info.format, 1, std::int64_t{1} << 48);
    EXPECT_GT(wide.bytes(), 0);
    const Layout tall = make_layout(info.format, std::int64_t{1} << 48, 1);
    EXPECT_GT(tall.bytes(), 0);
  }
}

}  // namespace
}  // namespace lowbit
