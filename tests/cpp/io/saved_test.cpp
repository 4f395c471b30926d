// Manifests and saved directories: what is written, what is refused, what survives.
#include <csignal>
#include <thread>

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "io/os.h"
#include "support.h"

namespace lowbit::test {
namespace {

const SavedTensor& tensor_named(const Manifest& manifest, const std::string& name) {
  for (const SavedTensor& tensor : manifest.tensors)
    if (tensor.name == name) return tensor;
  throw std::runtime_error("no " + name);
}

// `manifest` with one text replaced and its digest made right again: what an attacker would do.
std::string edited(const std::string& manifest, const std::string& from, const std::string& to) {
  std::size_t at = manifest.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  std::string text = manifest;
  text.replace(at, from.size(), to);
  std::size_t end = text.size() - 32 - 4;
  std::string head = text.substr(0, end);
  return head + digest_text(digest(std::as_bytes(std::span(head)))) + "\"\n}\n";
}

TEST(Saved, HoldsWhatWasWritten) {
  TemporaryDirectory directory;
  Manifest manifest = save_small(directory.path(), 1);
  EXPECT_TRUE(holds_small(directory.path(), 1));
  SavedDirectory saved = open_saved(directory.path());
  EXPECT_EQ(write_manifest(saved.manifest), write_manifest(manifest));
  EXPECT_EQ(saved.manifest.options, "{\"low_bit\": \"sym_int4\"}");
  EXPECT_EQ(saved.manifest.ties.at(0).second, "z.weight");
  EXPECT_EQ(tensor_named(saved.manifest, "z.weight").exponent, -3);
  EXPECT_EQ(tensor_named(saved.manifest, "z.weight").group_size, 64);
  EXPECT_EQ(tensor_named(saved.manifest, "conv.weight").stored_shape,
            (std::vector<std::int64_t>{16, 36}));
  ASSERT_EQ(manifest.files.size(), 1u);
  EXPECT_EQ(names_in(directory.path()),
            (std::vector<std::string>{"config.json", "ipex_llm.json", manifest.files[0].name}));
}

TEST(Saved, PackedTensorsComeFirstAndAligned) {
  TemporaryDirectory directory;
  save_small(directory.path());
  SavedDirectory saved = open_saved(directory.path());
  const TensorFile& file = *saved.files.at(0);
  EXPECT_EQ(file.header().bytes % 4096, 0u);
  bool plain_seen = false;
  for (const FileTensor& entry : file.header().tensors) {
    bool packed = tensor_named(saved.manifest, entry.name).format.has_value();
    EXPECT_FALSE(packed && plain_seen) << entry.name;
    plain_seen |= !packed;
    if (packed) {
      EXPECT_EQ(entry.offset % 64, 0u) << entry.name;
      EXPECT_EQ(entry.dtype, FileDType::kU8);
    }
    EXPECT_EQ(entry.offset % static_cast<std::uint64_t>(file_dtype_info(entry.dtype).bytes), 0u)
        << entry.name;
  }
}

TEST(Saved, TwoSavesAreByteEqual) {
  TemporaryDirectory a, b;
  save_small(a.path(), 5, 2000);
  save_small(b.path(), 5, 2000);
  ASSERT_EQ(names_in(a.path()), names_in(b.path()));
  for (const std::string& name : names_in(a.path()))
    EXPECT_EQ(read_file(a / name), read_file(b / name)) << name;
}

// The format on disk: if this fails, saves that users have do not load any more, or the manifest
// has changed and needs a new version. Equal on Windows and big-endian machines
// (scripts/test-files-elsewhere.sh).
TEST(Saved, BytesArePinned) {
  TemporaryDirectory directory;
  save_small(directory.path(), 7, 8000);
  std::string all;
  for (const std::string& name : names_in(directory.path()))
    all += name + ":" + read_file(directory / name);
  EXPECT_EQ(digest_text(digest(std::as_bytes(std::span(all)))), "35b26106c6af8ec13f1b1c0119be2de3");
}

TEST(Saved, ShardsAreNumberedAndBounded) {
  TemporaryDirectory directory;
  Manifest manifest = save_small(directory.path(), 0, 2000);
  ASSERT_GT(manifest.files.size(), 2u);
  for (std::size_t i = 0; i < manifest.files.size(); ++i) {
    char part[64];
    std::snprintf(part, sizeof part, "-%05zu-of-%05zu.safetensors", i + 1, manifest.files.size());
    EXPECT_TRUE(manifest.files[i].name.ends_with(part)) << manifest.files[i].name;
    auto file = TensorFile::open(directory / manifest.files[i].name);
    std::uint64_t data = file->bytes() - file->header().bytes;
    EXPECT_TRUE(data <= 2000 || file->header().tensors.size() == 1);
  }
  EXPECT_TRUE(holds_small(directory.path(), 0));
}

TEST(Saved, AModelWithoutTensorsCanBeSaved) {
  TemporaryDirectory directory;
  SaveRequest request;
  request.directory = directory / "deep/er";
  SaveWriter(std::move(request)).commit();
  EXPECT_TRUE(open_saved(directory / "deep/er").manifest.tensors.empty());
}

TEST(Saved, AnotherSaveReplacesTheFirst) {
  TemporaryDirectory directory;
  save_small(directory.path(), 1, 2000);
  SavedDirectory mapped = open_saved(directory.path());
  Manifest second = save_small(directory.path(), 2);
  EXPECT_TRUE(holds_small(directory.path(), 2));
  const std::vector<std::string> names{"config.json", "ipex_llm.json", second.files[0].name};
  if (os::kReplacesMappedFiles) {
    EXPECT_EQ(names_in(directory.path()), names);
  }
  // What was mapped before is still the first save.
  std::span<std::byte> data = mapped.data(0);
  EXPECT_EQ(std::string(reinterpret_cast<char*>(data.data()), data.size()),
            content(mapped.manifest.tensors[0].name, data.size(), 1));
  // Files that could not go while they were mapped go with the next save.
  mapped = SavedDirectory();
  save_small(directory.path(), 2);
  EXPECT_EQ(names_in(directory.path()), names);
}

TEST(Saved, SavingTheSameAgainChangesNothing) {
  TemporaryDirectory directory;
  save_small(directory.path(), 1);
  std::string before = read_file(directory / "ipex_llm.json");
  save_small(directory.path(), 1);
  EXPECT_EQ(read_file(directory / "ipex_llm.json"), before);
  EXPECT_TRUE(holds_small(directory.path(), 1));
}

TEST(Saved, AnUnfinishedWriterLeavesNothing) {
  TemporaryDirectory directory;
  {
    SaveWriter writer(small_request(directory / "new/deep"));
    EXPECT_TRUE(std::filesystem::exists(directory / "new/deep"));
    Error error = caught([&] { writer.commit(); });
    EXPECT_NE(std::string(error.what()).find("is not complete"), std::string::npos);
  }
  EXPECT_TRUE(names_in(directory.path()).empty());
}

TEST(Saved, TheWriterRefusesWhatItCannotWrite) {
  TemporaryDirectory directory;
  auto refused = [&](auto change, const char* expected) {
    SaveRequest request = small_request(directory.path());
    change(request);
    Error error = caught([&] { SaveWriter writer(std::move(request)); });
    EXPECT_EQ(error.code(), ErrorCode::kValue);
    EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
    EXPECT_TRUE(names_in(directory.path()).empty());
  };
  refused([](SaveRequest& r) { r.manifest.tensors[0].name = ""; }, "cannot be a tensor's name");
  refused([](SaveRequest& r) { r.manifest.tensors[0].name = "\xff"; }, "cannot be a tensor's name");
  refused([](SaveRequest& r) { r.manifest.tensors[0].name = "flag"; }, "given twice");
  refused([](SaveRequest& r) { r.manifest.ties = {{"x", "nobody"}}; }, "is tied to");
  refused([](SaveRequest& r) { r.manifest.ties = {{"flag", "odd"}}; }, "is tied to");
  refused([](SaveRequest& r) { r.max_shard_bytes = 0; }, "max_shard_size");
  refused([](SaveRequest& r) { r.manifest.tensors[0].shape = {INT64_MAX, 70}; }, "");
  refused([](SaveRequest& r) { r.manifest.tensors[0].shape = {70}; }, "2 dimensions");
  refused([](SaveRequest& r) { r.manifest.tensors[2].stored_shape = {16, 37}; }, "not the size of");
  for (const char* name : {"", "../x", "a/b/c", "a\\b", "C:x", ".hidden", "ipex_llm.json"})
    refused([&](SaveRequest& r) { r.extra_files = {{name, ""}}; }, "extra file");
}

TEST(Saved, TheWriterCountsBytes) {
  TemporaryDirectory directory;
  SaveWriter writer(small_request(directory.path()));
  std::string bytes(stored_bytes(writer.tensors()[writer.order()[0]]) + 1, 'x');
  Error error = caught([&] { writer.write(std::as_bytes(std::span(bytes))); });
  EXPECT_NE(std::string(error.what()).find("expected"), std::string::npos);
}

// ---- damage ------------------------------------------------------------------------------------

TEST(Saved, EveryFlippedByteIsFound) {
  TemporaryDirectory directory;
  Manifest manifest = save_small(directory.path(), 1, 8000);
  std::vector<std::string> names{"ipex_llm.json"};
  for (const SavedFile& file : manifest.files) names.push_back(file.name);
  std::mt19937 random(7);
  for (const std::string& name : names) {
    std::string path = directory / name, good = read_file(path);
    // All of the manifest, and of the weight files a part: opening costs the whole file each time.
    std::size_t step = name == "ipex_llm.json" ? 1 : 41;
    for (std::size_t at = random() % step; at < good.size(); at += step) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << random() % 8));
      write_file(path, bad);
      try {
        open_saved(directory.path());
        ADD_FAILURE() << name << " byte " << at << " flipped, and it loads";
      } catch (const Error& error) {
        EXPECT_TRUE(error.code() == ErrorCode::kCorrupt || error.code() == ErrorCode::kValue ||
                    error.code() == ErrorCode::kNotFound)
            << error.what();
      }
    }
    write_file(path, good);
  }
  EXPECT_TRUE(holds_small(directory.path(), 1));
}

