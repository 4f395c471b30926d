"""The main job on a real model: SmolLM2-135M before and after `optimize_model`, saved and loaded.

    make demo                          # sym_int4
    make demo LOW_BIT=nf4              # or another of the thirteen types
    .venv/bin/python examples/demo.py --low-bit fp8 --tokens 100 --keep saved_model

Three processes, so that each peak of memory is that of its own job: the model as it came; the model
optimized and saved; the saved model loaded under `low_memory_init`. Ends with exit status 1 if the
loaded model does not say the same, token for token, or a size is not what the type promises.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

QUESTION = "Explain in two sentences why the sky is blue."

# Bits per weight as documented, codes and scales together.
BITS_PER_WEIGHT = {
    "sym_int4": 4.25,
    "asym_int4": 4.5,
    "sym_int5": 5.25,
    "asym_int5": 5.5,
    "sym_int8": 8.25,
    "nf3": 3.25,
    "nf4": 4.25,
    "fp4": 4.25,
    "fp8": 8.0,
    "fp8_e4m3": 8.0,
    "fp8_e5m2": 8.0,
    "fp16": 16.0,
    "bf16": 16.0,
}
SIZE_TOLERANCE = 0.02  # padding of short rows and groups, and the files' headers


def peak_memory() -> int:
    """Bytes: the most this process has held so far (VmHWM), or 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def resident_memory() -> int:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except (OSError, ImportError):
        return 0


def speak(model, tokenizer, count: int) -> dict:
    """Greedy text, with decoding speed: the best of three runs of tokens after the first one."""
    import torch

    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    start = inputs["input_ids"].shape[1]

    def run(tokens: int) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        out = model.generate(
            **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
        )
        return time.perf_counter() - began, out[0, start:]

    run(2)  # warm-up
    first = min(run(1)[0] for _ in range(3))
    runs = [run(count) for _ in range(3)]
    seconds = min(taken for taken, _ in runs)
    tokens = runs[0][1].tolist()
    same = all(out.tolist() == tokens for _, out in runs)
    # Free-running text, up to the model's own end of answer.
    answer = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, start:]
    return {
        "tokens": tokens,
        "repeatable": same,
        "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "first_ms": first * 1e3,
        "per_second": (count - 1) / max(seconds - first, 1e-9),
    }


