"""The GPU benchmark: every format, real shapes, batch sizes from 1 to 4096, against bf16 cuBLAS.

PYTHONPATH=python python bench/gpu.py OUT.json [--quick]

Each result is verified against float64 first; times are those of CUDA graphs over a ring of weights
larger than the L2, so neither launches nor caches flatter anyone. `floor` is the time in which the
copy bandwidth measured in this run moves the packed bytes once. bench/gpu_record.py writes OUT.json
into docs/.
"""

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from ipex_llm import formats, library

sys.path.insert(0, str(Path(__file__).parent))
from gpu_record import tables
from gpu_timing import copy_bandwidth, ring_length, time_calls

lowbit = torch.ops.lowbit
SHAPES = [(14336, 4096), (4096, 4096), (4096, 14336), (28672, 8192), (8192, 28672)]
TOKENS = [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
MANY = 256  # tokens that lower the clocks
QUICK_TOKENS = [1, 16, 64, 256, 1024]


def commit() -> str:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        return run.stdout.strip()
    except OSError:
        return ""


def time_ring(ring, call):
    return time_calls([lambda w=w: call(w) for w in ring], replays=5)


def time_in_turn(contenders, m):
    """Many tokens lower the clocks: as many calls of each (ring, call), three times in turn."""
    calls = 4 if m >= 1024 else 16
    times = [[] for _ in contenders]
    for _ in range(3):
        for taken, (ring, call) in zip(times, contenders, strict=True):
            some = list(itertools.islice(itertools.cycle(ring), calls))
            taken.append(time_calls([lambda w=w, c=call: c(w) for w in some], replays=2, rounds=1))
    return [statistics.median(taken) for taken in times]


def bench_dense(weight, inputs):
    ring = [weight.clone() for _ in range(ring_length(weight.numel() * 2))]
    return {
        m: time_ring(ring, lambda w, x=x: torch.nn.functional.linear(x, w))
        for m, x in inputs.items()
        if m < MANY
    }


def bench_format(fmt, weight, inputs, bandwidth, dense, rows, precision=0):
    n, k = weight.shape
    if fmt.name == "fp16":  # in the dtype of its activations, as every 16-bit type
        weight = weight.half()
        inputs = {m: x.half() for m, x in inputs.items()}
    name = fmt.name
    if precision:  # 8-bit activations: fp8 tensor cores, from more than 64 tokens on
        name += ", e4m3 x"
        inputs = {m: x for m, x in inputs.items() if m > 64}
    most_error = 0.04 if precision else 0.006
    dense_ring = [weight.clone() for _ in range(4)]
    group = 64 if fmt.scale_kind < 2 else 0
    numbers = (n, k, fmt.number, group)
    packed, exponent = lowbit.quantize(weight, fmt.number, group)
    e = int(exponent)
    exact = lowbit.dequantize(packed, [n, k], fmt.number, group, e, torch.float32)
    rounded = exact.to(weight.dtype)
    exact = exact.double()
    ring = [packed.clone() for _ in range(ring_length(packed.numel()))]
    floor = packed.numel() / bandwidth * 1e6
    for m, x in inputs.items():
        sample = x[: min(m, 64)]  # float64 products of 4096 tokens would take longer than the rest
        expected = sample.double() @ exact.T
        got = lowbit.linear(x, packed, None, *numbers, e, precision)[: sample.shape[0]]
        error = float((got.double() - expected).norm() / expected.norm())
        cublas = torch.nn.functional.linear(sample, rounded)
        cublas_error = float((cublas.double() - expected).norm() / expected.norm())
        assert error < most_error, (name, n, k, m, error)

        def ours(p, x=x):
            return lowbit.linear(x, p, None, *numbers, e, precision)

        def theirs(w, x=x):
            return torch.nn.functional.linear(x, w)

        if m < MANY:
            baseline, took = dense[m], time_ring(ring, ours)
        else:
            baseline, took = time_in_turn([(dense_ring, theirs), (ring, ours)], m)
        path = lowbit.linear_choice(x, packed, *numbers, e, precision).split(":")[0]
        rows.append(
            {
                "format": name,
                "n": n,
                "k": k,
                "m": m,
                "microseconds": took,
                "floor": floor,
                "cublas": baseline,
                "error": error,
                "cublas_error": cublas_error,
                "path": path,
            }
        )
        print(
            f"{name:10} {n}x{k} M={m}: {took:.1f} us, {took / floor:.2f} x floor, "
            f"{baseline / took:.2f} x cuBLAS ({baseline:.1f}), error {error:.5f} "
            f"(cuBLAS {cublas_error:.5f}), {path}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--quick", action="store_true", help="two shapes, five batch sizes")
    parser.add_argument("--formats", nargs="+", default=list(formats.FORMATS))
    args = parser.parse_args()
    if not torch.cuda.is_available() or not library.HAS_CUDA_KERNELS:
        sys.exit("bench/gpu.py needs a CUDA device and liblowbit_ops_cuda.so (-DLOWBIT_CUDA=ON)")
    bandwidth = copy_bandwidth()
    results = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "commit": commit(),
        "copy_bandwidth": bandwidth,
        "rows": [],
    }
    print(f"{results['device']}, copy {bandwidth / 1e9:.0f} GB/s")
    # Few tokens of all types and shapes first: many heat the GPU, whose clocks then fall, and the
    # few, bound by instructions as much as by memory, would be measured at other clocks.
    tokens = QUICK_TOKENS if args.quick else TOKENS
    shapes = SHAPES[:2] if args.quick else SHAPES
    for some in ([m for m in tokens if m < MANY], [m for m in tokens if m >= MANY]):
        for n, k in shapes:
            weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
            inputs = {m: torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for m in some}
            dense = bench_dense(weight, inputs)
            for name in args.formats:
                fmt = formats.FORMATS[name]
                bench_format(fmt, weight, inputs, bandwidth, dense, results["rows"])
                if name.startswith("fp8"):
                    bench_format(fmt, weight, inputs, bandwidth, dense, results["rows"], 3)
                Path(args.out).write_text(json.dumps(results, indent=1))
    print(tables(results))


main()
