#!/bin/sh
# Cross-compiles the core and its C++ tests to AArch64 and runs them under user-mode emulation.
# Needs g++-aarch64-linux-gnu, qemu-user and the sources in libgtest-dev; every other argument goes
# to ctest. Emulated: minutes, not seconds.
set -eu
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
cmake --build build-aarch64
ctest --test-dir build-aarch64 --output-on-failure "$@"
