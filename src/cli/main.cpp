#include <CLI/CLI.hpp>
#include <cstdio>
#include <new>

#include "cli/commands.h"
#include "cli/pool.h"
#include "lowbit/error.h"
#include "lowbit/format.h"

int main(int argc, char** argv) {
  using namespace lowbit;
  CLI::App app{
      "Low-bit models without Python: convert checkpoints, look into saves, check them.\n"
      "A save is what ipex_llm's model.save_low_bit writes and load_low_bit reads."};
  app.name("lowbit");
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 done; 1 refused or failed, with the reason on standard error and nothing "
      "left\n"
      "behind; 2 wrong usage. A conversion that a signal ends goes on when the command is "
      "repeated.");
  int threads = 0;
  app.add_option("--threads", threads, "How many threads work (default: all cores)")
      ->check(CLI::NonNegativeNumber);

  std::string formats;
  for (std::string_view name : format_names())
    formats += (formats.empty() ? "" : ", ") + std::string(name);

  cli::ConvertArgs convert_args;
  CLI::App* convert = app.add_subcommand(
      "convert",
      "Convert a Hugging Face directory of safetensors (or one .safetensors file) into a low-bit\n"
      "save, in bounded memory. Sources are fp32, fp16, bf16, fp64, or fp8 with scales. Which "
      "tensors\n"
      "are linear is told by their names; a model whose names do not tell needs --plan.\n"
      "Configuration, tokenizer and code files go along. A conversion that was killed goes on "
      "where\n"
      "it was when the same command runs again.");
  convert->add_option("SOURCE", convert_args.source, "Model directory or .safetensors file")
      ->required();
  convert->add_option("DESTINATION", convert_args.destination, "Directory to write")->required();
  convert->add_option("--low-bit", convert_args.low_bit, "One of " + formats)
      ->capture_default_str();
  convert->add_option("--group-size", convert_args.group_size,
                      "Weights per scale: 32, 64 (default), 128 or 256; not for fp8, fp16, bf16");
  convert->add_option("--not-convert", convert_args.not_converted,
                      "Modules to leave as they are: whole segments of a dotted name, or globs");
  convert
      ->add_option("--plan", convert_args.plan,
                   "JSON of ipex_llm.plan(model, ...).to_dict(): what becomes of each parameter")
      ->check(CLI::ExistingFile);
  convert->add_option("--max-shard-size", convert_args.max_shard_bytes, "Largest file, e.g. 4GB")
      ->transform(CLI::AsSizeValue(true))
      ->capture_default_str();
  convert
      ->add_option("--max-memory", convert_args.max_memory,
                   "Memory for rows in work, e.g. 400MB: less means smaller pieces, the same bytes")
      ->transform(CLI::AsSizeValue(true))
      ->capture_default_str();
  convert->add_flag("--quiet", convert_args.quiet, "No progress on standard error");

  cli::InspectArgs inspect_args;
  CLI::App* inspect =
      app.add_subcommand("inspect", "List what a save, a safetensors or a GGUF file holds");
  inspect->add_option("PATH", inspect_args.path, "Save directory, .safetensors or .gguf file")
      ->required();
  inspect->add_flag("--json", inspect_args.json, "As JSON");

  std::string verify_path;
  CLI::App* verify = app.add_subcommand(
      "verify", "Check every rule that the reader enforces, and the digest of every tensor");
  verify->add_option("PATH", verify_path, "Save directory, .safetensors or .gguf file")->required();

  cli::BenchArgs bench_args;
  CLI::App* bench = app.add_subcommand("bench", "Time quantizing and products on this machine");
  bench->add_option("--low-bit", bench_args.formats, "Formats (default: all)");
  bench->add_option("-m", bench_args.m, "Tokens")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  bench->add_option("-n", bench_args.n, "Outputs")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  bench->add_option("-k", bench_args.k, "Inputs")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    cli::Pool pool(threads);
    if (*convert) cli::convert(convert_args, pool);
    if (*inspect) cli::inspect(inspect_args);
    if (*verify) cli::verify(verify_path, pool);
    if (*bench) cli::bench(bench_args, pool);
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "lowbit: %s\n", error.what());
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "lowbit: out of memory; close other programs\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lowbit: %s\n", error.what());
  }
  return 1;
}
