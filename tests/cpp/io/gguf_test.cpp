// Every rule of docs/security.md about GGUF files has its line in `GgufRefused` below. What blocks
// mean is compared with the gguf package in tests/python/test_gguf_types.py.
#include "lowbit/gguf.h"

#include <bit>
#include <filesystem>
#include <new>
#include <numeric>

#include "support.h"

namespace lowbit::test {
namespace {

// Little-endian pieces of a file.
template <typename T>
std::string number(T value) {
  const auto bits = static_cast<std::uint64_t>(value);
  std::string bytes;
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    bytes.push_back(static_cast<char>(bits >> (8 * i) & 0xff));
  }
  return bytes;
}
std::string u32(std::uint32_t value) {
  return number(value);
}
std::string number16(std::uint32_t value) {
  return number(static_cast<std::uint16_t>(value));
}
std::string u64(std::uint64_t value) {
  return number(value);
}
std::string text(std::string_view value) {
  return u64(value.size()) + std::string(value);
}
std::string entry(std::string_view key, std::uint32_t type, const std::string& value) {
  return text(key) + u32(type) + value;
}
std::string tensor(std::string_view name, std::vector<std::uint64_t> dims, std::uint32_t type,
                   std::uint64_t offset) {
  std::string bytes = text(name) + u32(static_cast<std::uint32_t>(dims.size()));
  for (const std::uint64_t dim : dims) bytes += u64(dim);  // the innermost first
  return bytes + u32(type) + u64(offset);
}

struct Pieces {
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::vector<std::string> entries = {entry("general.architecture", 8, text("llama"))};
  std::vector<std::string> tensors = {tensor("a", {32, 2}, 2, 0), tensor("b", {5}, 0, 64)};
  std::uint64_t data = 64 + 20;
  std::uint64_t alignment = 32;

