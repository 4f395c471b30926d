#!/bin/sh
# Cross-compiles the core and its C++ tests to AArch64 and runs them under user-mode emulation.
#   scripts/test-aarch64.sh [--quick] [arguments of ctest]
# --quick: the NEON products against their bounds, which kernels are chosen, and that quantized bytes
# are those of x86 (about 3 minutes on two cores, all of it 20). Needs
# g++-aarch64-linux-gnu, qemu-user and the sources in libgtest-dev.
set -eu
jobs=$(nproc 2>/dev/null || echo 2)
targets="" tests="."
if [ "${1:-}" = --quick ]; then
  shift
  targets="--target lowbit_linear_tests lowbit_dispatch_tests lowbit_quantize_tests"
  tests="^(dispatch/|quantize/(Golden|.*(BytesEqualTheReference|TiesEqual))"
  tests="$tests|linear/.*(StaysWithinTheBounds|NonFinite|Extreme|RowBlocks|Empty).*/neon)"
fi
cd "$(dirname "$0")/.."
toolchain="$PWD/cmake/aarch64-linux-gnu.cmake"
prefix="$PWD/.cache/aarch64"
mkdir -p "$prefix/include"
if [ ! -e "$prefix/lib/libgtest.a" ]; then
  cmake -S /usr/src/googletest -B "$prefix/gtest" -G Ninja --toolchain "$toolchain" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_GMOCK=OFF -DCMAKE_INSTALL_PREFIX="$prefix" >/dev/null
  cmake --build "$prefix/gtest" --target install >/dev/null
fi
cp /usr/include/xxhash.h "$prefix/include/"  # header-only: the one file of the host that is portable
cmake -S . -B build-aarch64 -G Ninja --toolchain "$toolchain" -DLOWBIT_TESTS=ON \
  -DGTest_DIR="$prefix/lib/cmake/GTest" -DXXHASH_INCLUDE_DIR="$prefix/include"
# shellcheck disable=SC2086  # several words
cmake --build build-aarch64 --parallel "$jobs" $targets
ctest --test-dir build-aarch64 --output-on-failure --parallel "$jobs" --no-tests=error \
  -R "$tests" "$@"
