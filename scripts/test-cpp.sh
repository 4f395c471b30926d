#!/bin/sh
# Runs the C++ tests of a build folder: all of them with the instruction set that dispatch chooses,
# then those labelled per_isa once more with each other level this machine has.
set -eu
build=${1:?usage: test-cpp.sh BUILD_FOLDER}
jobs=$(nproc 2>/dev/null || echo 2)

ctest --test-dir "$build" --output-on-failure --parallel "$jobs" --no-tests=error

# Worst to best: the last one was just tested.
isas=$("$build/tests/cpp/lowbit_list_isas" | head -n -1)
for isa in $isas; do
  printf '\n-- LOWBIT_FORCE_ISA=%s\n' "$isa"
  LOWBIT_FORCE_ISA=$isa ctest --test-dir "$build" -L per_isa --output-on-failure \
    --parallel "$jobs" --no-tests=error
done