TEST(Saved, EveryTruncationIsFound) {
  TemporaryDirectory directory;
  Manifest manifest = save_small(directory.path(), 1);
  for (const std::string& name : {manifest.files[0].name, std::string("ipex_llm.json")}) {
    std::string path = directory / name, good = read_file(path);
    for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{8}, std::size_t{9},
                             good.size() / 2, good.size() - 1}) {
      write_file(path, good.substr(0, size));
      for (bool mmap : {true, false})
        EXPECT_EQ(
            caught([&] { open_saved(directory.path(), {.mmap = mmap, .verify = false}); }).code(),
            ErrorCode::kCorrupt)
            << name << " cut to " << size;
    }
    write_file(path, good);
  }
}

TEST(Saved, WithoutVerifyingOnlyTheStructureIsChecked) {
  TemporaryDirectory directory;
  Manifest manifest = save_small(directory.path(), 1);
  std::string path = directory / manifest.files[0].name, bytes = read_file(path);
  bytes[5000] = static_cast<char>(bytes[5000] ^ 1);
  write_file(path, bytes);
  EXPECT_NO_THROW(open_saved(directory.path(), {.verify = false}));
  Error error = caught([&] { open_saved(directory.path()); });
  EXPECT_NE(std::string(error.what()).find("digest does not match"), std::string::npos);
  EXPECT_NE(std::string(error.what()).find("tensor "), std::string::npos) << error.what();
}

