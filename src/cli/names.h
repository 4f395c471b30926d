// What the names of a checkpoint tell, without the code of its model.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lowbit::cli {

enum class Role { kLinear, kEmbedding, kRouter, kDropped, kUnknown };

// Of a matrix in a checkpoint, by the last module in its name. kDropped: a buffer of old
// checkpoints that today's models compute and do not save.
Role role_of(std::string_view name);
bool is_dropped(std::string_view name);
// Whether transformers keeps the tensor's own type, whatever the model is loaded as.
bool stays_as_stored(std::string_view name);

// ---- experts: a checkpoint has them one by one, transformers merges them
// -------------------------

struct ExpertNames {
  std::string_view block, gate, up, down;  // names in the checkpoint
};
std::span<const ExpertNames> expert_names();
// Whether transformers' own class for this config.json's model_type does.
bool merges_experts(std::string_view model_type);
// "layers.0.mlp.experts.7.up_proj.weight" is merged into target
// "layers.0.mlp.experts.gate_up_proj"; no target: another kind of name.
struct ExpertName {
  std::string target;
};
ExpertName parse_expert(std::string_view name);
// The name that a merging model has for a tensor of its checkpoint.
std::string model_name(std::string_view name);

// modules_to_not_convert, as ipex_llm reads it: an entry names whole segments of a dotted name, or
// is a glob that does.
bool name_matches(std::string_view pattern, std::string_view name);

// fnmatch of Python: * ? [abc] [!abc]
bool glob_matches(std::string_view pattern, std::string_view text);

}  // namespace lowbit::cli
