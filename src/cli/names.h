// What the names of a checkpoint tell, without the code of its model.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lowbit::cli {

enum class Role { kLinear, kEmbedding, kDropped, kUnknown };

// Of a matrix in a checkpoint, by the last module in its name. kDropped: a buffer of old
// checkpoints that today's models compute and do not save.
Role role_of(std::string_view name);
bool is_dropped(std::string_view name);

// modules_to_not_convert, as ipex_llm reads it: an entry names whole segments of a dotted name, or
// is a glob that does.
bool name_matches(std::string_view pattern, std::string_view name);

// fnmatch of Python: * ? [abc] [!abc]
bool glob_matches(std::string_view pattern, std::string_view text);

}  // namespace lowbit::cli