TEST(Saved, MissingThingsAreNamed) {
  TemporaryDirectory directory;
  Error none = caught([&] { open_saved(directory / "nowhere"); });
  EXPECT_EQ(none.code(), ErrorCode::kNotFound);
  EXPECT_NE(std::string(none.what()).find("does not exist"), std::string::npos);
  Error empty = caught([&] { open_saved(directory.path()); });
  EXPECT_EQ(empty.code(), ErrorCode::kNotFound);
  EXPECT_NE(std::string(empty.what()).find("ipex_llm.json"), std::string::npos);
  write_file(directory / "config.json", "{}");
  Error foreign = caught([&] { open_saved(directory.path()); });
  EXPECT_NE(std::string(foreign.what()).find("optimize_model"), std::string::npos)
      << foreign.what();

  Manifest manifest = save_small(directory.path(), 1, 2000);
  std::filesystem::remove(directory / manifest.files[1].name);
  Error shard = caught([&] { open_saved(directory.path()); });
  EXPECT_EQ(shard.code(), ErrorCode::kNotFound);
  EXPECT_NE(std::string(shard.what()).find(manifest.files[1].name), std::string::npos);
}

// ---- hostile manifests: the digest is right, the contents are not ------------------------------

TEST(Manifest, RefusesWhatItMust) {
  TemporaryDirectory directory;
  Manifest manifest = save_small(directory.path(), 1);
  std::string good = read_file(directory / "ipex_llm.json");
  ASSERT_NO_THROW(parse_manifest(edited(good, "sym_int4", "sym_int5"), "m"));  // edited() works
  const std::string file = manifest.files[0].name;
  struct {
    const char *from, *to, *expected;
  } cases[] = {
      {"\"format\": \"ipex-llm low-bit\"", "\"format\": \"pt\"", "not the manifest"},
      {"\"format_version\": 1", "\"format_version\": 0", "positive"},
      {"\"format_version\": 1", "\"format_version\": \"1\"", "positive"},
      {"\"options\"", "\"more\": 1, \"options\"", "does not know"},
      {"{\"file\": 0, ", "{\"file\": 1, ", "expected 0 to 0"},
      {"{\"file\": 0, ", "{\"file\": -1, ", "expected 0 to 0"},
      {"{\"file\": 0, ", "{\"file\": 0.0, ", "not an integer"},
      {"{\"file\": 0, ", "{", "has no 'file'"},
      {"{\"file\": 0, ", "{\"x\": 0, \"file\": 0, ", "does not know"},
      {"\"low_bit\": \"nf3\"", "\"low_bit\": \"nf5\"", "nf5"},
      {"\"group_size\": 64", "\"group_size\": 48", "48"},
      {"\"exponent\": -3", "\"exponent\": -5000", "expected -4096 to 4096"},
      {"\"shape\": [3, 17, 33]", "\"shape\": [3, 4294967296, 4294967296]", "63 bits"},
      {"\"shape\": [3, 17, 33]", "\"shape\": [561]", "2 dimensions"},
      {"\"shape\": [3, 17, 33]", "\"shape\": [-3, 17, 33]", "sizes"},
      {"\"stored_shape\": [16, 36]", "\"stored_shape\": [16, 37]", "not the size of"},
      {"\"dtype\": \"bfloat16\"", "\"dtype\": \"float128\"", "unknown dtype"},
      {"\"head.weight\": \"z.weight\"", "\"head.weight\": \"nobody\"", "not saved"},
      {"\"head.weight\": \"z.weight\"", "\"odd\": \"z.weight\"", "a tensor itself"},
      {"\"head.weight\": \"z.weight\"", "\"head.weight\": 1", "not tied to a name"},
      {"\"z.weight\": {", "\"a.weight\": {", "appears twice"},
      {"\"bytes\": ", "\"bytes\": -", "expected 0"},
  };
  for (const auto& c : cases) {
    Error error = caught([&] { parse_manifest(edited(good, c.from, c.to), "m"); });
    EXPECT_EQ(error.code(), ErrorCode::kCorrupt) << c.to;
    EXPECT_NE(std::string(error.what()).find(c.expected), std::string::npos)
        << c.to << ": " << error.what();
  }
  for (const std::string& name :
       {std::string("../") + file, std::string("/etc/passwd"), std::string("a/") + file,
        std::string("C:\\\\x"), std::string("config.json"), std::string("CON"), std::string(""),
        file.substr(0, 20) + file}) {
    Error error = caught([&] { parse_manifest(edited(good, file, name), "m"); });
    EXPECT_NE(std::string(error.what()).find("not the name of a weight file"), std::string::npos)
        << name << ": " << error.what();
  }
}

