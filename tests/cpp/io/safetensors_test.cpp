// Every rule of docs/security.md about a safetensors header has its line in `HeaderRefused` below.
#include "support.h"

namespace lowbit::test {
namespace {

FileHeader parse(const std::string& bytes) {
  return parse_file_header(std::as_bytes(std::span(bytes)), bytes.size(), "some.safetensors");
}

TEST(Safetensors, ReadsTensorsInTheOrderOfTheirBytes) {
  FileHeader header = parse(tensor_file(
      R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[3,11]},"__metadata__":{"k":"v"},)"
      R"("a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"e":{"dtype":"I64","shape":[0,7],"data_offsets":[3,3]}}  )",
      std::string(11, 'x')));
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[1].name, "e");
  EXPECT_EQ(header.tensors[2].name, "b");
  EXPECT_EQ(header.tensors[2].dtype, FileDType::kF32);
  EXPECT_EQ(header.tensors[2].shape, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(header.tensors[2].offset, header.bytes + 3);
  EXPECT_EQ(header.tensors[2].bytes, 8u);
  EXPECT_EQ(header.metadata.at(0).second, "v");
}

TEST(Safetensors, AFileWithoutTensorsIsOne) {
  EXPECT_TRUE(parse(tensor_file("{}")).tensors.empty());
}

TEST(Safetensors, ReadsEveryDtypeThatItWrites) {
  for (const FileDTypeInfo& info : file_dtypes()) {
    FileTensor tensor{"t", info.dtype, {3}, 0, static_cast<std::uint64_t>(3 * info.bytes)};
    FileHeader header = parse(make_file_header({{tensor}}) + std::string(tensor.bytes, 'x'));
    EXPECT_EQ(header.tensors.at(0).dtype, info.dtype);
    EXPECT_EQ(header.bytes % 4096, 0u);
  }
}

struct Case {
  const char* name;
  std::string bytes;
  const char* expected;  // a part of the error
};

std::string with(const std::string& entry, std::size_t data = 4) {
  return tensor_file("{\"t\":" + entry + "}", std::string(data, 'x'));
}

std::string length_only(std::uint64_t length, const std::string& rest) {
  std::string bytes = tensor_file("");
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i));
  return bytes + rest;
}

class HeaderRefused : public testing::TestWithParam<Case> {};

TEST_P(HeaderRefused, WithFileAndReason) {
  Error error = caught([&] { parse(GetParam().bytes); });
  EXPECT_EQ(error.code(), ErrorCode::kCorrupt);
  std::string text = error.what();
  EXPECT_TRUE(text.starts_with("some.safetensors: ")) << text;
  EXPECT_NE(text.find(GetParam().expected), std::string::npos) << text;
}