  std::string bytes() const {
    std::string head = magic + u32(version) + u64(tensors.size()) + u64(entries.size());
    for (const auto* list : {&entries, &tensors}) {
      for (const std::string& piece : *list) head += piece;
    }
    head.append((alignment - head.size() % alignment) % alignment, '\0');
    return head + std::string(data, 'x');
  }
};

GgufHeader parse(const std::string& bytes) {
  return parse_gguf_header(std::as_bytes(std::span(bytes)), bytes.size(), "some.gguf");
}

template <typename Change>
std::string with(const Change& change) {
  Pieces pieces;
  change(pieces);
  return pieces.bytes();
}
std::string with_entry(const std::string& piece) {
  return with([&](Pieces& p) { p.entries.push_back(piece); });
}
std::string with_tensor(const std::string& piece, std::uint64_t data = 64) {
  return with([&](Pieces& p) {
    p.tensors = {piece};
    p.data = data;
  });
}

TEST(Gguf, ReadsMetadataAndTensors) {
  Pieces pieces;
  pieces.entries.push_back(entry("i8", 1, "\xfe"));
  pieces.entries.push_back(entry("f32", 6, number(std::bit_cast<std::uint32_t>(0.5f))));
  pieces.entries.push_back(entry("yes", 7, "\x01"));
  pieces.entries.push_back(entry("u64", 10, u64(~std::uint64_t{0})));
  pieces.entries.push_back(
      entry("nested", 9, u32(9) + u64(2) + u32(8) + u64(1) + text("x") + u32(4) + u64(0)));
  const GgufHeader header = parse(pieces.bytes());
  EXPECT_EQ(std::get<std::string>(header.find("general.architecture")->value), "llama");
  EXPECT_EQ(std::get<std::int64_t>(header.find("i8")->value), -2);
  EXPECT_EQ(std::get<double>(header.find("f32")->value), 0.5);
  EXPECT_TRUE(std::get<bool>(header.find("yes")->value));
  EXPECT_EQ(std::get<std::uint64_t>(header.find("u64")->value), ~std::uint64_t{0});
  const auto& nested = std::get<GgufArray>(header.find("nested")->value);
  ASSERT_EQ(nested.values.size(), 2u);
  EXPECT_EQ(std::get<std::string>(std::get<GgufArray>(nested.values[0].value).values[0].value),
            "x");
  EXPECT_EQ(header.find("absent"), nullptr);
  ASSERT_EQ(header.tensors.size(), 2u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[0].shape, (std::vector<std::int64_t>{2, 32}));
  EXPECT_EQ(header.tensors[0].offset, header.bytes);
  EXPECT_EQ(header.tensors[0].bytes, 36u);
  EXPECT_EQ(header.tensors[1].offset, header.bytes + 64);
  EXPECT_EQ(header.bytes % 32, 0u);
  const std::string described = describe_gguf(header);
  EXPECT_NE(described.find("\"a\": {\"type\": \"Q4_0\", \"number\": 2, \"shape\": [2, 32], "
                           "\"bytes\": 36}"),
            std::string::npos)
      << described;
  EXPECT_NE(described.find("\"nested\": {\"array\": 9, \"length\": 2}"), std::string::npos);
}

TEST(Gguf, AnOutlineSaysTheSameInShort) {
  Pieces pieces;
  pieces.entries.push_back(entry("general.alignment", 4, u32(64)));
  pieces.entries.push_back(entry("llama.heads", 9, u32(5) + u64(3) + u32(1) + u32(2) + u32(-3)));
  pieces.entries.push_back(entry("llama.eps", 6, number(std::bit_cast<std::uint32_t>(0.5f))));
  pieces.entries.push_back(entry("yes", 7, "\x01"));
  pieces.entries.push_back(entry("tokenizer.ggml.tokens", 9,
                                 u32(8) + u64(4) + text("a") + text("b") + text("c") + text("d")));
  pieces.entries.push_back(entry("tokenizer.ggml.bos_token_id", 4, u32(7)));
  pieces.alignment = 64;
  const GgufHeader header = parse(pieces.bytes());
  const std::string outline = outline_gguf(header);
  const GgufHeader again = parse(outline);
  EXPECT_EQ(again.find("general.alignment"), nullptr);
  EXPECT_EQ(std::get<std::string>(again.find("general.architecture")->value), "llama");
  EXPECT_EQ(std::get<double>(again.find("llama.eps")->value), 0.5);
  EXPECT_TRUE(std::get<bool>(again.find("yes")->value));
  EXPECT_EQ(std::get<std::uint64_t>(again.find("tokenizer.ggml.bos_token_id")->value), 7u);
  const auto& heads = std::get<GgufArray>(again.find("llama.heads")->value);
  ASSERT_EQ(heads.values.size(), 3u);
  EXPECT_EQ(std::get<std::int64_t>(heads.values[2].value), -3);
  const auto& tokens = std::get<GgufArray>(again.find("tokenizer.ggml.tokens")->value);
  ASSERT_EQ(tokens.values.size(), kOutlineElements);
  EXPECT_EQ(std::get<std::string>(tokens.values[1].value), "b");
  ASSERT_EQ(again.tensors.size(), 2u);
  EXPECT_EQ(again.tensors[1].name, "b");
  EXPECT_EQ(outline_gguf(again), outline);
}

TEST(Gguf, TensorsMayBeListedInAnyOrderAndTheLastPaddingMayBeThere) {
  const GgufHeader header = parse(with([](Pieces& p) {
    std::swap(p.tensors[0], p.tensors[1]);
    p.data = 96;
  }));
  EXPECT_EQ(header.tensors[0].name, "a");
}

TEST(Gguf, AFileWithoutTensorsIsOne) {
  EXPECT_TRUE(parse(with([](Pieces& p) {
                p.tensors.clear();
                p.data = 0;
              })).tensors.empty());
}

TEST(Gguf, ObeysItsAlignment) {
  const GgufHeader header = parse(with([](Pieces& p) {
    p.entries.push_back(entry("general.alignment", 4, u32(128)));
    p.alignment = 128;
    p.tensors[1] = tensor("b", {5}, 0, 128);
    p.data = 148;
  }));
  EXPECT_EQ(header.alignment, 128u);
  EXPECT_EQ(header.tensors[1].offset, header.bytes + 128);
}

struct Case {
  const char* name;
  std::string bytes;
  const char* expected;  // a part of the error
  ErrorCode code = ErrorCode::kCorrupt;
};

std::string deep(int levels) {
  std::string value;
  for (int i = 0; i < levels; ++i) value += u32(9) + u64(1);
  return entry("deep", 9, value + u32(0) + u64(1) + "\x07");
}

std::string counts(std::uint64_t tensors, std::uint64_t entries) {
  return "GGUF" + u32(3) + u64(tensors) + u64(entries) + std::string(64, '\0');
}

class GgufRefused : public testing::TestWithParam<Case> {};

TEST_P(GgufRefused, WithFileAndReason) {
  Error error = caught([&] { parse(GetParam().bytes); });
  EXPECT_EQ(error.code(), GetParam().code);
  std::string got = error.what();
  EXPECT_TRUE(got.starts_with("some.gguf: ")) << got;
  EXPECT_NE(got.find(GetParam().expected), std::string::npos) << got;
}

INSTANTIATE_TEST_SUITE_P(
    Gguf, GgufRefused,
    testing::Values(
        Case{"empty", "", "is the file complete?"},
        Case{"another_magic", with([](Pieces& p) { p.magic = "GGML"; }), "is this a GGUF file?"},
        Case{"newer_version", with([](Pieces& p) { p.version = 4; }), "update this library",
             ErrorCode::kValue},
        Case{"older_version", with([](Pieces& p) { p.version = 1; }), "GGUF version 1",
             ErrorCode::kValue},
        Case{"big_endian", with([](Pieces& p) { p.version = 0x03000000; }), "big-endian",
             ErrorCode::kValue},
        Case{"tensor_count_cap", counts(kMaxTensors + 1, 0), "at most"},
        Case{"tensor_count_wraps", counts(~std::uint64_t{0}, 0), "at most"},
        Case{"entry_count_cap", counts(0, kMaxGgufEntries + 1), "at most"},
        Case{"counts_beyond_the_file", counts(10, 10).substr(0, 24), "is the file complete?"},
        Case{"key_longer_than_file", with_entry(u64(60000) + "short"), "is the file complete?"},
        Case{"key_cap", with_entry(u64(kMaxGgufName + 1) + std::string(70000, 'k')), "at most"},
        Case{"key_length_wraps", with_entry(u64(~std::uint64_t{0})), "at most"},
        Case{"empty_key", with_entry(entry("", 0, "x")), "is empty"},
        Case{"nul_in_key", with_entry(entry(std::string_view("a\0b", 3), 0, "x")), "NUL"},
        Case{"bad_utf8_key", with_entry(entry("\xff", 0, "x")), "not UTF-8"},
        Case{"bad_utf8_value", with_entry(entry("k", 8, text("\xc0\x80"))), "not UTF-8"},
        Case{"duplicate_key", with_entry(entry("general.architecture", 8, text("gpt2"))),
             "appears twice"},
        Case{"unknown_value_type", with_entry(entry("k", 13, "x")), "unknown value type 13"},
        Case{"unknown_element_type", with_entry(entry("k", 9, u32(13) + u64(0))),
             "unknown value type 13"},
        Case{"boolean", with_entry(entry("k", 7, "\x02")), "neither 0 nor 1"},
        Case{"string_value_cap", with_entry(entry("k", 8, u64(kMaxGgufString + 1))), "at most"},
        Case{"array_longer_than_file", with_entry(entry("k", 9, u32(10) + u64(1000))),
             "the file ends before"},
        Case{"array_length_wraps", with_entry(entry("k", 9, u32(8) + u64(~std::uint64_t{0}))),
             "the file ends before"},
        Case{"array_nesting", with_entry(deep(kMaxGgufDepth)), "nests arrays"},
        Case{"values_cap",
             with_entry(entry("k", 9,
                              u32(0) + u64(kMaxGgufValues) + std::string(kMaxGgufValues, 'x'))),
             "metadata values"},
        Case{"alignment_not_a_power", with_entry(entry("general.alignment", 4, u32(48))),
             "power of two"},
        Case{"alignment_zero", with_entry(entry("general.alignment", 4, u32(0))), "power of two"},
        Case{"alignment_cap", with_entry(entry("general.alignment", 4, u32(kMaxGgufAlignment * 2))),
             "power of two"},
        Case{"alignment_not_a_number", with_entry(entry("general.alignment", 8, text("32"))),
             "power of two"},
        Case{"rank_zero", with_tensor(tensor("t", {}, 0, 0)), "dimensions"},
        Case{"rank_cap", with_tensor(tensor("t", {1, 1, 1, 1, 1}, 0, 0)), "dimensions"},
        Case{"rank_huge", with_tensor(text("t") + u32(~0u) + std::string(64, '\1')), "dimensions"},
        Case{"size_zero", with_tensor(tensor("t", {0}, 0, 0)), "size 0"},
        Case{"size_product_overflows",
             with_tensor(tensor("t", {std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 0, 0)),
             "2^56"},
        Case{"size_product_wraps_to_small",
             with_tensor(tensor("t", {std::uint64_t{1} << 63, 2, 16}, 0, 0)), "2^56"},
        Case{"block_does_not_divide_a_row", with_tensor(tensor("t", {48, 2}, 2, 0)), "no multiple"},
        Case{"unknown_type", with_tensor(tensor("t", {32}, 4, 0)), "unknown type 4"},
        Case{"type_far_out", with_tensor(tensor("t", {32}, 0x80000002, 0)), "unknown type"},
        Case{"duplicate_tensor", with([](Pieces& p) { p.tensors[1] = tensor("a", {5}, 0, 64); }),
             "appears twice"},
        Case{"empty_tensor_name", with_tensor(tensor("", {16}, 0, 0)), "is empty"},
        Case{"bad_utf8_tensor_name", with_tensor(tensor("\xed\xa0\x80", {16}, 0, 0)), "not UTF-8"},
        Case{"offset_not_aligned", with_tensor(tensor("t", {16}, 0, 16), 80), "no multiple of"},
        Case{"gap_at_the_start", with_tensor(tensor("t", {8}, 0, 32)), "a gap"},
        Case{"gap", with([](Pieces& p) {
               p.tensors[1] = tensor("b", {5}, 0, 96);
               p.data = 116;
             }),
             "a gap"},
        Case{"overlap", with([](Pieces& p) { p.tensors[1] = tensor("b", {5}, 0, 32); }),
             "they overlap"},
        Case{"same_bytes_twice", with([](Pieces& p) { p.tensors[1] = tensor("b", {9}, 0, 0); }),
             "they overlap"},
        Case{"offset_wraps", with_tensor(tensor("t", {16}, 0, ~std::uint64_t{31})), "a gap"},
        Case{"longer_than_the_file", with_tensor(tensor("t", {17}, 0, 0)), "is the file complete?"},
        Case{"truncated_data", with([](Pieces& p) { p.data = 83; }), "is the file complete?"},
        Case{"no_data", with([](Pieces& p) { p.data = 0; }), "is the file complete?"},
        Case{"bytes_after_the_last", with([](Pieces& p) { p.data = 97; }),
             "1 bytes after the last tensor"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Gguf, EveryTruncationOfTheHeaderIsFound) {
  const std::string bytes = Pieces{}.bytes();
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_EQ(caught([&] { parse(bytes.substr(0, length)); }).code(), ErrorCode::kCorrupt)
        << length;
  }
}

// A model in three files, the first without tensors, as llama.cpp can split it.
Pieces shard(std::uint32_t number, std::uint32_t count = 3) {
  Pieces pieces;
  pieces.entries = {entry("split.no", 2, number16(number)),
                    entry("split.count", 2, number16(count)),
                    entry("split.tensors.count", 5, u32(2))};
  if (number == 0) pieces.entries.push_back(entry("general.architecture", 8, text("llama")));
  pieces.tensors.clear();
  pieces.data = number == 0 ? 0 : 36;
  if (number != 0) pieces.tensors = {tensor(number == 1 ? "a" : "b", {32, 2}, 2, 0)};
  return pieces;
}

std::string shard_name(int number) {
  return "m-0000" + std::to_string(number + 1) + "-of-00003.gguf";
}

struct Shards {
  TemporaryDirectory directory;
  Shards() {
    for (int i = 0; i < 3; ++i) put(i, shard(static_cast<std::uint32_t>(i)));
  }
  void put(int i, const Pieces& pieces) { write_file(directory / shard_name(i), pieces.bytes()); }
  GgufModel open(int i = 0) { return GgufModel::open(directory / shard_name(i)); }
};

TEST(Gguf, SeveralFilesAreOneModel) {
  Shards shards;
  const GgufModel model = shards.open();
  ASSERT_EQ(model.files().size(), 3u);
  EXPECT_EQ(std::get<std::string>(model.header().find("general.architecture")->value), "llama");
  EXPECT_EQ(model.header().metadata.size(), 1u);
  ASSERT_EQ(model.header().tensors.size(), 2u);
  EXPECT_EQ(model.header().tensors[1].name, "b");
  EXPECT_EQ(model.files()[2]->data(model.files()[2]->header().tensors[0]).size(), 36u);
  EXPECT_EQ(parse(outline_gguf(model.header())).tensors.size(), 2u);
  // One file is a model of one.
  write_file(shards.directory / "one.gguf", Pieces{}.bytes());
  EXPECT_EQ(GgufModel::open(shards.directory / "one.gguf").header().tensors.size(), 2u);
}

TEST(Gguf, FilesThatDoNotBelongTogetherAreRefused) {
  const auto expect = [](Shards& shards, ErrorCode code, const char* text, int first = 0) {
    const Error error = caught([&] { shards.open(first); });
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  };
  {
    Shards shards;
    expect(shards, ErrorCode::kValue, "is file 2 of 3; give the first", 1);
    std::filesystem::remove(shards.directory / shard_name(2));
    expect(shards, ErrorCode::kNotFound, "m-00003-of-00003.gguf");
    std::filesystem::create_directory(shards.directory / shard_name(2));
    expect(shards, ErrorCode::kIo, "regular file");
  }
  {
    Shards shards;
    shards.put(2, shard(1));
    expect(shards, ErrorCode::kCorrupt, "is not file 3 of 3 but 2 of 3");
    shards.put(2, shard(2, 4));
    expect(shards, ErrorCode::kCorrupt, "is not file 3 of 3 but 3 of 4");
    shards.put(2, Pieces{});
    expect(shards, ErrorCode::kCorrupt, "is not file 3 of 3 but 1 of 1");
    Pieces again = shard(2);
    again.tensors = shard(1).tensors;
    shards.put(2, again);
    expect(shards, ErrorCode::kCorrupt, "\"a\" is in a file before it already");
    Pieces fewer = shard(2);
    fewer.tensors.clear();
    fewer.data = 0;
    shards.put(2, fewer);
    expect(shards, ErrorCode::kCorrupt, "there are 2 tensors, its 3 files hold 1");
  }
  {
    Shards shards;
    shards.put(0, shard(0, 65535));
    expect(shards, ErrorCode::kValue, "does not end in -00001-of-65535.gguf");
    Pieces text_count = shard(0);
    text_count.entries[1] = entry("split.count", 8, text("3"));
    shards.put(0, text_count);
    expect(shards, ErrorCode::kCorrupt, "split.count is no number of at least 0");
    text_count.entries[1] = entry("split.count", 5, u32(~0u));
    shards.put(0, text_count);
    expect(shards, ErrorCode::kCorrupt, "split.count is no number of at least 0");
  }
}

TEST(Gguf, OpensOnlyRegularFilesAndMapsOrReadsThem) {
  TemporaryDirectory directory;
  const std::string path = directory / "small.gguf";
  write_file(path, Pieces{}.bytes());
  for (const bool mmap : {true, false}) {
    const auto file = GgufFile::open(path, {.mmap = mmap});
    EXPECT_EQ(file->header().tensors.size(), 2u);
    EXPECT_EQ(file->data(file->header().tensors[1]).size(), 20u);
    EXPECT_EQ(file->data(file->header().tensors[1])[19], std::byte{'x'});
  }
  EXPECT_EQ(caught([&] { GgufFile::open(directory / "none.gguf"); }).code(), ErrorCode::kNotFound);
  EXPECT_THROW(GgufFile::open(directory.path()), Error);
  write_file(path, "GGUF");
  EXPECT_EQ(caught([&] { GgufFile::open(path); }).code(), ErrorCode::kCorrupt);
}

// ---- blocks ------------------------------------------------------------------------------------

TEST(GgmlTypes, AreAscendingAndTheirExactFormatsFitTheirBlocks) {
  std::int64_t before = -1;
  for (const GgmlTypeInfo& type : ggml_types()) {
    EXPECT_GT(std::int64_t{type.number}, before);
    before = type.number;
    EXPECT_EQ(find_ggml_type(type.number)->name, type.name);
    if (type.exact && format_info(*type.exact).grouped()) {
      EXPECT_EQ(type.exact_group_size, type.block_elems);
    }
  }
  EXPECT_EQ(find_ggml_type(4), nullptr);
  EXPECT_EQ(caught([] { ggml_type_info(4); }).code(), ErrorCode::kValue);
}

class Aligned {
 public:
  explicit Aligned(std::size_t bytes)
      : bytes_(bytes),
        data_(static_cast<std::byte*>(::operator new(bytes + 1, std::align_val_t(64)))) {}
  std::span<std::byte> span() { return {data_.get(), bytes_}; }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Delete> data_;
};

std::vector<std::byte> random_blocks(const GgmlTypeInfo& type, std::size_t blocks) {
  std::vector<std::byte> bytes(blocks * static_cast<std::size_t>(type.block_bytes));
  std::uint32_t state = 1;
  for (std::byte& byte : bytes) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<std::byte>(state >> 24 & 0x3b);  // no half of these is infinite
  }
  return bytes;
}

// Dequantized, packed and unpacked again: the same weights, and for what is written the same
// blocks.
TEST(GgmlTypes, PackWithoutRounding) {
  const std::vector<std::int64_t> rows = {3, 0, 19, 19, 7};
  for (const GgmlTypeInfo& type : ggml_types()) {
    if (!type.exact) continue;
    SCOPED_TRACE(type.name);
    const std::int64_t n = 20, k = 512;
    auto blocks = random_blocks(type, static_cast<std::size_t>(n * k / type.block_elems));
    if (type.number == 39) {  // powers within fp16's reach
      for (std::size_t b = 0; b < blocks.size(); b += 17) {
        blocks[b] = static_cast<std::byte>(60 + b / 17 % 30);
      }
    }
    const GgmlMatrix matrix{blocks, type.number, n, k};
    for (const auto& chosen : {std::vector<std::int64_t>{}, rows}) {
      const std::int64_t count = chosen.empty() ? n : std::ssize(chosen);
      const Layout layout = make_layout(*type.exact, count, k, type.exact_group_size);
      Aligned packed(static_cast<std::size_t>(layout.bytes()));
      const auto exponent = ggml_pack(matrix, chosen, layout, packed.span());
      ASSERT_TRUE(exponent.has_value());
      std::vector<float> expected(static_cast<std::size_t>(count * k)), got(expected.size());
      ggml_dequantize(matrix, chosen, {expected.data(), DType::kFloat32, count, k, k, 1});
      dequantize(packed.span(), layout, *exponent, {got.data(), DType::kFloat32, count, k, k, 1});
      EXPECT_EQ(got, expected);
      if (type.block_elems > 32) continue;
      std::vector<std::byte> again(static_cast<std::size_t>(n * k / type.block_elems) *
                                   static_cast<std::size_t>(type.block_bytes));
      if (!chosen.empty()) continue;
      ASSERT_TRUE(ggml_unpack(packed.span(), layout, *exponent, {}, type.number, again));
      std::vector<float> back(expected.size());
      ggml_dequantize({again, type.number, n, k}, {}, {back.data(), DType::kFloat32, n, k, k, 1});
      EXPECT_EQ(back, expected);
      if (type.number != 8) {  // Q8_0 may change the signs of a scale and its codes
        EXPECT_EQ(again, blocks);
      }
    }
  }
}

TEST(GgmlTypes, SayWhereNothingIsLossless) {
  const auto lossless = [](std::uint32_t type, std::vector<std::byte> blocks) {
    const GgmlTypeInfo& info = ggml_type_info(type);
    const auto k = static_cast<std::int64_t>(blocks.size()) / info.block_bytes * info.block_elems;
    const Layout layout = make_layout(*info.exact, 1, k, info.exact_group_size);
    Aligned packed(static_cast<std::size_t>(layout.bytes()));
    return ggml_pack({blocks, type, 1, k}, {}, layout, packed.span()).has_value();
  };
  std::vector<std::byte> q8(34), q4(18), half(64), mx(34);
  EXPECT_TRUE(lossless(8, q8));
  q8[5] = std::byte{0x80};
  EXPECT_FALSE(lossless(8, q8));  // -128
  EXPECT_TRUE(lossless(2, q4));
  q4[1] = std::byte{0x7c};
  EXPECT_FALSE(lossless(2, q4));  // an infinite scale
  EXPECT_TRUE(lossless(1, half));
  half[1] = std::byte{0x7e};
  EXPECT_FALSE(lossless(1, half));  // a NaN
  mx[0] = std::byte{127 - 20}, mx[1] = std::byte{1};
  mx[17] = std::byte{127 + 19}, mx[18] = std::byte{1};
  EXPECT_TRUE(lossless(39, mx));  // 39 octaves
  mx[17] = std::byte{127 + 20};
  EXPECT_FALSE(lossless(39, mx));
  mx[18] = std::byte{0};  // the block is zero: its scale does not matter
  EXPECT_TRUE(lossless(39, mx));
  mx[0] = std::byte{255};
  EXPECT_FALSE(lossless(39, mx));  // weights beyond float32
}

TEST(GgmlTypes, WriteOnlyWhatIsLossless) {
  const Layout fp4 = make_layout(Format::kFp4, 1, 64, 64);
  Aligned packed(static_cast<std::size_t>(fp4.bytes()));
  std::vector<float> weights(64);
  std::iota(weights.begin(), weights.end(), 1.0f);
  const MatrixView view{weights.data(), DType::kFloat32, 1, 64, 64, 1};
  std::vector<std::byte> blocks(34);
  int exponent = quantize(view, fp4, packed.span());  // scale 64 / 6
  EXPECT_FALSE(ggml_unpack(packed.span(), fp4, exponent, {}, 39, blocks));
  weights[63] = 48;
  for (float& w : weights) w = std::min(w, 48.0f);
  exponent = quantize(view, fp4, packed.span());  // scale 8, for both blocks of the group
  ASSERT_TRUE(ggml_unpack(packed.span(), fp4, exponent, {}, 39, blocks));
  EXPECT_EQ(blocks[0], std::byte{127 + 3});
  EXPECT_EQ(blocks[17], std::byte{127 + 3});

  const Layout int4 = make_layout(Format::kSymInt4, 1, 32, 32);
  Aligned small(static_cast<std::size_t>(int4.bytes()));
  quantize({weights.data(), DType::kFloat32, 1, 32, 32, 1}, int4, small.span());
  std::vector<std::byte> q4(18);
  EXPECT_TRUE(ggml_unpack(small.span(), int4, -2, {}, 2, q4));
  EXPECT_FALSE(ggml_unpack(small.span(), int4, -40, {}, 2, q4));
  EXPECT_EQ(caught([&] { ggml_unpack(small.span(), int4, 0, {}, 35, q4); }).code(),
            ErrorCode::kValue);
  EXPECT_EQ(caught([&] { ggml_unpack(small.span(), int4, 0, {}, 3, q4); }).code(),
            ErrorCode::kValue);
}

TEST(GgmlTypes, RefuseSizesThatDoNotGoTogether) {
  std::vector<std::byte> blocks(36);
  std::vector<float> out(64);
  const MutableMatrixView view{out.data(), DType::kFloat32, 2, 32, 32, 1};
  ggml_dequantize({blocks, 2, 2, 32}, {}, view);
  const std::vector<std::int64_t> beyond = {0, 2};
  for (const auto& [matrix, rows] :
       {std::pair{GgmlMatrix{blocks, 2, 2, 33}, std::span<const std::int64_t>{}},
        {GgmlMatrix{blocks, 2, 3, 32}, {}},
        {GgmlMatrix{blocks, 2, -2, 32}, {}},
        {GgmlMatrix{blocks, 2, std::int64_t{1} << 60, 32}, {}},
        {GgmlMatrix{blocks, 4, 2, 32}, {}},
        {GgmlMatrix{blocks, 24, 1, 36}, {}},
        {GgmlMatrix{blocks, 2, 2, 32}, beyond}}) {
    EXPECT_EQ(caught([&] { ggml_dequantize(matrix, rows, view); }).code(), ErrorCode::kValue);
  }
}

}  // namespace
}  // namespace lowbit::test