TEST(Manifest, OfANewerVersionAsksForANewerLibrary) {
  TemporaryDirectory directory;
  save_small(directory.path(), 1);
  std::string good = read_file(directory / "ipex_llm.json");
  // Whatever else a newer version has, this is what must be said.
  for (const std::string& text :
       {edited(good, "\"format_version\": 1", "\"format_version\": 2"),
        std::string("{\"format\": \"ipex-llm low-bit\", \"format_version\": 7, \"new\": []}")}) {
    Error error = caught([&] { parse_manifest(text, "m"); });
    EXPECT_EQ(error.code(), ErrorCode::kValue);
    EXPECT_NE(std::string(error.what()).find("install a newer"), std::string::npos);
  }
}

TEST(Manifest, MustAgreeWithTheFiles) {
  TemporaryDirectory directory;
  save_small(directory.path(), 1);
  std::string good = read_file(directory / "ipex_llm.json");
  struct {
    const char *from, *to, *expected;
  } cases[] = {
      {"\"odd\": {", "\"even\": {", "has no tensor"},
      {"\"shape\": [20, 70]", "\"shape\": [20, 700]", "the manifest asks for"},
      {"\"shape\": [5]", "\"shape\": [1, 5]", "the manifest asks for"},
      {"\"dtype\": \"int64\"", "\"dtype\": \"float64\"", "the manifest asks for"},
      {"\"bytes\": ", "\"bytes\": 9", "is the file complete"},
      {"\"header\": \"", "\"header\": \"0", "32 lower-case hex"},
  };
  for (const auto& c : cases) {
    write_file(directory / "ipex_llm.json", edited(good, c.from, c.to));
    Error error = caught([&] { open_saved(directory.path(), {.verify = false}); });
    EXPECT_EQ(error.code(), ErrorCode::kCorrupt) << c.to;
    EXPECT_NE(std::string(error.what()).find(c.expected), std::string::npos)
        << c.to << ": " << error.what();
  }
}

