#!/usr/bin/env bash
# Fuzzes the readers of hostile files under AddressSanitizer and UndefinedBehaviorSanitizer.
#   scripts/fuzz.sh [TARGET ...]      all targets of tests/fuzz/targets.cpp unless some are named
# (inputs of up to MAX_LEN bytes, default 1024)
# Each runs for SECONDS_EACH (default 60) or, if RUNS is set, for that many executions. Inputs that
# found new paths are kept in build-fuzz/corpus; the seeds are in tests/fuzz/corpus.
# A unit that takes 200 s is a finding; less would blame inputs for a machine that pauses.
# Needs clang with libFuzzer (Debian: clang-14 libclang-rt-14-dev).
set -euo pipefail
cd "$(dirname "$0")/.."
targets=("$@")
[ ${#targets[@]} -gt 0 ] ||
  mapfile -t targets < <(sed -n '/kTargets\[\] = {/,/};/p' tests/fuzz/targets.cpp |
                         grep -o '{"[a-z0-9_]*"' | tr -d '{"')
compiler=$(command -v clang++-14 || command -v clang++ || true)
[ -n "$compiler" ] || { echo "fuzz: no clang++ here; install clang-14 and libclang-rt-14-dev" >&2; exit 1; }
limit=(-max_total_time="${SECONDS_EACH:-60}")
[ -z "${RUNS:-}" ] || limit=(-runs="$RUNS")
mkdir -p build-fuzz
flags=(-std=c++20 -O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Iinclude -Isrc -Itests/fuzz)
# The readers report their branches to libFuzzer. What only computes with what they accept is
# sanitized as they are, but reports none: its loops over weights would be most of the time.
readers=(src/io/*.cpp src/cli/{checkpoint,names}.cpp src/format/{format,checks,error,threads}.cpp)
others=(src/format/pack.cpp src/reference/{element,exponent,quantize,dequantize}.cpp
        src/cpu/{quantize,select,features}.cpp)
object_of() { echo "build-fuzz/$(dirname "$1" | tr / -)-$(basename "$1" .cpp).o"; }
compile() { "$compiler" "${flags[@]}" "${@:2}" -c "$1" -o "$(object_of "$1")"; }
objects=()
for source in "${readers[@]}"; do compile "$source" -fsanitize=fuzzer-no-link; done
for source in "${others[@]}"; do compile "$source"; done
for source in "${readers[@]}" "${others[@]}"; do objects+=("$(object_of "$source")"); done
for target in "${targets[@]}"; do
  "$compiler" "${flags[@]}" -fsanitize=fuzzer "-DLOWBIT_FUZZ_TARGET=\"$target\"" \
    tests/fuzz/targets.cpp "${objects[@]}" -o "build-fuzz/$target"
  mkdir -p "build-fuzz/corpus/$target"
  echo "== $target"
  status=0
  "build-fuzz/$target" "${limit[@]}" -timeout=200 -rss_limit_mb=2048 -max_len="${MAX_LEN:-1024}" \
    -artifact_prefix="build-fuzz/$target-" -print_final_stats=1 -verbosity=0 \
    "build-fuzz/corpus/$target" "tests/fuzz/corpus/$target" > "build-fuzz/$target.log" 2>&1 || status=$?
  grep -E "number_of_executed_units|average_exec_per_sec|ERROR|SUMMARY|Test unit written" "build-fuzz/$target.log" || true
  [ "$status" -ne 72 ] || { echo "fuzz: $target was interrupted" >&2; exit 1; }
  [ "$status" -eq 0 ] || { echo "fuzz: a finding in $target, see build-fuzz/$target.log" >&2; exit 1; }
done
