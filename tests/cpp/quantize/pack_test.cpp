// Codes and scales in and out. Bytes are compared with quantize()'s and with the reference's own
// reading of a packed matrix, which share no code with pack.cpp.
#include <gtest/gtest.h>

#include <string>

#include "lowbit/error.h"
#include "lowbit/pack.h"
#include "quantize/matrices.h"
#include "reference/reference.h"

namespace lowbit::testing {
namespace {

struct Parts {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> scales, minima;
  std::vector<float> row_scales;

  explicit Parts(const Layout& layout) {
    const FormatInfo& info = format_info(layout.format);
    const auto groups = static_cast<std::size_t>(layout.n * layout.groups);
    codes.resize(static_cast<std::size_t>(layout.n * layout.k));
    if (info.grouped()) scales.resize(groups);
    if (info.scale_kind == ScaleKind::kGroupMinimum) minima.resize(groups);
    if (info.scale_kind == ScaleKind::kRow) row_scales.resize(static_cast<std::size_t>(layout.n));
  }
  CodesView in() const { return {codes, scales, minima, row_scales}; }
  MutableCodesView out() { return {codes, scales, minima, row_scales}; }
};

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (const FormatInfo& info : formats()) {
    if (info.scale_kind == ScaleKind::kNone) continue;
    for (const int group_size : kGroupSizes) {
      if (!info.grouped() && group_size != 32) continue;
      for (const auto& [n, k] : {std::pair{17, 148}, {1, 1}, {32, 352}, {0, 40}, {3, 0}}) {
        all.push_back(make_layout(info.format, n, k, info.grouped() ? group_size : 0));
      }
    }
  }
  return all;
}

std::string name_of(const Layout& layout) {
  return std::string(format_info(layout.format).name) + " g" + std::to_string(layout.group_size) +
         " " + std::to_string(layout.n) + "x" + std::to_string(layout.k);
}

void quantize_unpack_pack(const Layout& layout) {
  Matrix weight(DType::kFloat32, layout.n, layout.k);
  Random random(7);
  weight.fill([&](std::int64_t, std::int64_t) { return random.weight(); });
  PackedBuffer packed(layout), again(layout, 0x5a);
  quantize(weight.view(), layout, packed.span());
  Parts parts(layout);
  unpack_codes(packed.span(), layout, parts.out());
  for (std::int64_t row = 0; row < layout.n; ++row) {
    for (std::int64_t k = 0; k < layout.k; ++k) {
      ASSERT_EQ(parts.codes[static_cast<std::size_t>(row * layout.k + k)],
                reference::code_at(packed.span().data() + row / 16 * layout.tile_bytes, layout,
                                   static_cast<int>(row % 16), k));
    }
  }
  pack_codes(parts.in(), layout, again.span());
  EXPECT_TRUE(packed == again);
}

TEST(PackCodes, ComeOutOfAQuantizedMatrixAndGoBackToTheSameBytes) {
  for (const Layout& layout : layouts()) {
    SCOPED_TRACE(name_of(layout));
    ASSERT_NO_FATAL_FAILURE(quantize_unpack_pack(layout));
  }
}

void pack_read_unpack(const Layout& layout) {
  const FormatInfo& info = format_info(layout.format);
  Random random(11);
  Parts parts(layout);
  for (std::uint8_t& code : parts.codes) {
    do {
      code = static_cast<std::uint8_t>(random.bits() >> 24 & ((1u << info.bits) - 1));
    } while ((info.name == "sym_int8" && code == 0) ||
             (info.code_kind == CodeKind::kFloat && (code & 0x7f) >= 0x7b));
  }
  for (auto* halves : {&parts.scales, &parts.minima}) {
    for (std::uint16_t& half : *halves) half = static_cast<std::uint16_t>(random.bits() >> 18 | 1);
  }
  for (float& scale : parts.row_scales) scale = static_cast<float>(random.weight());
  PackedBuffer packed(layout);
  pack_codes(parts.in(), layout, packed.span());
  for (std::int64_t row = 0; row < layout.n; ++row) {
    const std::byte* tile = packed.span().data() + row / 16 * layout.tile_bytes;
    for (std::int64_t k = 0; k < layout.k; ++k) {
      const auto group = static_cast<std::size_t>(
          row * layout.groups + (layout.group_size != 0 ? k / layout.group_size : 0));
      double expected =
          reference::code_value(info, parts.codes[static_cast<std::size_t>(row * layout.k + k)]);
      expected *= info.grouped() ? half_to_float(parts.scales[group])
                                 : parts.row_scales[static_cast<std::size_t>(row)];
      if (!parts.minima.empty()) expected += half_to_float(parts.minima[group]);
      ASSERT_EQ(reference::weight_at(tile, layout, 0, static_cast<int>(row % 16), k), expected)
          << row << ", " << k;
    }
  }
  Parts back(layout);
  unpack_codes(packed.span(), layout, back.out());
  EXPECT_EQ(back.codes, parts.codes);
  EXPECT_EQ(back.scales, parts.scales);
  EXPECT_EQ(back.minima, parts.minima);
  EXPECT_EQ(back.row_scales, parts.row_scales);
}

TEST(PackCodes, MeanWhatTheReferenceReads) {
  for (const Layout& layout : layouts()) {
    SCOPED_TRACE(name_of(layout));
    ASSERT_NO_FATAL_FAILURE(pack_read_unpack(layout));
  }
}

void expect_refused(const Layout& layout, const Parts& parts, const char* expected) {
  PackedBuffer packed(layout);
  try {
    pack_codes(parts.in(), layout, packed.span());
    FAIL() << "expected an error with: " << expected;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kValue);
    EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
  }
}