TEST(Manifest, ATensorThatIsNotListedIsRefused) {
  TemporaryDirectory directory;
  save_small(directory.path(), 1);
  Manifest manifest = open_saved(directory.path()).manifest;
  manifest.tensors.erase(manifest.tensors.begin() + 3);
  write_file(directory / "ipex_llm.json", write_manifest(manifest));
  Error error = caught([&] { open_saved(directory.path()); });
  EXPECT_NE(std::string(error.what()).find("the manifest lists"), std::string::npos);
}

TEST(Saved, APackedTensorThatIsNotAlignedIsRefused) {
  TemporaryDirectory directory;
  SavedTensor odd, packed;
  odd.name = "odd";
  odd.dtype = FileDType::kU8;
  odd.shape = {3};
  packed.name = "packed";
  packed.shape = {16, 32};
  packed.format = Format::kSymInt8;
  packed.group_size = 64;
  PackedShape shape = packed_shape(packed);
  std::vector<FileTensor> entries{
      {"odd", FileDType::kU8, {3}, 0, 3},
      {"packed", FileDType::kU8, {shape.rows(), shape.layout.tile_bytes}, 0, shape.bytes()}};
  std::string header = make_file_header(entries), data(3 + shape.bytes(), 'x');
  auto digest_of = [](std::string_view text) { return digest(std::as_bytes(std::span(text))); };
  odd.digest = digest_of(std::string_view(data).substr(0, 3));
  packed.digest = digest_of(std::string_view(data).substr(3));
  Manifest manifest;
  manifest.tensors = {odd, packed};
  manifest.files = {{"low_bit-00000000000000000000000000000000.safetensors",
                     header.size() + data.size(), digest_of(header)}};
  write_file(directory / manifest.files[0].name, header + data);
  write_file(directory / "ipex_llm.json", write_manifest(manifest));
  Error error = caught([&] { open_saved(directory.path()); });
  EXPECT_NE(std::string(error.what()).find("a multiple of 64"), std::string::npos) << error.what();
}

