#include "cli/job.h"

#include <algorithm>
#include <map>
#include <set>

#include "cli/names.h"
#include "io/json.h"
#include "lowbit/error.h"

namespace lowbit::cli {
namespace {

[[noreturn]] void refuse(const std::string& text) {
  throw Error(ErrorCode::kValue, text);
}

std::optional<FileDType> dtype_named(std::string_view name) {
  if (name.starts_with("torch.")) name.remove_prefix(6);
  for (const FileDTypeInfo& info : file_dtypes())
    if (info.torch_name == name) return info.dtype;
  return std::nullopt;
}

std::string quoted_list(const std::vector<std::string>& items) {
  std::string text = "[";
  for (std::size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + json::quote(items[i]);
  return text + "]";
}

const std::string* text_of(const json::Value& config, std::string_view key) {
  const json::Value* value = config.find(key);
  return value ? value->string() : nullptr;
}

// The dtype that transformers would load the model in.
std::optional<FileDType> model_dtype(const json::Value& config) {
  for (std::string_view key : {"dtype", "torch_dtype"})
    if (const std::string* name = text_of(config, key))
      if (std::optional<FileDType> dtype = dtype_named(*name); dtype && float_type(*dtype))
        return dtype;
  return std::nullopt;
}

// Whether the class of the model ties no weights that its names would not tell: heads of causal
// models are looked at, base models and classifiers have none.
bool ties_are_told(const json::Value& config) {
  const json::Value* architectures = config.find("architectures");
  if (!architectures || !architectures->array()) return true;
  for (const json::Value& name : *architectures->array()) {
    if (!name.string()) return false;
    bool told = false;
    for (std::string_view tail : {"ForCausalLM", "ForSequenceClassification",
                                  "ForTokenClassification", "ForQuestionAnswering"})
      told |= name.string()->ends_with(tail);
    // "GPT2LMHeadModel" is no base model.
    told |= name.string()->ends_with("Model") && name.string()->find("Head") == std::string::npos;
    if (!told) return false;
  }
  return true;
}

bool is_causal(const json::Value& config) {
  const json::Value* architectures = config.find("architectures");
  if (!architectures || !architectures->array()) return false;
  for (const json::Value& name : *architectures->array())
    if (name.string() && name.string()->ends_with("ForCausalLM")) return true;
  return false;
}

bool excluded(const std::vector<std::string>& patterns, std::string_view name) {
  std::string_view owner = name.substr(0, name.rfind('.'));
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return name_matches(pattern, name) || name_matches(pattern, owner);
  });
}

// Codes of another tool: they would be taken over as numbers.
bool is_quantized(const FileTensor& tensor) {
  const std::string_view name = tensor.name;
  const std::string_view last = name.substr(name.rfind('.') + 1);
  for (std::string_view tail : {"qweight", "qzeros", "weight_packed", "quant_map", "absmax", "SCB"})
    if (last == tail) return true;
  if (name.find(".quant_state.") != name.npos) return true;
  const bool integers = !float_type(tensor.dtype) && !is_fp8(tensor.dtype) &&
                        tensor.dtype != FileDType::kBool && tensor.dtype != FileDType::kC64;
  return integers && tensor.shape.size() >= 2 && (last == "weight" || last == "B");
}

void refuse_quantized(const Checkpoint& checkpoint) {
  for (const auto& [tensor, file] : checkpoint.tensors) {
    if (!is_quantized(*tensor)) continue;
    const json::Value* quantization = checkpoint.config.find("quantization_config");
    const std::string* method = quantization ? text_of(*quantization, "quant_method") : nullptr;
    refuse(file->path() + ": tensor " + json::quote(tensor->name) +
           " holds codes: the checkpoint is quantized" + (method ? " by " + *method : "") +
           "; convert its float model, or load it with ipex_llm.load_quantized and save that");
  }
}

// ---- where values come from
// ----------------------------------------------------------------------

// The tensors of a checkpoint by the name that the model has for them, fp8 ones with their scales.
class Sources {
 public:
  explicit Sources(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {
    refuse_quantized(checkpoint);
    for (const auto& [tensor, file] : checkpoint.tensors)
      by_name_.emplace(tensor->name, StoredTensor{tensor, file});
    for (const auto& [name, stored] : by_name_)
      if (is_fp8(stored.tensor->dtype)) find_scale(name, stored);
  }

  // Tensors that say something about others: scales of weights and of activations.
  bool is_auxiliary(std::string_view name) const { return auxiliary_.contains(name); }
  bool contains(std::string_view name) const { return by_name_.contains(name); }

  Part part(std::string_view name) const {
    auto scaled = scaled_.find(name);
    if (scaled != scaled_.end()) return scaled->second;
    const StoredTensor& stored = by_name_.find(name)->second;
    return Part{stored, {}, 0, 0};
  }

 private:
  using Names = std::map<std::string, StoredTensor, std::less<>>;

  void find_scale(const std::string& name, const StoredTensor& stored) {
    std::string owner = name.ends_with("weight") ? name.substr(0, name.size() - 6) : name + "_";
    for (const char* tail : {"input_scale", "activation_scale", "input_scale_ub", "qscale_act"})
      if (auto it = by_name_.find(owner + tail); it != by_name_.end()) auxiliary_.insert(it->first);
    auto scale = by_name_.end();
    for (const std::string& candidate :
         {name + "_scale_inv", name + "_scale", owner + "scale", owner + "qscale_weight"}) {
      scale = by_name_.find(candidate);
      if (scale != by_name_.end()) break;
    }
    if (scale == by_name_.end()) {
      // A cast to fp8 has none; a quantization without its scales is only half there.
      if (checkpoint_.config.find("quantization_config"))
        refuse(stored.file->path() + ": tensor " + json::quote(name) +
               " is fp8 and the checkpoint has no " + json::quote(name + "_scale_inv") + " or " +
               json::quote(name + "_scale") + " for it; is the checkpoint complete?");
      return;
    }
    auxiliary_.insert(scale->first);
    scaled_.emplace(name, scaled(name, stored, scale->first, scale->second));
  }

  // The grid of scales over a weight. Where the configuration's block fits the grid, it counts: the
  // last block of a row or column may be short. Elsewhere the grid divides the weight evenly.
  Part scaled(const std::string& name, const StoredTensor& stored, const std::string& scale_name,
              const StoredTensor& scale) const {
    auto wrong = [&](const std::string& what) {
      throw Error(ErrorCode::kCorrupt,
                  scale.file->path() + ": tensor " + json::quote(scale_name) + " " + what);
    };
    const std::vector<std::int64_t>& shape = stored.tensor->shape;
    std::vector<std::int64_t> grid = scale.tensor->shape;
    if (!float_type(scale.tensor->dtype) && scale.tensor->dtype != FileDType::kU8)
      wrong("holds scales of type " + std::string(file_dtype_info(scale.tensor->dtype).torch_name) +
            ", expected floats, or exponents as uint8");
    std::int64_t rows = shape.size() < 2 ? 1 : shape[shape.size() - 2];
    std::int64_t cols = shape.empty() ? 1 : shape.back();
    std::int64_t matrices = rows && cols ? 1 : 0;
    for (std::size_t i = 0; i + 2 < shape.size(); ++i) matrices *= shape[i];
    // One number for all; one per row; a grid.
    if (grid.empty()) grid = {1};
    if (grid.size() == 1) grid.push_back(1);
    std::int64_t grid_rows = grid[grid.size() - 2], grid_cols = grid.back(), grids = 1;
    for (std::size_t i = 0; i + 2 < grid.size(); ++i) grids *= grid[i];
    Part part{stored, scale, 0, 0};
    if (matrices == 0) return Part{stored, {}, 0, 0};
    auto blocks = [](std::int64_t size, std::int64_t block) { return (size + block - 1) / block; };
    if (grids == matrices && grid_rows > 0 && grid_cols > 0) {
      if (auto [m, n] = block_size();
          m > 0 && n > 0 && blocks(rows, m) == grid_rows && blocks(cols, n) == grid_cols) {
        part.block_rows = m;
        part.block_cols = n;
        return part;
      }
      if (rows % grid_rows == 0 && cols % grid_cols == 0) {
        part.block_rows = rows / grid_rows;
        part.block_cols = cols / grid_cols;
        return part;
      }
    }
    std::string text = "[";
    for (std::size_t i = 0; i < scale.tensor->shape.size(); ++i)
      text += (i ? ", " : "") + std::to_string(scale.tensor->shape[i]);
    text += "] scales, which do not divide " + json::quote(name) + " [";
    for (std::size_t i = 0; i < shape.size(); ++i)
      text += (i ? ", " : "") + std::to_string(shape[i]);
    wrong("holds " + text + "]");
    return part;
  }

  std::pair<std::int64_t, std::int64_t> block_size() const {
    const json::Value* quantization = checkpoint_.config.find("quantization_config");
    const json::Value* size = quantization ? quantization->find("weight_block_size") : nullptr;
    if (!size || !size->array() || size->array()->size() != 2) return {0, 0};
    const std::int64_t* m = (*size->array())[0].integer();
    const std::int64_t* n = (*size->array())[1].integer();
    return m && n ? std::pair{*m, *n} : std::pair<std::int64_t, std::int64_t>{0, 0};
  }

  const Checkpoint& checkpoint_;
  Names by_name_;
  std::map<std::string, Part, std::less<>> scaled_;
  std::set<std::string, std::less<>> auxiliary_;
};

Item item_of(const std::string& name, Source source, std::vector<std::int64_t> shape,
             std::optional<FileDType> dtype) {
  Item item{{}, std::move(source)};
  FileDType stored = item.source.dtype();
  for (const Part& part : item.source.parts)
    if (part.stored.tensor->dtype != stored)
      refuse(part.stored.file->path() + ": tensor " + json::quote(part.stored.tensor->name) +
             " has another type than the others that make " + json::quote(name));
  bool is_float = float_type(stored) || is_fp8(stored);
  // fp8 is no type to compute in: where nothing says what the model is loaded as, transformers
  // takes bfloat16.
  FileDType fallback = is_fp8(stored) ? FileDType::kBF16 : stored;
  item.saved.name = name;
  item.saved.dtype = is_float ? dtype.value_or(fallback) : stored;
  item.saved.shape = std::move(shape);
  return item;
}

// ---- experts, which transformers merges
// ------------------------------------------------------------

struct Merged {
  Source source;
  std::vector<std::int64_t> shape;
  std::vector<std::string> used;
};

// "<prefix>.experts.gate_up_proj" or ".down_proj" out of "<prefix>.experts.<n>.<...>.weight", if
// the checkpoint has them.
std::optional<Merged> merged_experts(const Sources& sources, const std::string& name) {
  bool down = name.ends_with(".experts.down_proj");
  if (!down && !name.ends_with(".experts.gate_up_proj")) return std::nullopt;
  std::string prefix = name.substr(0, name.rfind(".experts."));
  for (const ExpertNames& names : expert_names()) {
    std::string block = prefix;
    if (std::size_t dot = prefix.rfind('.'); names.block != "mlp") {
      if (prefix.substr(dot + 1) != "mlp") continue;
      block = prefix.substr(0, dot + 1) + std::string(names.block);
    }
    std::vector<std::string_view> wanted =
        down ? std::vector{names.down} : std::vector{names.gate, names.up};
    Merged merged;
    std::int64_t experts = 0, cols = -1, rows = 0;
    for (bool found = true; found; experts += found) {
      std::int64_t own = 0;
      for (std::string_view one : wanted) {
        std::string stored =
            block + ".experts." + std::to_string(experts) + "." + std::string(one) + ".weight";
        found = sources.contains(stored);
        if (!found) break;
        Part part = sources.part(stored);
        const std::vector<std::int64_t>& shape = part.stored.tensor->shape;
        if (shape.size() != 2 || (cols >= 0 && shape[1] != cols))
          refuse(part.stored.file->path() + ": tensor " + json::quote(stored) +
                 " has another shape than the other experts");
        cols = shape[1];
        own += shape[0];
        merged.source.parts.push_back(part);
        merged.used.push_back(stored);
      }
      if (found && experts > 0 && own != rows)
        refuse("expert " + std::to_string(experts) + " of " + json::quote(name) +
               " has another shape than the others");
      if (found) rows = own;
    }
    if (experts == 0) continue;
    if (merged.used.size() != static_cast<std::size_t>(experts) * wanted.size())
      refuse("expert " + std::to_string(experts) + " of " + json::quote(name) + " is incomplete");
    merged.shape = {experts, rows, cols};
    return merged;
  }
  return std::nullopt;
}

// A raw matrix that code multiplies keeps its type where packing would not make it smaller; several
// small ones may still be worth packing as one (ipex_llm/planning.py has the same rule).
void pack_if_smaller(SavedTensor& saved, Format format, int group_size) {
  std::uint64_t before = *tensor_bytes(saved.dtype, saved.shape);
  SavedTensor packed = saved;
  packed.format = format;
  packed.group_size = group_size;
  if (packed_shape(packed).bytes() >= before && saved.shape.size() > 2) {
    std::int64_t all = 1;
    for (std::int64_t size : saved.shape) all *= size;
    packed.stored_shape = {all / saved.shape.back(), saved.shape.back()};
    SavedTensor wide = packed;
    wide.stored_shape = {saved.shape[0], all / saved.shape[0]};
    if (packed_shape(wide).bytes() < packed_shape(packed).bytes()) packed = wide;
  }
  if (packed_shape(packed).bytes() < before) saved = packed;
}

}  // namespace

Job job_from_names(const ConvertArgs& args, const Checkpoint& checkpoint) {
  Job job;
  const Sources sources(checkpoint);
  Format format = parse_format(args.low_bit);
  int group_size = make_layout(format, 1, 1, args.group_size).group_size;
  std::optional<FileDType> dtype = model_dtype(checkpoint.config);
  const std::string* model_type = text_of(checkpoint.config, "model_type");
  const bool merges = model_type && merges_experts(*model_type);

  constexpr std::string_view kHead = "lm_head.weight";
  std::string table;
  bool has_head = false;
  for (const auto& tensor : checkpoint.tensors) {
    has_head |= tensor.first->name == kHead;
    if (tensor.first->name.ends_with("embed_tokens.weight")) table = tensor.first->name;
  }
  const json::Value* tie = checkpoint.config.find("tie_word_embeddings");
  bool says_tied = tie && tie->boolean() && *tie->boolean();
  // Checkpoints leave a tied head out; one that has it nevertheless is overruled by the table.
  bool tied = !table.empty() && is_causal(checkpoint.config) && (says_tied || !has_head);

  std::vector<std::string> unknown;
  std::set<std::string> merged;  // experts that are part of something else
  auto expert = [&](const std::string& name) {
    ExpertName parts = parse_expert(name);
    if (parts.target.empty()) return false;
    if (merged.contains(name)) return true;
    std::optional<Merged> found = merged_experts(sources, parts.target);
    if (!found) return false;
    for (const std::string& one : found->used) merged.insert(one);
    Item item = item_of(parts.target, std::move(found->source), std::move(found->shape), dtype);
    if (!excluded(args.not_converted, parts.target))
      pack_if_smaller(item.saved, format, group_size);
    job.items.push_back(std::move(item));
    return true;
  };
  for (const auto& tensor : checkpoint.tensors) {
    const FileTensor& source = *tensor.first;
    if (is_dropped(source.name) || (tied && source.name == kHead)) continue;
    if (sources.is_auxiliary(source.name)) continue;
    if (merges && expert(source.name)) continue;
    std::string name = merges ? model_name(source.name) : source.name;
    Item item = item_of(name, Source{{sources.part(source.name)}}, source.shape, dtype);
    if (stays_as_stored(name)) item.saved.dtype = source.dtype;
    bool is_matrix = source.shape.size() >= 2 && source.bytes > 0 &&
                     (float_type(source.dtype) || is_fp8(source.dtype));
    bool keep = !is_matrix || excluded(args.not_converted, name) ||
                (tied && name == table && excluded(args.not_converted, kHead));
    if (!keep) {
      Role role = role_of(name);
      if (merges && name.ends_with(".mlp.gate.weight")) role = Role::kRouter;
      if (role == Role::kUnknown || source.shape.size() != 2 ||
          name.find(".experts.") != std::string::npos) {
        unknown.push_back(source.name);
        continue;
      }
      if (role == Role::kLinear || (tied && name == table)) {
        item.saved.format = format;
        item.saved.group_size = group_size;
      } else if (role == Role::kRouter) {
        pack_if_smaller(item.saved, format, group_size);
      }
    }
    job.items.push_back(std::move(item));
  }
  if (!unknown.empty()) {
    std::string text = checkpoint.directory + ": the names of " + std::to_string(unknown.size()) +
                       " tensors do not tell what they are:";
    for (std::size_t i = 0; i < unknown.size() && i < 10; ++i) text += "\n  " + unknown[i];
    if (unknown.size() > 10) text += "\n  ... and " + std::to_string(unknown.size() - 10) + " more";
    refuse(text +
           "\nGive --plan with the JSON of ipex_llm.plan(model).to_dict(), or name them in "
           "--not-convert");
  }
  if (!ties_are_told(checkpoint.config) ||
      (is_causal(checkpoint.config) && !has_head && table.empty()))
    refuse(checkpoint.directory + ": the names do not tell which weights " +
           (is_causal(checkpoint.config) ? "the head is tied to" : "this architecture ties") +
           "; give --plan with the JSON of ipex_llm.plan(model).to_dict()");
  if (tied) job.ties.emplace_back(kHead, table);
  job.options =
      "{\"cpu_embedding\": false, \"disable_optimize_pre\": false, \"embedding_qtype\": null, "
      "\"group_size\": " +
      std::to_string(args.group_size) +
      ", \"lightweight_bmm\": false, \"low_bit\": " + json::quote(format_info(format).name) +
      ", \"modules_to_not_convert\": " + quoted_list(args.not_converted) +
      ", \"optimize_llm\": true}";
  return job;
}

namespace {

std::vector<std::int64_t> sizes_of(const json::Value* shape) {
  std::vector<std::int64_t> sizes;
  if (shape && shape->array())
    for (const json::Value& size : *shape->array())
      sizes.push_back(size.integer() ? *size.integer() : -1);
  return sizes;
}

// The checkpoint's name for what the model calls `name`: transformers renames old names, and adds
// or removes the prefix of the base model.
std::optional<std::string> stored_name(const Sources& sources, const Checkpoint& checkpoint,
                                       const std::string& name) {
  if (sources.contains(name)) return name;
  for (auto [now, before] : {std::pair{"LayerNorm.weight", "LayerNorm.gamma"},
                             std::pair{"LayerNorm.bias", "LayerNorm.beta"}})
    if (name.ends_with(now)) {
      std::string old = name.substr(0, name.size() - std::string_view(now).size()) + before;
      if (sources.contains(old)) return old;
    }
  std::size_t dot = name.find('.');
  if (dot != std::string::npos && sources.contains(name.substr(dot + 1)))
    return name.substr(dot + 1);
  std::optional<std::string> found;
  for (const auto& tensor : checkpoint.tensors) {
    const std::string& stored = tensor.first->name;
    std::size_t first = stored.find('.');
    if (first == std::string::npos || stored.compare(first + 1, stored.npos, name) != 0) continue;
    if (found) return std::nullopt;  // two: it does not tell
    found = stored;
  }
  return found;
}

}  // namespace

Job job_from_plan(std::string_view text, const std::string& who, const Checkpoint& checkpoint) {
  json::Value plan = json::parse(text, who);
  auto bad = [&](const std::string& what) { refuse(who + ": " + what); };
  const json::Value* parameters = plan.find("parameters");
  const json::Value* buffers = plan.find("buffers");
  const json::Value* options = plan.find("options");
  if (!parameters || !parameters->array() || !buffers || !buffers->array() || !options ||
      !options->object())
    bad("is not the JSON of ipex_llm.plan(...).to_dict()");

  const Sources sources(checkpoint);
  Job job;
  // One entry of the plan: what the checkpoint has under one of its names.
  auto item_for = [&](const json::Value& entry, const char* kind) {
    const json::Value* names = entry.find("names");
    const std::string* dtype_name = text_of(entry, "dtype");
    if (!names || !names->array() || names->array()->empty() || !dtype_name)
      bad("lacks names or dtypes");
    std::string first;
    std::optional<std::string> stored;
    std::optional<Merged> merged;
    for (const json::Value& name : *names->array()) {
      if (!name.string()) bad("has a name that is not a string");
      if (first.empty()) {
        first = *name.string();
      } else {
        job.ties.emplace_back(*name.string(), first);
      }
      if (!stored) stored = stored_name(sources, checkpoint, *name.string());
      if (!stored && !merged) merged = merged_experts(sources, *name.string());
    }
    if (const json::Value* others = entry.find("stored_as"); others && others->array())
      for (const json::Value& name : *others->array())
        if (!stored && name.string()) stored = stored_name(sources, checkpoint, *name.string());
    if (!stored && !merged)
      refuse(who + ": " + kind + " " + json::quote(first) + " is not in " + checkpoint.directory +
             "; is it the plan of this model?");
    std::optional<FileDType> dtype = dtype_named(*dtype_name);
    if (!dtype) bad(std::string(kind) + " " + json::quote(first) + " has no dtype that is known");
    Item item;
    if (stored) {
      Part part = sources.part(*stored);
      std::vector<std::int64_t> shape = part.stored.tensor->shape;
      item = item_of(first, Source{{part}}, std::move(shape), dtype);
    } else {
      item = item_of(first, std::move(merged->source), std::move(merged->shape), dtype);
    }
    if (sizes_of(entry.find("shape")) != item.saved.shape)
      bad(std::string(kind) + " " + json::quote(first) + " has another shape in the checkpoint");
    return item;
  };
  for (const json::Value& parameter : *parameters->array()) {
    Item item = item_for(parameter, "parameter");
    if (const std::string* low_bit = text_of(parameter, "low_bit")) {
      item.saved.format = parse_format(*low_bit);
      const json::Value* group = parameter.find("group_size");
      if (group && group->integer()) item.saved.group_size = static_cast<int>(*group->integer());
      const json::Value* transposed = parameter.find("transposed");
      item.saved.transposed = transposed && transposed->boolean() && *transposed->boolean();
      item.saved.stored_shape = sizes_of(parameter.find("stored_shape"));
      if (item.saved.stored_shape == item.saved.shape) item.saved.stored_shape.clear();
    }
    job.items.push_back(std::move(item));
  }
  for (const json::Value& buffer : *buffers->array())
    job.items.push_back(item_for(buffer, "buffer"));
  json::Object kept;
  for (const auto& option : *options->object())
    if (option.first != "torch_dtype") kept.push_back(option);
  job.options = json::dump(json::Value(std::move(kept)));
  return job;
}

}  // namespace lowbit::cli
