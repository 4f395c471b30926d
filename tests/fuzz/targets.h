// The fuzz targets by name: what both drivers run.
#pragma once

#include <span>
#include <string_view>

namespace lowbit::fuzz {

struct Target {
  const char* name;  // of its folder in corpus/
  void (*run)(std::string_view input);
};

std::span<const Target> targets();
// A refusal (lowbit::Error) is no finding.
void run(const Target& target, std::string_view input);

}  // namespace lowbit::fuzz