TEST(Saved, AHugeManifestIsNotRead) {
  TemporaryDirectory directory;
  write_file(directory / "ipex_llm.json", "{");
  std::filesystem::resize_file(directory / "ipex_llm.json", 256'000'001);  // sparse
  Error error = caught([&] { open_saved(directory.path()); });
  EXPECT_NE(std::string(error.what()).find("expected at most"), std::string::npos) << error.what();
}

TEST(Saved, AFileThatShrinksWhileItIsReadIsCorrupt) {
  TemporaryDirectory directory;
  write_file(directory / "f", std::string(1000, 'x'));
  os::ReadFile file(directory / "f");
  std::filesystem::resize_file(directory / "f", 500);
  std::vector<std::byte> bytes(1000);
  EXPECT_EQ(caught([&] { file.read(0, bytes); }).code(), ErrorCode::kCorrupt);
}

TEST(Saved, BooleansAreZeroOrOne) {
  TemporaryDirectory directory;
  SaveRequest request = small_request(directory.path());
  std::erase_if(request.manifest.tensors, [](const SavedTensor& t) { return t.name != "flag"; });
  request.manifest.ties.clear();
  SaveWriter writer(std::move(request));
  std::string bytes("\0\1\2", 3);
  writer.write(std::as_bytes(std::span(bytes)));
  writer.commit();
  Error error = caught([&] { open_saved(directory.path()); });
  EXPECT_NE(std::string(error.what()).find("boolean of value 2"), std::string::npos);
}

// ---- steps that fail
// -----------------------------------------------------------------------------

struct HookGuard {
  ~HookGuard() { os::set_fault_hook(nullptr); }
};

TEST(Saved, AFailureAtAnyStepLeavesTheOldSaveOrTheNew) {
  HookGuard guard;
  const bool print = std::getenv("LOWBIT_PRINT_FAULTS") != nullptr;
  for (bool existing : {false, true}) {
    if (print) std::printf("\n%s\n", existing ? "over an existing save" : "into a new directory");
    for (int fail_at = 0;; ++fail_at) {
      TemporaryDirectory directory;
      if (existing) save_small(directory.path(), 1, 8000);
      int steps = 0;
      std::string failed;
      os::set_fault_hook([&](std::string_view step) {
        if (steps++ != fail_at) return;
        failed = step;
        throw Error(ErrorCode::kIo, "a fault at step " + std::to_string(fail_at));
      });
      bool threw = false;
      try {
        save_small(directory.path(), 2, 8000);
      } catch (const Error&) {
        threw = true;
      }
      os::set_fault_hook(nullptr);
      if (failed.empty()) {
        EXPECT_GT(fail_at, 15);  // the walk has seen every step
        break;
      }
      bool is_new = !threw;
      if (threw) {
        try {
          is_new = holds_small(directory.path(), 2);
        } catch (const Error& error) {
          EXPECT_FALSE(existing) << failed << ": " << error.what();
          EXPECT_EQ(error.code(), ErrorCode::kNotFound) << failed << ": " << error.what();
        }
      }
      if (print)
        std::printf("  error before  %2d %-16s -> %s\n", fail_at, failed.c_str(),
                    is_new     ? "the new save"
                    : existing ? "the old save"
                               : "no save");
      if (existing && !is_new) {
        EXPECT_TRUE(holds_small(directory.path(), 1)) << "step " << fail_at << ", " << failed;
      }
      if (is_new) {
        EXPECT_TRUE(holds_small(directory.path(), 2)) << failed;
      }
      for (const std::string& name : names_in(directory.path()))
        EXPECT_FALSE(name.ends_with(".tmp")) << failed << " left " << name;
      // And the next save works.
      save_small(directory.path(), 3, 8000);
      EXPECT_TRUE(holds_small(directory.path(), 3));
    }
  }
}

