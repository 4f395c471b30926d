#include "cli/checkpoint.h"

#include <algorithm>
#include <map>
#include <set>

#include "io/os.h"
#include "lowbit/error.h"

namespace lowbit::cli {
namespace {

constexpr std::uint64_t kMaxTextBytes = 256'000'000;  // of an index; real ones take 100 kB

[[noreturn]] void corrupt(const std::string& who, const std::string& what) {
  throw Error(ErrorCode::kCorrupt, who + ": " + what);
}

// config.json as save_low_bit writes it: the values as they are, our quantization_config instead of
// what the source was quantized with, one name for the dtype.
std::string converted_config(const std::string& text, const std::string& path,
                             std::string_view options) {
  std::string out = "{";
  auto add = [&](std::string_view key, std::string_view value) {
    out += (out.size() > 1 ? ",\n  " : "\n  ") + json::quote(key) + ": ";
    out += value;
  };
  auto members = json::members(text, path);
  bool has_dtype = std::any_of(members.begin(), members.end(),
                               [](const auto& member) { return member.first == "dtype"; });
  for (const auto& [key, value] : members) {
    if (key == "quantization_config" || key == "transformers_weights") continue;
    if (key == "torch_dtype" && has_dtype) continue;
    add(key == "torch_dtype" ? "dtype" : key, value);
  }
  std::string quantization = "{\"quant_method\": \"ipex_llm\"";
  if (options.size() > 2) (quantization += ", ") += options.substr(1, options.size() - 2);
  add("quantization_config", quantization + "}");
  return out + "\n}\n";
}

}  // namespace

std::map<std::string, std::string> parse_index(std::string_view text, const std::string& who) {
  json::Value index = json::parse(text, who);
  const json::Value* map = index.find("weight_map");
  if (!map || !map->object()) corrupt(who, "has no 'weight_map'");
  std::map<std::string, std::string> where;
  for (const auto& [name, file] : *map->object()) {
    if (!file.string()) corrupt(who, json::quote(name) + " is not mapped to a file");
    const std::string& base = *file.string();
    // A shard lies beside its index, whatever the index says.
    if (base.empty() || base[0] == '.' || base.find_first_of("/\\:") != std::string::npos ||
        base.find('\0') != std::string::npos || !base.ends_with(".safetensors"))
      corrupt(who, json::quote(name) + " is mapped to " + json::quote(base) +
                       ", expected the name of a .safetensors file in the same directory");
    where.emplace(name, base);
  }
  return where;
}

Checkpoint open_checkpoint(const std::string& path) {
  Checkpoint checkpoint;
  checkpoint.directory = path;
  std::map<std::string, std::string> where;
  std::set<std::string> names;
  if (path.ends_with(".gguf"))
    throw Error(ErrorCode::kValue,
                path + ": is a GGUF file; ipex_llm.load_gguf loads it, and the model saves as any");
  if (path.ends_with(".safetensors")) {
    std::size_t slash = path.find_last_of("/\\");
    checkpoint.directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    names.insert(slash == std::string::npos ? path : path.substr(slash + 1));
  } else if (!os::exists(path)) {
    throw Error(ErrorCode::kNotFound, path + ": does not exist; give a model directory");
  } else if (os::exists(os::join(path, kManifestName))) {
    throw Error(ErrorCode::kValue, path + ": is a low-bit save already; convert its float model");
  } else if (os::exists(os::join(path, "model.safetensors.index.json"))) {
    std::string index = os::join(path, "model.safetensors.index.json");
    where = parse_index(os::read_text(index, kMaxTextBytes), index);
    for (const auto& item : where) names.insert(item.second);
  } else if (os::exists(os::join(path, "model.safetensors"))) {
    names.insert("model.safetensors");
  } else {
    bool pickle = os::exists(os::join(path, "pytorch_model.bin")) ||
                  os::exists(os::join(path, "pytorch_model.bin.index.json"));
    throw Error(ErrorCode::kNotFound,
                path + ": holds neither model.safetensors nor model.safetensors.index.json" +
                    (pickle ? "; pickles are not read: save the model with "
                              "save_pretrained(safe_serialization=True) first"
                            : "; give a model directory or a .safetensors file"));
  }

  std::map<std::string, const TensorFile*> seen;
  for (const std::string& name : names) {
    checkpoint.files.push_back(TensorFile::open(os::join(checkpoint.directory, name)));
    const TensorFile& file = *checkpoint.files.back();
    for (const FileTensor& tensor : file.header().tensors) {
      auto [it, added] = seen.emplace(tensor.name, &file);
      if (!added)
        corrupt(file.path(),
                "tensor " + json::quote(tensor.name) + " is in " + it->second->path() + " already");
      if (!where.empty()) {
        auto listed = where.find(tensor.name);
        if (listed == where.end() || listed->second != name)
          corrupt(file.path(),
                  "tensor " + json::quote(tensor.name) + " is not here according to the index");
        where.erase(listed);
        if (where.empty()) where.emplace();  // stays "indexed", with nothing left to find
      }
      checkpoint.tensors.emplace_back(&tensor, &file);
    }
  }
  where.erase("");
  if (!where.empty())
    corrupt(checkpoint.directory, "the index names tensor " + json::quote(where.begin()->first) +
                                      " in " + where.begin()->second + ", which does not have it");
  std::sort(checkpoint.tensors.begin(), checkpoint.tensors.end(),
            [](const auto& a, const auto& b) { return a.first->name < b.first->name; });

  std::string config = os::join(checkpoint.directory, "config.json");
  if (os::exists(config)) {
    checkpoint.config = json::parse(os::read_text(config, kMaxTextBytes), config);
    if (!checkpoint.config.object()) corrupt(config, "is not a JSON object");
  }
  return checkpoint;
}

std::vector<std::pair<std::string, std::string>> companion_files(const Checkpoint& checkpoint,
                                                                 std::string_view options) {
  std::vector<std::pair<std::string, std::string>> files;
  for (const std::string& name : os::list_directory(checkpoint.directory)) {
    auto ends = [&](std::string_view suffix) { return name.ends_with(suffix); };
    bool wanted = (ends(".json") && !ends(".index.json")) || ends(".py") || ends(".jinja") ||
                  ends(".model") || ends(".tiktoken") || ends(".bpe") || ends(".txt") ||
                  name == "LICENSE" || name == "NOTICE" || name == "README.md";
    if (!wanted || name[0] == '.' || name == kManifestName) continue;
    std::string path = os::join(checkpoint.directory, name);
    std::string text = os::read_text(path, kMaxTextBytes);
    files.emplace_back(name, name == "config.json" ? converted_config(text, path, options) : text);
  }
  // The modules of sentence-transformers have a folder each, of which those without weights are
  // configuration alone.
  if (std::string list = os::join(checkpoint.directory, "modules.json"); os::exists(list)) {
    json::Value modules = json::parse(os::read_text(list, kMaxTextBytes), list);
    if (!modules.array()) corrupt(list, "is not a JSON array");
    for (const json::Value& module : *modules.array()) {
      const json::Value* folder = module.find("path");
      if (!folder || !folder->string()) corrupt(list, "has a module without a path");
      if (folder->string()->empty()) continue;
      std::string name = *folder->string() + "/config.json";
      std::string path = os::join(checkpoint.directory, name);
      if (folder->string()->find_first_of("/\\:.") != std::string::npos)
        corrupt(list, json::quote(*folder->string()) + " is not the name of a folder beside it");
      if (os::exists(
              os::join(os::join(checkpoint.directory, *folder->string()), "model.safetensors")))
        throw Error(ErrorCode::kValue, list + ": module " + json::quote(*folder->string()) +
                                           " has weights of its own, which are not converted; "
                                           "optimize and save the model in Python");
      if (os::exists(path)) files.emplace_back(name, os::read_text(path, kMaxTextBytes));
    }
  }
  return files;
}

}  // namespace lowbit::cli
