#!/usr/bin/env bash
# Fuzzes the readers of hostile files under AddressSanitizer and UndefinedBehaviorSanitizer.
#   scripts/fuzz.sh [SECONDS per target, default 60] [TARGET ...]
# Inputs that found new paths are kept in build-fuzz/corpus; the seeds are in tests/fuzz/corpus.
# Needs clang with libFuzzer (Debian: clang-14 libclang-rt-14-dev).
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(json header raw_header manifest glob)
compiler=$(command -v clang++-14 || command -v clang++ || true)
[ -n "$compiler" ] || { echo "fuzz: no clang++ here; install clang-14 and libclang-rt-14-dev" >&2; exit 1; }
mkdir -p build-fuzz
flags=(-std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Iinclude -Isrc)
objects=()
for source in src/io/{json,digest,safetensors,manifest,os}.cpp src/cli/names.cpp \
              src/format/{format,checks,error,threads}.cpp src/reference/element.cpp; do
  object=build-fuzz/$(basename "$source" .cpp).o
  objects+=("$object")
  if [ ! "$object" -nt "$source" ]; then
    "$compiler" "${flags[@]}" -fsanitize=fuzzer-no-link -c "$source" -o "$object"
  fi
done
for target in "${targets[@]}"; do
  "$compiler" "${flags[@]}" -fsanitize=fuzzer "-DLOWBIT_FUZZ_TARGET=${target}_target" \
    tests/fuzz/targets.cpp "${objects[@]}" -o "build-fuzz/$target"
  mkdir -p "build-fuzz/corpus/$target" "tests/fuzz/corpus/$target"
  echo "== $target: $seconds s"
  "build-fuzz/$target" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=2048 -max_len=4096 \
    -print_final_stats=1 -verbosity=0 "build-fuzz/corpus/$target" "tests/fuzz/corpus/$target" 2>&1 |
    grep -E "number_of_executed_units|average_exec_per_sec|ERROR|SUMMARY|artifact" || true
  [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "fuzz: a finding in $target" >&2; exit 1; }
done
