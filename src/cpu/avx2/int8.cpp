// Codes of up to five bits and E2M1 doubled, one byte plane of activations: vpmaddubsw.
#include "cpu/generic/ymm_dot.h"
#include "cpu/generic/ymm_paths.h"

namespace lowbit::cpu {
namespace {

template <bool kMany>
constexpr Path kPaths[kFormatCount] = {
    dot_path<Format::kSymInt4, 1, kMany>("avx2.int8.sym_int4"),
    dot_path<Format::kAsymInt4, 1, kMany>("avx2.int8.asym_int4"),
    dot_path<Format::kSymInt5, 1, kMany>("avx2.int8.sym_int5"),
    dot_path<Format::kAsymInt5, 1, kMany>("avx2.int8.asym_int5"),
    {},  // sym_int8: words.cpp
    {},  // nf3: words.cpp
    {},  // nf4: words.cpp
    dot_path<Format::kFp4, 1, kMany>("avx2.int8.fp4"),
};

}  // namespace

const Path* avx2::int8(Format format, bool many) {
  const int i = static_cast<int>(format);
  const Path& path = many ? kPaths<true>[i] : kPaths<false>[i];
  return path.run == nullptr ? nullptr : &path;
}

}  // namespace lowbit::cpu
