// The parts of the lowbit program that are functions: names, globs, checkpoints.
#include "cli/checkpoint.h"
#include "cli/names.h"
#include "support.h"

namespace lowbit::test {
namespace {

using namespace cli;

TEST(Names, TellRoles) {
  EXPECT_EQ(role_of("model.layers.0.self_attn.q_proj.weight"), Role::kLinear);
  EXPECT_EQ(role_of("lm_head.weight"), Role::kLinear);
  EXPECT_EQ(role_of("model.embed_tokens.weight"), Role::kEmbedding);
  EXPECT_EQ(role_of("h.0.attn.c_attn.weight"), Role::kUnknown);  // Conv1D: stored transposed
  EXPECT_EQ(role_of("q_proj.bias"), Role::kUnknown);
  EXPECT_EQ(role_of("q_proj"), Role::kUnknown);
  EXPECT_EQ(role_of("model.layers.0.self_attn.rotary_emb.inv_freq"), Role::kDropped);
}

TEST(Names, OfExpertsTellWhereTheyAreMerged) {
  EXPECT_EQ(parse_expert("model.layers.0.mlp.experts.7.up_proj.weight").target,
            "model.layers.0.mlp.experts.gate_up_proj");
  EXPECT_EQ(parse_expert("model.layers.0.block_sparse_moe.experts.11.w2.weight").target,
            "model.layers.0.mlp.experts.down_proj");
  for (const char* name :
       {"model.layers.0.mlp.experts.up_proj.weight", "mlp.experts.x.up_proj.weight",
        "a.mlp.experts.0.w1.weight", "a.mlp.experts.0.up_proj.bias", "experts.0.up_proj.weight"})
    EXPECT_EQ(parse_expert(name).target, "") << name;
  EXPECT_EQ(model_name("a.block_sparse_moe.gate.weight"), "a.mlp.gate.weight");
  EXPECT_EQ(model_name("a.mlp.gate.weight"), "a.mlp.gate.weight");
}

TEST(Names, SkipListsNameWholeSegmentsOrGlobs) {
  EXPECT_TRUE(name_matches("kv_proj", "layers.0.kv_proj.weight"));
  EXPECT_FALSE(name_matches("kv_proj", "layers.0.qkv_proj.weight"));
  EXPECT_TRUE(name_matches("layers.0", "model.layers.0.mlp.up_proj.weight"));
  EXPECT_FALSE(name_matches("layers.1", "model.layers.10.mlp.weight"));
  EXPECT_TRUE(name_matches("layers.*.mlp", "model.layers.3.mlp.up_proj"));
  EXPECT_TRUE(name_matches("*up_proj*", "model.layers.3.mlp.up_proj.weight"));
  EXPECT_FALSE(name_matches("up_proj.up_proj", "up_proj"));
}

TEST(Names, GlobsAreThoseOfPython) {
  struct {
    const char *pattern, *text;
    bool expected;
  } cases[] = {{"", "", true},
               {"", "a", false},
               {"*", "", true},
               {"a*b*c", "axxbyyc", true},
               {"a*b*c", "axxbyy", false},
               {"?", "", false},
               {"[a-c]x", "bx", true},
               {"[!a-c]x", "bx", false},
               {"[!a-c]x", "dx", true},
               {"[", "[", true},
               {"[]]", "]", true},
               {"**a", "bca", true},
               {"[abc", "[abc", true}};
  for (const auto& c : cases) EXPECT_EQ(glob_matches(c.pattern, c.text), c.expected) << c.pattern;
  // No exponential time.
  EXPECT_FALSE(glob_matches("*a*a*a*a*a*a*a*a*a*b", std::string(2000, 'a')));
}

std::string one_tensor(const std::string& name) {
  return tensor_file("{\"" + name + "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
                     "x");
}

TEST(Checkpoint, ReadsShardsByTheirIndex) {
  TemporaryDirectory directory;
  write_file(directory / "a.safetensors", one_tensor("ta"));
  write_file(directory / "b.safetensors", one_tensor("tb"));
  write_file(directory / "unused.safetensors", "not read");
  write_file(
      directory / "model.safetensors.index.json",
      R"({"metadata":{"total_size":2.0},"weight_map":{"tb":"b.safetensors","ta":"a.safetensors"}})");
  Checkpoint checkpoint = open_checkpoint(directory.path());
  ASSERT_EQ(checkpoint.tensors.size(), 2u);
  EXPECT_EQ(checkpoint.tensors[0].first->name, "ta");
}

TEST(Checkpoint, RefusesBadIndexes) {
  TemporaryDirectory directory;
  write_file(directory / "a.safetensors", one_tensor("ta"));
  write_file(directory / "b.safetensors", one_tensor("ta"));
  struct {
    std::string map;
    const char* expected;
  } cases[] = {
      {R"({"ta":"../a.safetensors"})", "in the same directory"},
      {R"({"ta":"/etc/passwd"})", "in the same directory"},
      {R"({"ta":"sub/a.safetensors"})", "in the same directory"},
      {R"({"ta":"sub\\a.safetensors"})", "in the same directory"},
      {R"({"ta":"C:a.safetensors"})", "in the same directory"},
      {R"({"ta":".a.safetensors"})", "in the same directory"},
      {R"({"ta":"a.safetensors\u0000"})", "in the same directory"},
      {R"({"ta":"model.bin"})", "in the same directory"},
      {R"({"ta":""})", "in the same directory"},
      {R"({"ta":3})", "not mapped to a file"},
      {R"([])", "weight_map"},
      {R"({"ta":"a.safetensors","tb":"a.safetensors"})", "does not have it"},
      {R"({"tb":"a.safetensors"})", "according to the index"},
      {R"({"ta":"a.safetensors","tb":"b.safetensors"})", "already"},
      {R"({"ta":"c.safetensors"})", "c.safetensors"},
  };
  for (const auto& c : cases) {
    write_file(directory / "model.safetensors.index.json", "{\"weight_map\":" + c.map + "}");
    Error error = caught([&] { open_checkpoint(directory.path()); });
    EXPECT_NE(std::string(error.what()).find(c.expected), std::string::npos)
        << c.map << ": " << error.what();
  }
}

TEST(Checkpoint, CompanionsLieBesideTheWeights) {
  TemporaryDirectory directory;
  write_file(directory / "model.safetensors", one_tensor("ta"));
  write_file(directory / "config.json",
             R"({"a": [1.5, {"b": "}\"]"}], "torch_dtype": "float32", "quantization_config": {}})");
  std::filesystem::create_directory(directory / "1_Pooling");
  write_file(directory / "1_Pooling/config.json", "{}");
  write_file(directory / "modules.json", R"([{"path": ""}, {"path": "1_Pooling"}, {"path": "2"}])");
  Checkpoint checkpoint = open_checkpoint(directory.path());
  auto files = companion_files(checkpoint, R"({"low_bit": "nf4"})");
  ASSERT_EQ(files.size(), 3u);
  EXPECT_EQ(files[0].second,
            "{\n  \"a\": [1.5, {\"b\": \"}\\\"]\"}],\n  \"dtype\": \"float32\",\n  "
            "\"quantization_config\": {\"quant_method\": \"ipex_llm\", \"low_bit\": "
            "\"nf4\"}\n}\n");
  EXPECT_EQ(files[2].first, "1_Pooling/config.json");
  for (const char* path : {"..", "../x", "/etc", "a/b", "a\\\\b", "C:"}) {
    write_file(directory / "modules.json", "[{\"path\": \"" + std::string(path) + "\"}]");
    Error error = caught([&] { companion_files(checkpoint, "{}"); });
    EXPECT_NE(std::string(error.what()).find("beside it"), std::string::npos) << error.what();
  }
}

TEST(Checkpoint, IsNoGgufFile) {
  const Error error = caught([] { open_checkpoint("some/model.gguf"); });
  EXPECT_NE(std::string(error.what()).find("ipex_llm.load_gguf loads it"), std::string::npos);
}

TEST(Checkpoint, SaysWhatIsMissing) {
  TemporaryDirectory directory;
  EXPECT_EQ(caught([&] { open_checkpoint(directory / "x"); }).code(), ErrorCode::kNotFound);
  EXPECT_EQ(caught([&] { open_checkpoint(directory.path()); }).code(), ErrorCode::kNotFound);
  write_file(directory / "pytorch_model.bin", "a pickle");
  Error pickle = caught([&] { open_checkpoint(directory.path()); });
  EXPECT_NE(std::string(pickle.what()).find("pickles are not read"), std::string::npos);
}

}  // namespace
}  // namespace lowbit::test