#ifndef _WIN32
// kill -9 at every step, in a child process: destructors do not run, so temporary files stay until
// the next save. `make faults` prints the matrix.
TEST(Saved, KilledAtAnyStepTheOldSaveOrTheNewLoads) {
  const bool print = std::getenv("LOWBIT_PRINT_FAULTS") != nullptr;
  for (bool existing : {false, true}) {
    if (print) std::printf("\n%s\n", existing ? "over an existing save" : "into a new directory");
    for (int kill_at = 0;; ++kill_at) {
      TemporaryDirectory directory;
      if (existing) save_small(directory.path(), 1, 8000);
      std::string last = directory / "last-step";  // a file outlives the child
      std::filesystem::create_directory(directory / "save");
      std::string target = existing ? directory.path() : directory / "save";
      std::fflush(nullptr);
      pid_t child = ::fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        int steps = 0;
        os::set_fault_hook([&](std::string_view step) {
          if (steps++ != kill_at) return;
          std::ofstream(last) << step;
          ::kill(::getpid(), SIGKILL);
        });
        save_small(target, 2, 8000);
        ::_exit(0);
      }
      int status = 0;
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      if (WIFEXITED(status)) {
        ASSERT_EQ(WEXITSTATUS(status), 0);
        EXPECT_GT(kill_at, 15);  // the walk has seen every step
        EXPECT_TRUE(holds_small(target, 2));
        break;
      }
      std::string outcome;
      try {
        outcome = holds_small(target, 2)   ? "the new save"
                  : holds_small(target, 1) ? "the old save"
                                           : "NEITHER";
      } catch (const Error& error) {
        outcome = error.code() == ErrorCode::kNotFound && !existing ? "no save" : error.what();
      }
      if (print)
        std::printf("  killed before %2d %-16s -> %s\n", kill_at, read_file(last).c_str(),
                    outcome.c_str());
      EXPECT_TRUE(outcome == "the new save" || outcome == (existing ? "the old save" : "no save"))
          << "step " << kill_at << ", " << read_file(last) << ": " << outcome;
      save_small(target, 3, 8000);
      EXPECT_TRUE(holds_small(target, 3));
      for (const std::string& name : names_in(target))
        EXPECT_FALSE(name.ends_with(".tmp")) << read_file(last) << " left " << name;
    }
  }
}
// A writer whose process ends without a word leaves its complete tensors to the next one with an
// equal request; the bytes are those of a save that was never interrupted.
TEST(Saved, AnInterruptedWriterIsTakenUp) {
  TemporaryDirectory directory;
  save_small(directory / "whole", 4, 8000);
  auto request = [&](const char* key) {
    SaveRequest wanted = small_request(directory / "out");
    wanted.max_shard_bytes = 8000;
    wanted.resume_key = key;
    return wanted;
  };
  auto write = [](SaveWriter& writer, std::size_t first, std::size_t end) {
    for (std::size_t i = first; i < end; ++i) {
      const std::size_t index = writer.order()[i];
      const SavedTensor& tensor = writer.tensors()[index];
      std::string bytes = content(tensor.name, stored_bytes(tensor), 4);
      if (tensor.name == "z.weight") writer.set_exponent(index, -3);
      writer.write(std::as_bytes(std::span(bytes)));
    }
  };
  auto interrupted = [&](const char* key, std::size_t tensors) {
    pid_t child = ::fork();
    if (child == 0) {
      SaveWriter writer(request(key));
      write(writer, writer.resumed(), tensors);
      ::_exit(0);
    }
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  };
  interrupted("one", 4);
  interrupted("one", 6);  // taken up and interrupted again
  EXPECT_EQ(caught([&] { open_saved(directory / "out"); }).code(), ErrorCode::kNotFound);
  {
    SaveWriter writer(request("one"));
    EXPECT_EQ(writer.resumed(), 6u);
    Error error = caught([&] { SaveWriter other(request("one")); });
    EXPECT_NE(std::string(error.what()).find("another process"), std::string::npos);
    write(writer, 6, writer.order().size());
    writer.commit();
  }
  ASSERT_EQ(names_in(directory / "out"), names_in(directory / "whole"));
  for (const std::string& name : names_in(directory / "whole"))
    EXPECT_EQ(read_file(directory / ("out/" + name)), read_file(directory / ("whole/" + name)));

  // Another key starts anew and takes the left-overs away.
  interrupted("one", 4);
  {
    SaveWriter writer(request("two"));
    EXPECT_EQ(writer.resumed(), 0u);
  }
  for (const std::string& name : names_in(directory / "out")) EXPECT_NE(name[0], '.') << name;
}
#endif

