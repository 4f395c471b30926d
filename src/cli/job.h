// What becomes of each tensor of a checkpoint: by the names, or by a plan.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cli/checkpoint.h"
#include "cli/commands.h"
#include "cli/source.h"

namespace lowbit::cli {

struct Item {
  SavedTensor saved;
  Source source;
};

struct Job {
  std::vector<Item> items;
  std::vector<std::pair<std::string, std::string>> ties;
  std::string options;  // of the manifest, JSON
};

// Throws Error(kValue) for what cannot be decided, before anything is written.
Job job_from_names(const ConvertArgs& args, const Checkpoint& checkpoint);
// `text` is the JSON of ipex_llm.plan(...).to_dict().
Job job_from_plan(std::string_view text, const std::string& who, const Checkpoint& checkpoint);

}  // namespace lowbit::cli
