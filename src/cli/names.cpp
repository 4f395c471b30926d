#include "cli/names.h"

#include <algorithm>
#include <array>

namespace lowbit::cli {
namespace {

// Modules that are linear in every architecture of transformers that uses the name (Conv1D users,
// whose weights are stored transposed, name theirs c_attn, c_fc, c_proj: not here).
constexpr std::string_view kLinear[] = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "qkv_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "lm_head",
    "fc1",
    "fc2",
    "query",
    "key",
    "value",
    "dense",
    "query_key_value",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "Wqkv",
    "wq",
    "wk",
    "wv",
    "wo",
    "w1",
    "w2",
    "w3",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "in_proj",
    "score",
    "classifier",
    "q_lin",
    "k_lin",
    "v_lin",
    "out_lin",
    "lin1",
    "lin2",
    "shared_expert_gate",
};
constexpr std::string_view kEmbedding[] = {
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "embed_positions",
    "tok_embeddings",
    "embed_in",
    "shared",
    "word_embedding",
    "relative_attention_bias",
    "embedding",
    "embeddings",
};
constexpr std::string_view kDropped[] = {
    "inv_freq", "position_ids", "masked_bias", "attn_mask", "causal_mask",
};

constexpr ExpertNames kExperts[] = {{"mlp", "gate_proj", "up_proj", "down_proj"},
                                    {"block_sparse_moe", "w1", "w3", "w2"}};
// As conversion_mapping.py of transformers 5.23 has it, where tests/python/test_convert.py
// compares.
constexpr std::string_view kMerging[] = {
    "mixtral",     "minimax", "qwen2_moe", "qwen3_moe", "deepseek_v2",
    "deepseek_v3", "dots1",   "glm4_moe",  "olmoe",     "flex_olmo",
};
constexpr std::string_view kKeptType[] = {"e_score_correction_bias"};

template <class Names>
bool contains(const Names& names, std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

std::vector<std::string_view> segments(std::string_view name) {
  std::vector<std::string_view> parts;
  while (true) {
    std::size_t dot = name.find('.');
    parts.push_back(name.substr(0, dot));
    if (dot == std::string_view::npos) return parts;
    name.remove_prefix(dot + 1);
  }
}

}  // namespace

bool is_dropped(std::string_view name) {
  return contains(kDropped, segments(name).back());
}

bool stays_as_stored(std::string_view name) {
  return contains(kKeptType, segments(name).back());
}

std::span<const ExpertNames> expert_names() {
  return kExperts;
}

bool merges_experts(std::string_view model_type) {
  return contains(kMerging, model_type);
}

ExpertName parse_expert(std::string_view name) {
  std::vector<std::string_view> parts = segments(name);
  const std::size_t n = parts.size();
  if (n < 5 || parts[n - 1] != "weight" || parts[n - 4] != "experts" || parts[n - 3].empty() ||
      parts[n - 3].find_first_not_of("0123456789") != std::string_view::npos)
    return {};
  for (const ExpertNames& names : kExperts) {
    if (parts[n - 5] != names.block) continue;
    const std::string_view one = parts[n - 2];
    if (one != names.gate && one != names.up && one != names.down) continue;
    std::string prefix(name.substr(0, static_cast<std::size_t>(parts[n - 5].data() - name.data())));
    return {prefix + (one == names.down ? "mlp.experts.down_proj" : "mlp.experts.gate_up_proj")};
  }
  return {};
}

std::string model_name(std::string_view name) {
  constexpr std::string_view kBefore = ".block_sparse_moe.", kNow = ".mlp.";
  std::string renamed(name);
  if (std::size_t at = renamed.find(kBefore); at != std::string::npos)
    renamed.replace(at, kBefore.size(), kNow);
  return renamed;
}

Role role_of(std::string_view name) {
  if (is_dropped(name)) return Role::kDropped;
  std::vector<std::string_view> parts = segments(name);
  if (parts.size() < 2 || parts.back() != "weight") return Role::kUnknown;
  std::string_view module = parts[parts.size() - 2];
  if (contains(kLinear, module)) return Role::kLinear;
  if (contains(kEmbedding, module)) return Role::kEmbedding;
  return Role::kUnknown;
}

bool glob_matches(std::string_view pattern, std::string_view text) {
  // The usual two pointers with one place to go back to: linear in practice, never exponential.
  std::size_t p = 0, t = 0, star = std::string_view::npos, mark = 0;
  // Length of the pattern element at p if it matches c, 0 if it does not.
  auto element = [&](char c) -> std::size_t {
    if (p >= pattern.size()) return 0;
    if (pattern[p] == '?') return 1;
    if (pattern[p] == '[') {
      std::size_t i = p + 1;
      bool negated = i < pattern.size() && pattern[i] == '!';
      if (negated) ++i;
      std::size_t close = pattern.find(']', i + 1);
      if (i < pattern.size() && close != std::string_view::npos) {
        bool inside = false;
        for (std::size_t j = i; j < close; ++j) {
          if (j + 2 < close && pattern[j + 1] == '-') {
            inside |= pattern[j] <= c && c <= pattern[j + 2];
            j += 2;
          } else {
            inside |= pattern[j] == c;
          }
        }
        return inside != negated ? close + 1 - p : 0;
      }
    }
    return pattern[p] == c ? 1 : 0;
  };
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      mark = t;
    } else if (std::size_t length = element(text[t])) {
      p += length;
      ++t;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++mark;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

bool name_matches(std::string_view pattern, std::string_view name) {
  bool is_glob = pattern.find_first_of("*?[") != std::string_view::npos;
  if (is_glob && glob_matches(pattern, name)) return true;
  std::vector<std::string_view> wanted = segments(pattern), parts = segments(name);
  for (std::size_t start = 0; start + wanted.size() <= parts.size(); ++start) {
    bool all = true;
    for (std::size_t i = 0; all && i < wanted.size(); ++i)
      all = parts[start + i] == wanted[i] || (is_glob && glob_matches(wanted[i], parts[start + i]));
    if (all) return true;
  }
  return false;
}

}  // namespace lowbit::cli
