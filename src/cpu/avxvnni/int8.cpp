// Formats with groups, one byte plane of activations: vpdpbusd on codes or table bytes.
#include "cpu/generic/ymm_dot.h"
#include "cpu/generic/ymm_paths.h"

namespace lowbit::cpu {
namespace {

template <bool kMany>
constexpr Path kPaths[kFormatCount] = {
    dot_path<Format::kSymInt4, 1, kMany>("avxvnni.int8.sym_int4"),
    dot_path<Format::kAsymInt4, 1, kMany>("avxvnni.int8.asym_int4"),
    dot_path<Format::kSymInt5, 1, kMany>("avxvnni.int8.sym_int5"),
    dot_path<Format::kAsymInt5, 1, kMany>("avxvnni.int8.asym_int5"),
    dot_path<Format::kSymInt8, 1, kMany>("avxvnni.int8.sym_int8"),
    dot_path<Format::kNf3, 1, kMany>("avxvnni.int8.nf3"),
    dot_path<Format::kNf4, 1, kMany>("avxvnni.int8.nf4"),
    dot_path<Format::kFp4, 1, kMany>("avxvnni.int8.fp4"),
};

}  // namespace

const Path* avxvnni::int8(Format format, bool many) {
  const int i = static_cast<int>(format);
  const Path& path = many ? kPaths<true>[i] : kPaths<false>[i];
  return path.run == nullptr ? nullptr : &path;
}

}  // namespace lowbit::cpu
