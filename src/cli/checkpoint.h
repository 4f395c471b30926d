// A Hugging Face directory of safetensors: one file, or shards with an index.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/json.h"
#include "lowbit/file.h"

namespace lowbit::cli {

struct Checkpoint {
  std::string directory;
  std::vector<std::shared_ptr<TensorFile>> files;
  // By name; the file that holds it.
  std::vector<std::pair<const FileTensor*, const TensorFile*>> tensors;
  json::Value config;  // config.json, or null
};

// Throws Error for anything that is not right: index entries with path separators, tensors in two
// files or in none, unknown layouts.
Checkpoint open_checkpoint(const std::string& path);

// Which file holds each tensor, from the text of a model.safetensors.index.json. The names are base
// names, whatever the text says. Throws Error(kCorrupt).
std::map<std::string, std::string> parse_index(std::string_view text, const std::string& who);

// Files beside the weights that a saved directory keeps: configuration, tokenizer, remote code.
// `options` (JSON) are those of the conversion, which config.json then names.
std::vector<std::pair<std::string, std::string>> companion_files(const Checkpoint& checkpoint,
                                                                 std::string_view options);

}  // namespace lowbit::cli