TEST(PackCodes, RefusesCodesThatTheFormatDoesNotHave) {
  struct Case {
    Format format;
    std::uint8_t code;
  };
  for (const Case c :
       {Case{Format::kSymInt4, 16}, Case{Format::kAsymInt4, 255}, Case{Format::kSymInt5, 32},
        Case{Format::kNf3, 8}, Case{Format::kFp4, 16}, Case{Format::kSymInt8, 0},
        Case{Format::kFp8E4M3, 0xff}, Case{Format::kFp8E4M3, 0x7f}, Case{Format::kFp8E5M2, 0x7c},
        Case{Format::kFp8E5M2, 0xfe}}) {
    const Layout layout = make_layout(c.format, 20, 40);
    Parts parts(layout);
    std::fill(parts.codes.begin(), parts.codes.end(), std::uint8_t{1});
    parts.codes[18 * 40 + 39] = c.code;
    expect_refused(layout, parts, ("codes[18, 39] is " + std::to_string(c.code)).c_str());
  }
}

TEST(PackCodes, RefusesScalesThatAreNotFinite) {
  const Layout layout = make_layout(Format::kAsymInt4, 3, 96, 32);
  Parts parts(layout);
  parts.scales[7] = 0x7c00;
  expect_refused(layout, parts, "scales[2, 1] is infinite");
  parts.scales[7] = 0;
  parts.minima[1] = 0xfe00;
  expect_refused(layout, parts, "minima[0, 1] is nan");
  const Layout rows = make_layout(Format::kFp8E4M3, 3, 96);
  Parts by_row(rows);
  by_row.row_scales[2] = HUGE_VALF;
  expect_refused(rows, by_row, "row_scales[2]");
}

TEST(PackCodes, RefusesPartsThatDoNotFit) {
  const Layout layout = make_layout(Format::kSymInt4, 3, 96, 32);
  Parts parts(layout);
  parts.codes.pop_back();
  expect_refused(layout, parts, "expected 288 codes");
  parts = Parts(layout);
  parts.scales.push_back(0);
  expect_refused(layout, parts, "expected 9 scales");
  parts = Parts(layout);
  parts.minima.resize(9);
  expect_refused(layout, parts, "expected 0 minima");
  const Layout half = make_layout(Format::kFp16, 3, 96);
  expect_refused(half, Parts(half), "are the weights themselves");
  PackedBuffer small(make_layout(Format::kSymInt4, 3, 64, 32));
  EXPECT_THROW(pack_codes(Parts(layout).in(), layout, small.span()), Error);
  Parts out(layout);
  EXPECT_THROW(unpack_codes(small.span(), layout, out.out()), Error);
}

}  // namespace
}  // namespace lowbit::testing