def original(model_dir: str, count: int, reply) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = resident_memory()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    result = speak(model, tokenizer, count)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    result |= {
        "matrices": matrices,
        "rest_bytes": sum(p.nbytes for p in model.parameters() if p.ndim != 2),
        "bytes": sum(p.nbytes for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "above": peak_memory() - base,
        "peak": peak_memory(),
    }
    reply.send(result)


def optimized(model_dir: str, low_bit: str, saved_dir: str, count: int, reply) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ipex_llm import optimize_model

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = resident_memory()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    began = time.perf_counter()
    model = optimize_model(model, low_bit=low_bit)
    seconds = time.perf_counter() - began
    result = speak(model, tokenizer, count)
    began = time.perf_counter()
    model.save_low_bit(saved_dir)
    result |= {
        "optimize_seconds": seconds,
        "save_seconds": time.perf_counter() - began,
        "above": peak_memory() - base,
        "peak": peak_memory(),
    }
    reply.send(result)


def loaded(model_dir: str, saved_dir: str, count: int, reply) -> None:
    # Imports are not loading: the package, and the module that holds the model's class.
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ipex_llm.optimize import load_low_bit, low_memory_init

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = resident_memory()
    began = time.perf_counter()
    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(saved_dir, dtype="auto")
    model = load_low_bit(model, saved_dir)
    seconds = time.perf_counter() - began
    result = speak(model, tokenizer, count)
    peak = peak_memory()
    reply.send(result | {"load_seconds": seconds, "above": peak - base, "peak": peak})


def _child(job, arguments: tuple, reply) -> None:
    import transformers.utils.logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the parent shows a spinner
    job(*arguments, reply)


def in_process(console, what: str, job, *arguments) -> dict:
    """Runs `job` in a process of its own, under a spinner; its failure ends the demo."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, arguments, theirs))
    began = time.perf_counter()
    if not console.is_terminal:  # no spinner there
        console.print(f"{what} ...")
    with console.status(what):
        process.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            result = None
        process.join()
    if result is None or process.exitcode:
        console.print(f"[red]failed[/red]: {what} (exit status {process.exitcode})")
        sys.exit(1)
    console.print(f"[green]done[/green] {what} [dim]{time.perf_counter() - began:.1f} s[/dim]")
    return result


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--low-bit", default="sym_int4", choices=list(BITS_PER_WEIGHT))
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--keep", metavar="DIR", help="save there, and leave it")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error("--tokens must be at least 2: speed is measured after the first")

    import transformers.utils.logging as transformers_logging
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    transformers_logging.disable_progress_bar()  # real_models converts in this process
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    import real_models

    name, bits, count = options.low_bit, BITS_PER_WEIGHT[options.low_bit], options.tokens
    console.rule(f"[bold]SmolLM2-135M-Instruct, low_bit={name!r}")
    model_dir = str(real_models.smollm2())
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as temporary:
        saved_dir = options.keep or temporary
        before = in_process(console, "Original model: load, generate", original, model_dir, count)
        after = in_process(
            console,
            "optimize_model, generate, save_low_bit",
            optimized,
            model_dir,
            name,
            saved_dir,
            count,
        )
        again = in_process(
            console,
            "low_memory_init, load_low_bit, generate",
            loaded,
            model_dir,
            saved_dir,
            count,
        )
        files = [path for path in Path(saved_dir).iterdir() if path.is_file()]
        weights = sum(p.stat().st_size for p in files if p.suffix == ".safetensors")
        other = sum(p.stat().st_size for p in files if p.suffix != ".safetensors")

    console.print(Panel(QUESTION, title="asked", title_align="left", style="dim"))
    console.print(Panel(before["text"], title=f"before ({before['dtype']})", title_align="left"))
    console.print(Panel(after["text"], title=f"after ({name})", title_align="left"))

    expected = before["matrices"] * bits / 8 + before["rest_bytes"]
    table = Table(title_justify="left")
    table.add_column("")
    for column in (f"before ({before['dtype']})", f"after ({name})", "saved and loaded"):
        table.add_column(column, justify="right")
    table.add_row(
        "decoding, tokens/s",
        *(f"{run['per_second']:.1f}" for run in (before, after, again)),
    )
    table.add_row("first token, ms", *(f"{run['first_ms']:.0f}" for run in (before, after, again)))
    table.add_row("weights", megabytes(before["bytes"]), megabytes(weights), "")
    table.add_row(
        "bits per weight",
        f"{8 * before['bytes'] / before['matrices']:.2f}",
        f"{8 * (weights - before['rest_bytes']) / before['matrices']:.2f} ({bits:g} promised)",
        "",
    )
    table.add_row(
        "optimize, save, load, s",
        "",
        f"{after['optimize_seconds']:.2f}, {after['save_seconds']:.2f}",
        f"{again['load_seconds']:.2f}",
    )
    table.add_row(
        "peak memory above imports", *(megabytes(r["above"]) for r in (before, after, again))
    )
    table.add_row("peak of the process", *(megabytes(r["peak"]) for r in (before, after, again)))
    console.print(table)

    checks = [
        ("the loaded model says the same, token for token", again["tokens"] == after["tokens"]),
        ("running again gives the same tokens", after["repeatable"] and again["repeatable"]),
        ("free-running text is equal, too", again["text"] == after["text"]),
        (
            f"weight files hold {megabytes(weights)}, {megabytes(expected)} promised "
            f"({weights / expected - 1:+.1%}, at most {SIZE_TOLERANCE:.0%} off)",
            abs(weights / expected - 1) <= SIZE_TOLERANCE,
        ),
        (f"manifest and configuration are small ({megabytes(other)})", other < 1e6),
    ]
    for text, good in checks:
        console.print(f"[green]ok[/green]   {text}" if good else f"[red]FAIL[/red] {text}")
    if options.json:
        figures = {"low_bit": name, "before": before, "after": after, "loaded": again}
        figures |= {"weight_bytes": weights, "expected_bytes": expected}
        Path(options.json).write_text(json.dumps(figures, indent=1))
    if options.keep:
        console.print(f"The saved model lies in {options.keep}")
    return 0 if all(good for _, good in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
