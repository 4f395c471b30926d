#include "lowbit/dispatch.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <set>
#include <string>

#include "cpu/linear_driver.h"
#include "cpu/select.h"
#include "lowbit/error.h"

namespace lowbit {
namespace {

using cpu::Features;
using cpu::Isa;

TEST(Dispatch, AvailableLevelsAreCompiledAndScalarIsAlwaysThere) {
  const std::set<std::string_view> compiled(compiled_isas().begin(), compiled_isas().end());
  for (std::string_view name : available_isas()) EXPECT_TRUE(compiled.contains(name)) << name;
  EXPECT_EQ(available_isas().front(), "scalar");
}

TEST(Dispatch, ForcingChangesTheLevelInForceAndBack) {
  for (std::string_view name : available_isas()) {
    force_isa(name);
    EXPECT_EQ(active_isa(), name);
    EXPECT_EQ(describe_isa().rfind(name, 0), 0u) << describe_isa();
  }
  force_isa("");
  const char* forced = std::getenv("LOWBIT_FORCE_ISA");
  EXPECT_EQ(active_isa(),
            forced != nullptr && *forced != 0 ? std::string_view(forced) : available_isas().back());
}

TEST(Dispatch, UnknownNamesAreRefusedWithTheListOfThoseThatExist) {
  try {
    force_isa("avx9000");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kValue);
    const std::string text = error.what();
    EXPECT_NE(text.find("avx9000"), std::string::npos) << text;
    for (std::string_view name : available_isas()) {
      EXPECT_NE(text.find(name), std::string::npos) << text;
    }
  }
}

// Selection is a pure function of the machine: any machine can be asked about on any other.
TEST(Dispatch, ALevelThatTheMachineLacksIsRefused) {
  for (std::string_view name : compiled_isas()) {
    if (name == "scalar") continue;
    EXPECT_THROW(cpu::resolve_isa(name, "test", Features{}), Error) << name;
  }
  EXPECT_EQ(cpu::resolve_isa("scalar", "test", Features{}), Isa::kScalar);
  EXPECT_EQ(cpu::best_isa(Features{}), Isa::kScalar);
}

#if defined(__x86_64__)
TEST(Dispatch, ChoosesTheBestCompiledLevel) {
  Features f;
  f.avx2 = true;
  EXPECT_EQ(cpu::isa_info(cpu::best_isa(f)).name, "avx2");
  f.avxvnni = true;
  EXPECT_EQ(cpu::isa_info(cpu::best_isa(f)).name, "avxvnni");
  f.avx512vnni = true;
  EXPECT_EQ(cpu::isa_info(cpu::best_isa(f)).name, "avx512vnni");
  f.avx512bf16 = true;
  EXPECT_EQ(cpu::isa_info(cpu::best_isa(f)).name, "avx512bf16");
  f.amx = true;
  const std::string_view amx = cpu::isa_info(Isa::kAmx).compiled ? "amx" : "avx512bf16";
  EXPECT_EQ(cpu::isa_info(cpu::best_isa(f)).name, amx);
}

TEST(Dispatch, PathsAreWhatTheTableOfPrecisionsSays) {
  const auto name = [](Isa isa, Format format, Precision precision, std::int64_t m) {
    return std::string(cpu::select_linear(isa, make_layout(format, 64, 256), precision, m).name);
  };
  const Isa best = Isa::kAvx512Bf16;
  EXPECT_EQ(name(best, Format::kSymInt4, Precision::kAuto, 1), "avx512vnni.int8x2.decode.sym_int4");
  EXPECT_EQ(name(best, Format::kSymInt4, Precision::kAuto, 512), "avx512vnni.int8.panel.sym_int4");
  EXPECT_EQ(name(best, Format::kNf4, Precision::kBf16, 512), "avx512bf16.bf16.panel.nf4");
  EXPECT_EQ(name(best, Format::kNf4, Precision::kFp32, 512), "avx512vnni.fp32.panel.nf4");
  EXPECT_EQ(name(best, Format::kBf16, Precision::kAuto, 512), "avx512bf16.bf16.panel.bf16");
  EXPECT_EQ(name(best, Format::kBf16, Precision::kAuto, 1), "avx512vnni.fp32.decode.bf16");
  EXPECT_EQ(name(Isa::kAvx2, Format::kSymInt4, Precision::kAuto, 1), "avx2.int8x2.sym_int4");
  EXPECT_EQ(name(Isa::kAvx2, Format::kFp4, Precision::kAuto, 64), "avx2.int8.fp4");
  EXPECT_EQ(name(Isa::kAvx2, Format::kSymInt8, Precision::kInt8, 64), "avx2.int16.sym_int8");
  EXPECT_EQ(name(Isa::kAvx2, Format::kNf4, Precision::kInt8, 64), "avx2.int16.nf4");
  EXPECT_EQ(name(Isa::kAvx2, Format::kNf4, Precision::kFp32, 8), "avx2.int16x2.nf4");
  EXPECT_EQ(name(Isa::kAvx2, Format::kNf4, Precision::kFp32, 64), "avx2.fp32.panel.nf4");
  EXPECT_EQ(name(Isa::kAvx2, Format::kNf3, Precision::kInt8, 11), "avx2.int16.nf3");
  EXPECT_EQ(name(Isa::kAvx2, Format::kNf3, Precision::kInt8, 12), "avx2.fp32.panel.nf3");
  EXPECT_EQ(name(Isa::kAvx2, Format::kFp16, Precision::kAuto, 64), "avx2.fp32.panel.fp16");
  EXPECT_EQ(name(Isa::kAvxVnni, Format::kNf4, Precision::kFp32, 64), "avx2.fp32.panel.nf4");
  EXPECT_EQ(name(Isa::kAvx2, Format::kNf3, Precision::kAuto, 1), "avx2.fp32.nf3");
  EXPECT_EQ(name(Isa::kAvx2, Format::kFp16, Precision::kAuto, 1), "avx2.fp32.fp16");
  // The sibling: grouped types are its own, float types those of avx2.
  EXPECT_EQ(name(Isa::kAvxVnni, Format::kSymInt8, Precision::kAuto, 1), "avxvnni.int8x2.sym_int8");
  EXPECT_EQ(name(Isa::kAvxVnni, Format::kNf3, Precision::kAuto, 1), "avxvnni.int8x2.nf3");
  EXPECT_EQ(name(Isa::kAvxVnni, Format::kNf3, Precision::kAuto, 512), "avxvnni.int8.nf3");
  EXPECT_EQ(name(Isa::kAvxVnni, Format::kAsymInt5, Precision::kBf16, 64),
            "avxvnni.int8x2.asym_int5");
  EXPECT_EQ(name(Isa::kAvxVnni, Format::kFp8E4M3, Precision::kInt8, 7), "avx2.fp32.fp8_e4m3");
  if (cpu::isa_info(Isa::kAmx).compiled) {
    EXPECT_EQ(name(Isa::kAmx, Format::kAsymInt4, Precision::kAuto, 1),
              "avx512vnni.int8x2.decode.asym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kAsymInt4, Precision::kAuto, 2), "amx.int8x2.few.asym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kAsymInt4, Precision::kAuto, 5), "amx.int8.few.asym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kAsymInt4, Precision::kAuto, 16), "amx.int8.few.asym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kAsymInt4, Precision::kAuto, 17), "amx.int8.panel.asym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kAsymInt4, Precision::kFp32, 8), "amx.int8x2.few.asym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf4, Precision::kAuto, 1), "avx512vnni.int8x2.decode.nf4");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf4, Precision::kAuto, 2), "amx.int8.few.nf4");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf3, Precision::kAuto, 2), "avx512vnni.int8.decode.nf3");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf3, Precision::kAuto, 3), "amx.int8.few.nf3");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf3, Precision::kFp32, 2), "amx.int8x2.few.nf3");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf3, Precision::kInt8, 64), "amx.int8.panel.nf3");
  }
  EXPECT_EQ(name(Isa::kScalar, Format::kNf3, Precision::kInt8, 7), "scalar.fp32");
  if (!cpu::isa_info(Isa::kAmx).compiled) return;
  // Tiles; many tokens by expanded weights, one or two by the kernels without.
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E4M3, Precision::kAuto, 1),
            "avx512vnni.fp32.decode.fp8_e4m3");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E4M3, Precision::kAuto, 4), "amx.bf16x2.few.fp8_e4m3");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E4M3, Precision::kInt8, 4), "amx.bf16.few.fp8_e4m3");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E4M3, Precision::kAuto, 5), "amx.bf16.few.fp8_e4m3");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E4M3, Precision::kAuto, 17), "amx.bf16.pass.fp8_e4m3");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E5M2, Precision::kFp32, 8), "amx.bf16x2.few.fp8_e5m2");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp8E5M2, Precision::kFp32, 9),
            "avx512vnni.fp32.panel.fp8_e5m2");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp16, Precision::kFp32, 8), "avx512vnni.fp32.decode.fp16");
  EXPECT_EQ(name(Isa::kAmx, Format::kFp16, Precision::kInt8, 16), "amx.bf16.few.fp16");
  EXPECT_EQ(name(Isa::kAmx, Format::kBf16, Precision::kAuto, 4), "avx512vnni.fp32.decode.bf16");
  EXPECT_EQ(name(Isa::kAmx, Format::kSymInt4, Precision::kBf16, 12),
            "avx512vnni.int8x2.decode.sym_int4");
  EXPECT_EQ(name(Isa::kAmx, Format::kSymInt4, Precision::kBf16, 13), "amx.bf16.pass.sym_int4");
  EXPECT_EQ(name(Isa::kAmx, Format::kNf4, Precision::kBf16, 7), "amx.bf16.pass.nf4");
  EXPECT_EQ(name(Isa::kAmx, Format::kNf4, Precision::kBf16, 128), "amx.bf16.pass.nf4");
  EXPECT_EQ(name(Isa::kAmx, Format::kNf4, Precision::kBf16, 129), "amx.bf16.panel.nf4");
  for (std::int64_t m : {17, 32, 48}) {
    EXPECT_EQ(name(Isa::kAmx, Format::kSymInt4, Precision::kBf16, m), "amx.bf16.pass.sym_int4");
    EXPECT_EQ(name(Isa::kAmx, Format::kNf3, Precision::kBf16, m), "amx.bf16.pass.nf3");
    EXPECT_EQ(name(Isa::kAmx, Format::kFp8E5M2, Precision::kBf16, m), "amx.bf16.pass.fp8_e5m2");
    EXPECT_EQ(name(Isa::kAmx, Format::kFp16, Precision::kBf16, m), "amx.bf16.pass.fp16");
    EXPECT_EQ(name(Isa::kAmx, Format::kBf16, Precision::kBf16, m), "amx.bf16.panel.bf16");
  }
  EXPECT_EQ(name(Isa::kAmx, Format::kFp16, Precision::kBf16, 16), "amx.bf16.few.fp16");
  EXPECT_EQ(name(Isa::kAmx, Format::kBf16, Precision::kAuto, 48), "amx.bf16.panel.bf16");
  EXPECT_EQ(name(Isa::kAmx, Format::kBf16, Precision::kAuto, 49), "amx.bf16.pass.bf16");
  EXPECT_EQ(name(Isa::kAmx, Format::kNf4, Precision::kAuto, 512), "amx.int8.panel.nf4");
}
#endif

}  // namespace
}  // namespace lowbit
