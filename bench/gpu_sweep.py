"""Sweeps the launch shapes of the CUDA kernels: the measurements behind src/cuda/select.cpp.

PYTHONPATH=python python bench/gpu_sweep.py OUT.json [--formats F ...] [--shapes N:K ...]
    [--tokens M ...]
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import copy_bandwidth, ring_length, time_calls

from ipex_llm import formats

QMV, QMM, DIRECT, SCRATCH, EXACT = range(5)
lowbit = torch.ops.lowbit


def qmv_variants(m: int):
    most = 4 if m > 16 else 8
    warps = 16 if m <= 16 else 12
    for tiles, warps_n, warps_k, splits, early in itertools.product(
        (1, 2, 3, 4, 6, 7, 8), (1, 2), (4, 6, 8, 12, 16), (1, 2, 4, 8), (0, 1)
    ):
        if tiles <= most and warps_n * warps_k <= warps and warps_n * warps_k >= 4:
            yield [QMV, tiles, warps_n, warps_k, splits, early]


def qmm_variants(m: int):
    for rows, tokens, splits in itertools.product(
        (64, 112, 128), (8, 16, 32, 64, 128, 256), (1, 2, 4)
    ):
        fits = rows > 64 or tokens <= 64
        if fits and (tokens // 2 < m or tokens == 8) and tokens * 16 >= m:
            yield [QMM, rows, tokens, splits, 1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--formats", nargs="+", default=["sym_int4"])
    parser.add_argument(
        "--shapes", nargs="+", default=["4096:4096", "14336:4096", "4096:14336", "28672:8192"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--early", type=int, default=-1)
    parser.add_argument("--kernel", choices=("qmv", "qmm", "both"), default="both")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s")
    results = {"device": torch.cuda.get_device_name(), "copy_bandwidth": bandwidth, "rows": []}
    for name, shape in itertools.product(args.formats, args.shapes):
        n, k = map(int, shape.split(":"))
        number = formats.FORMATS[name].number
        group = args.group if formats.FORMATS[name].scale_kind < 2 else 0
        weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
        first, exponent = lowbit.quantize(weight, number, group)
        e = int(exponent)
        ring = [first.clone() for _ in range(ring_length(first.numel()))]
        dense = [weight.clone() for _ in range(ring_length(weight.numel() * 2))]
        floor = first.numel() / bandwidth * 1e6
        exact = lowbit.dequantize(first, [n, k], number, group, e, torch.float32)
        for m in args.tokens:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            expected = x.double() @ exact.double().T
            cublas = time_calls([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])
            scratch = time_calls(
                [
                    lambda p=p: lowbit.linear_variant(x, p, None, n, k, number, group, e, [SCRATCH])
                    for p in ring
                ]
            )
            auto = time_calls(
                [lambda p=p: lowbit.linear(x, p, None, n, k, number, group, e, 0) for p in ring]
            )
            rows = []
            variants = []
            if m <= 32 and args.kernel != "qmm":
                variants += qmv_variants(m)
            if args.kernel != "qmv":
                variants += qmm_variants(m)
            for variant in variants:
                if args.early >= 0 and variant[-1] != args.early:
                    continue
                try:
                    got = lowbit.linear_variant(x, first, None, n, k, number, group, e, variant)
                except RuntimeError:
                    continue
                error = float((got.double() - expected).norm() / expected.norm())
                if not error < 0.006:
                    print("WRONG", name, n, k, m, variant, error)
                    continue
                took = time_calls(
                    [
                        lambda p=p, v=variant: lowbit.linear_variant(
                            x, p, None, n, k, number, group, e, v
                        )
                        for p in ring
                    ],
                    replays=2 if floor > 30 else 4,
                    rounds=3,
                )
                rows.append((took, variant, error))
            rows.sort()
            choice = lowbit.linear_choice(x, first, n, k, number, group, e, 0)
            results["rows"].append(
                {
                    "format": name,
                    "n": n,
                    "k": k,
                    "m": m,
                    "floor": floor,
                    "cublas": cublas,
                    "scratch": scratch,
                    "auto": auto,
                    "choice": choice,
                    "variants": rows,
                }
            )
            best = " | ".join(f"{t:.1f} {v[1:-1]}" for t, v, _ in rows[:3])
            print(
                f"{name} {n}x{k} M={m}: floor {floor:.1f} cublas {cublas:.1f} "
                f"scratch {scratch:.1f} "
                f"auto {auto:.1f} ({choice.split(':')[0]}) best {best}",
                flush=True,
            )
        del ring, dense
        Path(args.out).write_text(json.dumps(results))


main()
