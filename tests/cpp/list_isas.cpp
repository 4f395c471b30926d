#include <cstdio>

#include "lowbit/dispatch.h"

int main() {
  for (std::string_view name : lowbit::available_isas())
    std::printf("%.*s\n", static_cast<int>(name.size()), name.data());
}