INSTANTIATE_TEST_SUITE_P(
    Safetensors, HeaderRefused,
    testing::Values(
        Case{"empty", "", "too few"}, Case{"seven_bytes", "1234567", "too few"},
        Case{"header_longer_than_file", length_only(100, "{}"), "the file ends after 2"},
        Case{"header_length_cap", length_only(kMaxHeaderBytes + 1, "{}"), "at most"},
        Case{"header_length_wraps", length_only(~std::uint64_t{0}, "{}"), "at most"},
        Case{"header_length_zero", length_only(0, ""), "does not start with '{'"},
        Case{"leading_space", tensor_file(" {}"), "does not start with '{'"},
        Case{"header_array", tensor_file("[]"), "does not start with '{'"},
        Case{"not_json", tensor_file("{]"), "not valid JSON"},
        Case{"duplicate_tensor",
             tensor_file(R"({"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                         R"("t":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                         "xxxx"),
             "appears twice"},
        Case{"bad_utf8", tensor_file("{\"\xff\":{}}"), "not UTF-8"},
        Case{"empty_name",
             tensor_file(R"({"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", "x"),
             "needs a name"},
        Case{"nul_in_name",
             tensor_file(R"({"a\u0000b":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", "x"),
             "NUL"},
        Case{"entry_not_object", with("[]"), "expected an object"},
        Case{"no_dtype", with(R"({"shape":[4],"data_offsets":[0,4]})"), "has no 'dtype'"},
        Case{"no_shape", with(R"({"dtype":"U8","data_offsets":[0,4]})"), "has no 'shape'"},
        Case{"no_offsets", with(R"({"dtype":"U8","shape":[4]})"), "has no 'data_offsets'"},
        Case{"unknown_key", with(R"({"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1})"),
             "unknown key"},
        Case{"unknown_dtype", with(R"({"dtype":"F4","shape":[4],"data_offsets":[0,4]})"),
             "unknown dtype"},
        Case{"dtype_not_string", with(R"({"dtype":8,"shape":[4],"data_offsets":[0,4]})"),
             "not a string"},
        Case{"shape_not_array", with(R"({"dtype":"U8","shape":4,"data_offsets":[0,4]})"),
             "not an array"},
        Case{"negative_size", with(R"({"dtype":"U8","shape":[-4],"data_offsets":[0,4]})"),
             "at least 0"},
        Case{"fractional_size", with(R"({"dtype":"U8","shape":[4.0],"data_offsets":[0,4]})"),
             "at least 0"},
        Case{
            "rank_cap",
            with(
                R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,4],"data_offsets":[0,4]})"),
            "dimensions"},
        Case{"size_product_overflows",
             with(R"({"dtype":"U8","shape":[4294967296,4294967296,4],"data_offsets":[0,4]})"),
             "leaves 63 bits"},
        // 2^32 x 2^32 wraps to 0 bytes in 64-bit arithmetic: "fits" without a check.
        Case{"size_product_wraps_to_zero",
             with(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0),
             "leaves 63 bits"},
        Case{"empty_with_huge_sizes",
             with(R"({"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]})", 0),
             "leaves 63 bits"},
        Case{"offsets_not_array", with(R"({"dtype":"U8","shape":[4],"data_offsets":4})"),
             "two integers"},
        Case{"three_offsets", with(R"({"dtype":"U8","shape":[4],"data_offsets":[0,4,4]})"),
             "two integers"},
        Case{"offset_beyond_64_bits",
             with(R"({"dtype":"U8","shape":[4],"data_offsets":[0,18446744073709551620]})"),
             "64 bits"},
        Case{"negative_offset", with(R"({"dtype":"U8","shape":[4],"data_offsets":[-4,0]})"),
             "no range"},
        Case{"reversed_offsets", with(R"({"dtype":"U8","shape":[4],"data_offsets":[4,0]})"),
             "no range"},
        Case{"offset_past_the_end", with(R"({"dtype":"U8","shape":[5],"data_offsets":[0,5]})"),
             "holds 4 bytes"},
        Case{"fewer_bytes_than_shape", with(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"),
             "needs 8 bytes"},
        Case{"more_bytes_than_shape", with(R"({"dtype":"U8","shape":[2],"data_offsets":[0,4]})"),
             "needs 2 bytes"},
        Case{"overlap",
             tensor_file(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                         R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                         "xxxx"),
             "they overlap"},
        Case{"same_bytes_twice",
             tensor_file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                         R"("b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
                         "xxxx"),
             "they overlap"},
        Case{"gap",
             tensor_file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                         "xxxx"),
             "a gap"},
        Case{"gap_at_the_start", with(R"({"dtype":"U8","shape":[3],"data_offsets":[1,4]})"),
             "a gap"},
        Case{"bytes_after_the_last", with(R"({"dtype":"U8","shape":[3],"data_offsets":[0,3]})"),
             "after the last tensor"},
        Case{"metadata_not_object", tensor_file(R"({"__metadata__":[]})"), "not an object"},
        Case{"metadata_not_strings", tensor_file(R"({"__metadata__":{"a":1}})"), "strings only"}),
    [](const auto& info) { return info.param.name; });

TEST(Safetensors, OpensOnlyRegularFiles) {
  TemporaryDirectory directory;
  Error folder = caught([&] { TensorFile::open(directory.path()); });
  EXPECT_EQ(folder.code(), ErrorCode::kIo);
  EXPECT_NE(std::string(folder.what()).find("a directory"), std::string::npos) << folder.what();
  EXPECT_EQ(caught([&] { TensorFile::open(directory / "nothing"); }).code(), ErrorCode::kNotFound);
#ifndef _WIN32
  // Opening must not wait for a writer.
  ASSERT_EQ(std::system(("mkfifo " + (directory / "pipe")).c_str()), 0);
  EXPECT_EQ(caught([&] { TensorFile::open(directory / "pipe"); }).code(), ErrorCode::kIo);
  EXPECT_EQ(caught([&] { TensorFile::open("/dev/zero"); }).code(), ErrorCode::kIo);
  // A link of the user's own is followed: hub caches are made of them.
  write_file(directory / "real", tensor_file("{}"));
  std::filesystem::create_symlink("real", directory / "link");
  EXPECT_NO_THROW(TensorFile::open(directory / "link"));
#endif
}

TEST(Safetensors, MappedAndReadAreTheSame) {
  TemporaryDirectory directory;
  std::string data(100'000, '\0');
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 7);
  FileTensor tensor{"t", FileDType::kU8, {100'000}, 0, 100'000};
  write_file(directory / "f", make_file_header({{tensor}}) + data);
  for (bool mmap : {true, false}) {
    auto file = TensorFile::open(directory / "f", {.mmap = mmap});
    std::span<std::byte> bytes = file->data(*file->find("t"));
    EXPECT_EQ(std::string(reinterpret_cast<char*>(bytes.data()), bytes.size()), data);
    bytes[0] = std::byte{99};  // private: the file does not change
  }
  EXPECT_EQ(read_file(directory / "f").substr(4096), data);
}

}  // namespace
}  // namespace lowbit::test
