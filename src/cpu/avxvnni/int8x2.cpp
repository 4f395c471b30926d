// Formats with groups whose bytes are exact, two byte planes of activations: vpdpbusd.
#include "cpu/generic/ymm_dot.h"
#include "cpu/generic/ymm_paths.h"

namespace lowbit::cpu {
namespace {

template <bool kMany>
constexpr Path kPaths[kFormatCount] = {
    dot_path<Format::kSymInt4, 2, kMany>("avxvnni.int8x2.sym_int4"),
    dot_path<Format::kAsymInt4, 2, kMany>("avxvnni.int8x2.asym_int4"),
    dot_path<Format::kSymInt5, 2, kMany>("avxvnni.int8x2.sym_int5"),
    dot_path<Format::kAsymInt5, 2, kMany>("avxvnni.int8x2.asym_int5"),
    dot_path<Format::kSymInt8, 2, kMany>("avxvnni.int8x2.sym_int8"),
    {},  // nf3: wide.cpp
    {},  // nf4: wide.cpp
    dot_path<Format::kFp4, 2, kMany>("avxvnni.int8x2.fp4"),
};

}  // namespace

const Path* avxvnni::int8x2(Format format, bool many) {
  const int i = static_cast<int>(format);
  const Path& path = many ? kPaths<true>[i] : kPaths<false>[i];
  return path.run == nullptr ? nullptr : &path;
}

}  // namespace lowbit::cpu