TEST(Saved, SaversAndReadersAtTheSameTime) {
  TemporaryDirectory directory;
  save_small(directory.path(), 0, 8000);
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (unsigned saver = 0; saver < 3; ++saver)
    threads.emplace_back([&, saver] {
      try {
        for (unsigned i = 0; i < 20; ++i) save_small(directory.path(), saver, 8000);
      } catch (const Error& error) {
        ADD_FAILURE() << error.what();
      }
    });
  for (int reader = 0; reader < 2; ++reader)
    threads.emplace_back([&] {
      for (int i = 0; i < 60; ++i) {
        try {
          open_saved(directory.path());
        } catch (const Error& error) {
          ++failures;
          ADD_FAILURE() << error.what();
        }
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(holds_small(directory.path(), 0) || holds_small(directory.path(), 1) ||
              holds_small(directory.path(), 2));
  // All but the last save's files are gone (or go with the next save, where they were mapped).
  save_small(directory.path(), 1, 8000);
  EXPECT_EQ(names_in(directory.path()).size(),
            2 + open_saved(directory.path()).manifest.files.size());
}

TEST(Saved, TemporaryFilesOfADeadSaverAreRemoved) {
  TemporaryDirectory directory;
  write_file(directory / ".lowbit-0123456789abcdef.tmp", "left by a crash");
  write_file(directory / ".lowbit-mine.tmp", "the user's");
  SaveWriter other(small_request(directory.path()));  // alive: its file must stay
  save_small(directory.path(), 1);
  std::vector<std::string> names = names_in(directory.path());
  EXPECT_EQ(std::count(names.begin(), names.end(), ".lowbit-0123456789abcdef.tmp"), 0);
  EXPECT_EQ(std::count(names.begin(), names.end(), ".lowbit-mine.tmp"), 1);
  for (std::size_t index : other.order()) {
    std::string bytes =
        content(other.tensors()[index].name, stored_bytes(other.tensors()[index]), 9);
    other.write(std::as_bytes(std::span(bytes)));
  }
  other.commit();
  EXPECT_TRUE(holds_small(directory.path(), 9));
}

TEST(Digest, IsXxh3AndReadsBackItsText) {
  // XXH3-128 of the empty input with seed 0, from the xxHash specification's test vectors.
  EXPECT_EQ(digest_text(digest({})), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(parse_digest("99aa06d3014798d86001c324468d497f"), digest({}));
  EXPECT_FALSE(parse_digest("99AA06d3014798d86001c324468d497f"));
  EXPECT_FALSE(parse_digest("99aa06d3014798d86001c324468d497"));
  std::string text(100'000, 'x');
  Hasher hasher;
  hasher.update(std::as_bytes(std::span(text).first(17)));
  hasher.update(std::as_bytes(std::span(text).subspan(17)));
  EXPECT_EQ(hasher.finish(), digest(std::as_bytes(std::span(text))));
}

}  // namespace
}  // namespace lowbit::test
