#!/usr/bin/env bash
# Builds the file code and its tests for another system and runs them here, emulated.
#   scripts/test-files-elsewhere.sh windows|s390x|aarch64 ...
# Needs, as Debian packages, libgtest-dev and libxxhash-dev besides
#   windows  g++-mingw-w64-x86-64-posix wine64 wine
#   s390x    g++-s390x-linux-gnu qemu-user     (big-endian)
#   aarch64  g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,7p' "$0"; exit 2; }
googletest=/usr/src/googletest/googletest
for system in "$@"; do
  folder=build-$system-files
  mkdir -p "$folder/include"
  cp /usr/include/xxhash.h /usr/include/xxh3.h "$folder/include/"  # not the rest of /usr/include
  link=(-static)
  case $system in
    windows)
      compiler=x86_64-w64-mingw32-g++-posix
      run=(env WINEPREFIX="$PWD/$folder/wine" WINEDEBUG=-all wine)
      program=$folder/io_tests.exe ;;
    s390x | aarch64)
      compiler=$system-linux-gnu-g++
      run=("qemu-$system")
      program=$folder/io_tests
      link+=(-pthread) ;;
    *) echo "test-files-elsewhere: unknown system $system" >&2; exit 2 ;;
  esac
  for tool in "$compiler" "${run[${#run[@]} - 1]}"; do
    command -v "$tool" >/dev/null || { echo "test-files-elsewhere: no $tool here" >&2; exit 1; }
  done
  flags=(-std=c++20 -O1 -Wall -ffp-contract=off -Iinclude -Isrc -idirafter "$folder/include"
         -isystem "$googletest/include" -I"$googletest")
  objects=()
  for source in src/io/*.cpp src/cli/{checkpoint,names}.cpp src/cpu/{quantize,select,features}.cpp \
                src/reference/{element,exponent,quantize,dequantize}.cpp \
                src/format/{format,checks,error,threads,pack}.cpp tests/cpp/io/*_test.cpp \
                "$googletest"/src/gtest-all.cc "$googletest"/src/gtest_main.cc; do
    object=$folder/$(dirname "$source" | tr / -)-$(basename "${source%.*}").o
    objects+=("$object")
    [ "$object" -nt "$source" ] || "$compiler" "${flags[@]}" -c "$source" -o "$object"
  done
  "$compiler" "${objects[@]}" "${link[@]}" -o "$program"
  echo "== $system"
  "${run[@]}" "$program" --gtest_brief=1 "--gtest_filter=${FILTER:-*}"
done
