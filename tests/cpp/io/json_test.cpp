#include "io/json.h"

#include "support.h"

namespace lowbit::test {
namespace {

TEST(Json, ReadsEveryKindOfValue) {
  json::Value v =
      json::parse(" {\"a\": [1, -2, 0, true, false, null, \"x\", 1.5e2], \"b\": {}} ", "t");
  const json::Array& a = *v.find("a")->array();
  ASSERT_EQ(a.size(), 8u);
  EXPECT_EQ(*a[0].integer(), 1);
  EXPECT_EQ(*a[1].integer(), -2);
  EXPECT_EQ(*a[2].integer(), 0);
  EXPECT_TRUE(*a[3].boolean());
  EXPECT_FALSE(*a[4].boolean());
  EXPECT_TRUE(a[5].null());
  EXPECT_EQ(*a[6].string(), "x");
  EXPECT_EQ(*a[7].number(), 150.0);
  EXPECT_TRUE(v.find("b")->object()->empty());
  EXPECT_EQ(v.find("c"), nullptr);
}

TEST(Json, ReadsEscapes) {
  EXPECT_EQ(*json::parse(R"("\"\\\/\b\f\n\r\t\u0041\u00e9\u20ac\ud83d\ude00")", "t").string(),
            "\"\\/\b\f\n\r\tA\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
}

TEST(Json, KeepsIntegersExactToTheLastBit) {
  EXPECT_EQ(*json::parse("9223372036854775807", "t").integer(), INT64_MAX);
  EXPECT_EQ(*json::parse("-9223372036854775808", "t").integer(), INT64_MIN);
}

class JsonRefused : public testing::TestWithParam<std::pair<const char*, std::string>> {};

TEST_P(JsonRefused, WithFileAndPlace) {
  Error error = caught([&] { json::parse(GetParam().second, "some.file"); });
  EXPECT_EQ(error.code(), ErrorCode::kCorrupt);
  EXPECT_TRUE(std::string(error.what()).starts_with("some.file: ")) << error.what();
  EXPECT_NE(std::string(error.what()).find(" at byte "), std::string::npos) << error.what();
}

std::string nested(int depth) {
  return std::string(depth, '[') + std::string(depth, ']');
}

INSTANTIATE_TEST_SUITE_P(Json, JsonRefused,
                         testing::ValuesIn(std::vector<std::pair<const char*, std::string>>{
                             {"empty", ""},
                             {"two_values", "1 2"},
                             {"unclosed_object", "{\"a\": 1"},
                             {"unclosed_string", "\"abc"},
                             {"unclosed_escape", "\"abc\\"},
                             {"trailing_comma", "[1,]"},
                             {"no_colon", "{\"a\" 1}"},
                             {"bare_key", "{a: 1}"},
                             {"single_quotes", "'a'"},
                             {"duplicate_key", "{\"a\": 1, \"b\": 2, \"a\": 3}"},
                             {"duplicate_key_escaped", R"({"a": 1, "\u0061": 2})"},
                             {"leading_zero", "01"},
                             {"plus", "+1"},
                             {"bare_minus", "-"},
                             {"bare_point", "1."},
                             {"bare_exponent", "1e"},
                             {"nan", "NaN"},
                             {"infinity", "1e999"},
                             {"integer_beyond_64_bits", "9223372036854775808"},
                             {"control_character", std::string("\"a\nb\"")},
                             {"nul_in_text", std::string("\"a\0b\"", 5)},
                             {"unknown_escape", "\"\\x41\""},
                             {"short_unicode_escape", "\"\\u41\""},
                             {"signed_unicode_escape", "\"\\u-041\""},
                             {"lone_high_surrogate", "\"\\ud800\""},
                             {"high_surrogate_then_other", "\"\\ud800\\u0041\""},
                             {"lone_low_surrogate", "\"\\udc00\""},
                             {"overlong_utf8", "\"\xc0\xaf\""},
                             {"overlong_utf8_of_three", "\"\xe0\x80\xaf\""},
                             {"utf8_surrogate", "\"\xed\xa0\x80\""},
                             {"utf8_beyond_unicode", "\"\xf4\x90\x80\x80\""},
                             {"utf8_cut_off", "\"\xe2\x82\""},
                             {"stray_continuation", "\"\x80\""},
                             {"too_deep", nested(json::kMaxDepth + 2)},
                             {"very_deep", nested(1000000)},
                             {"comment", "[1] // one"},
                             {"byte_order_mark", "\xef\xbb\xbf{}"},
                         }),
                         [](const auto& info) { return info.param.first; });

TEST(Json, AcceptsDepthUpToItsCap) {
  EXPECT_NO_THROW(json::parse(nested(json::kMaxDepth), "t"));
}

TEST(Json, RefusesMoreValuesThanItsCap) {
  std::string text = "[0";
  for (std::int64_t i = 0; i < json::kMaxValues; ++i) text += ",0";
  Error error = caught([&] { json::parse(text + "]", "t"); });
  EXPECT_NE(std::string(error.what()).find("more than"), std::string::npos) << error.what();
}

TEST(Json, DumpIsCanonical) {
  std::string text = R"({"b":[1,true,null,"\u00e9\n\u0001"],"a":{}, "B":[]})";
  EXPECT_EQ(json::dump(json::parse(text, "t")),
            "{\"B\": [], \"a\": {}, \"b\": [1, true, null, \"\xc3\xa9\\n\\u0001\"]}");
}

TEST(Json, DumpRefusesFractions) {
  EXPECT_EQ(caught([] { json::dump(json::parse("1.5", "t")); }).code(), ErrorCode::kValue);
}

}  // namespace
}  // namespace lowbit::test
