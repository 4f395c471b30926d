#!/bin/sh
# Runs the C++ tests of a build folder: all of them with the instruction set that dispatch chooses,
# then those labelled per_isa once more with each other level this machine has.
set -eu
build=${1:?usage: test-cpp.sh BUILD_FOLDER}
jobs=$(nproc 2>/dev/null || echo 2)

ctest --test-dir "$build" --output-on-failure --parallel "$jobs" --no-tests=error

isas=$(.venv/bin/python -c '
from ipex_llm import ops
active, available = ops.isa(), ops.available_isas()
print(*[name for name in available if name != active])')
for isa in $isas; do
  printf '\n-- LOWBIT_FORCE_ISA=%s\n' "$isa"
  LOWBIT_FORCE_ISA=$isa ctest --test-dir "$build" -L per_isa --output-on-failure \
    --parallel "$jobs" --no-tests=error
done
