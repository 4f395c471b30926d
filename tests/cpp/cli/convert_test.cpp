// Conversions that are interrupted at each of their steps.
#include <csignal>
#include <cstdio>

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "cli/commands.h"
#include "io/os.h"
#include "support.h"

namespace lowbit::test {
namespace {

struct HookGuard {
  ~HookGuard() { os::set_fault_hook(nullptr); }
};

// Four matrices, one of which needs an exponent, and a vector, in bfloat16.
void write_checkpoint(const std::string& directory) {
  std::filesystem::create_directory(directory);
  std::string header = "{", data;
  std::mt19937 random(1);
  auto add = [&](const std::string& name, int rows, int cols, unsigned exponent) {
    std::size_t start = data.size();
    for (int i = 0; i < rows * cols; ++i) {
      data.push_back(static_cast<char>(random()));
      data.push_back(static_cast<char>(exponent | (random() & 0x80)));
    }
    header +=
        std::string(header.size() > 1 ? "," : "") + "\"" + name +
        "\":{\"dtype\":\"BF16\",\"shape\":[" +
        (cols > 1 ? std::to_string(rows) + "," + std::to_string(cols) : std::to_string(rows)) +
        "],\"data_offsets\":[" + std::to_string(start) + "," + std::to_string(data.size()) + "]}";
  };
  add("layers.0.q_proj.weight", 40, 70, 0x3C);
  add("layers.0.k_proj.weight", 33, 70, 0x3C);
  add("layers.0.v_proj.weight", 50, 70, 0x24);
  add("layers.0.o_proj.weight", 16, 70, 0x3C);
  add("layers.0.norm.weight", 70, 1, 0x3F);
  write_file(directory + "/model.safetensors", tensor_file(header + "}", data));
  write_file(directory + "/config.json", "{\"model_type\": \"x\", \"torch_dtype\": \"bfloat16\"}");
}

cli::ConvertArgs arguments(const std::string& source, const std::string& destination) {
  cli::ConvertArgs args;
  args.source = source;
  args.destination = destination;
  args.max_shard_bytes = 3000;
  args.max_memory = 24'000;  // chunks of a tile or two
  args.quiet = true;
  return args;
}

std::string contents(const std::string& directory) {
  std::string all;
  for (const std::string& name : names_in(directory))
    all += name + ":" + read_file(directory + "/" + name) + "\n";
  return all;
}

TEST(Convert, OneTensorNeedsAnExponent) {
  TemporaryDirectory directory;
  write_checkpoint(directory / "float");
  cli::convert(arguments(directory / "float", directory / "out"), serial_threads());
  SavedDirectory saved = open_saved(directory / "out");
  int exponents = 0;
  for (const SavedTensor& tensor : saved.manifest.tensors) exponents += tensor.exponent != 0;
  EXPECT_EQ(exponents, 1);
  EXPECT_GT(saved.manifest.files.size(), 3u);
}

TEST(Convert, AFailureAtAnyStepLeavesNothing) {
  HookGuard guard;
  TemporaryDirectory directory;
  write_checkpoint(directory / "float");
  const bool print = std::getenv("LOWBIT_PRINT_FAULTS") != nullptr;
  if (print) std::printf("\na conversion\n");
  for (int fail_at = 0;; ++fail_at) {
    int steps = 0;
    std::string failed;
    os::set_fault_hook([&](std::string_view step) {
      if (steps++ != fail_at) return;
      failed = step;
      throw Error(ErrorCode::kIo, "a fault");
    });
    bool threw = false;
    try {
      cli::convert(arguments(directory / "float", directory / "out"), serial_threads());
    } catch (const Error&) {
      threw = true;
    }
    os::set_fault_hook(nullptr);
    if (failed.empty()) {
      EXPECT_GT(fail_at, 30);  // the walk has seen every step
      break;
    }
    const bool is_there = std::filesystem::exists(directory / "out");
    if (print)
      std::printf("  error before  %2d %-16s -> %s\n", fail_at, failed.c_str(),
                  is_there ? "the save" : "nothing");
    if (!threw || is_there) {
      EXPECT_NO_THROW(open_saved(directory / "out")) << failed;
      for (const std::string& name : names_in(directory / "out"))
        EXPECT_FALSE(name.starts_with(".")) << failed << " left " << name;
    }
    std::filesystem::remove_all(directory / "out");
  }
}

#ifndef _WIN32
// What is there after a kill -9 is no save and no file of tensors; the next run of the same command
// ends with the bytes of one that was never killed. `make faults` prints the matrix.
TEST(Convert, KilledAtAnyStepTheNextRunEndsTheSame) {
  const bool print = std::getenv("LOWBIT_PRINT_FAULTS") != nullptr;
  TemporaryDirectory directory;
  write_checkpoint(directory / "float");
  cli::convert(arguments(directory / "float", directory / "whole"), serial_threads());
  const std::string expected = contents(directory / "whole");
  if (print) std::printf("\na conversion\n");
  std::size_t most_resumed = 0;
  for (int kill_at = 0;; ++kill_at) {
    const std::string out = directory / "out";
    std::filesystem::remove_all(out);
    std::fflush(nullptr);
    pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      int steps = 0;
      os::set_fault_hook([&](std::string_view step) {
        if (steps++ != kill_at) return;
        std::ofstream(directory / "last-step") << step;
        ::kill(::getpid(), SIGKILL);
      });
      cli::convert(arguments(directory / "float", out), serial_threads());
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) {
      ASSERT_EQ(WEXITSTATUS(status), 0);
      EXPECT_GT(kill_at, 30);  // the walk has seen every step
      break;
    }
    std::string outcome = "no save";
    std::size_t journal_lines = 0;
    try {
      open_saved(out);
      outcome = "the save";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kNotFound) << error.what();
    }
    if (std::filesystem::exists(out))
      for (const std::string& name : names_in(out)) {
        if (name.ends_with("-journal.part")) {
          std::string text = read_file(out + "/" + name);
          journal_lines = static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
        } else if (name.ends_with(".part") && outcome == "no save") {
          // Complete ones get their header before they are synced and renamed: from then on they
          // are what will be published, under a name that nobody opens.
          std::string text = read_file(out + "/" + name);
          bool headed = text.size() > 8 && text[0] != 0;
          if (!headed) {
            EXPECT_THROW(TensorFile::open(out + "/" + name), Error) << name;
          }
        }
      }
    std::size_t tensors = journal_lines > 0 ? journal_lines - 1 : 0;
    most_resumed = std::max(most_resumed, tensors);
    if (print)
      std::printf("  killed before %2d %-16s -> %s, tensors to take up: %zu\n", kill_at,
                  read_file(directory / "last-step").c_str(), outcome.c_str(), tensors);
    cli::convert(arguments(directory / "float", out), serial_threads());
    EXPECT_EQ(contents(out), expected) << "step " << kill_at;
  }
  EXPECT_EQ(most_resumed, 5u);
}
#endif

TEST(Convert, AnyMemoryGivesTheSameBytes) {
  TemporaryDirectory directory;
  write_checkpoint(directory / "float");
  cli::ConvertArgs args = arguments(directory / "float", directory / "small");
  cli::convert(args, serial_threads());
  args.destination = directory / "large";
  args.max_memory = 400'000'000;
  cli::convert(args, serial_threads());
  EXPECT_EQ(contents(directory / "small"), contents(directory / "large"));
}

}  // namespace
}  // namespace lowbit::test
