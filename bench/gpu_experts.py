"""Experts on the GPU: all in one launch, against torch's grouped_mm in bfloat16.

PYTHONPATH=python python bench/gpu_experts.py OUT.json [--formats F ...] [--shapes E:N:K:TOP ...]
    [--tokens M ...] [--sweep]

One product of a mixture layer: `tokens` rows choose TOP of E matrices of N x K each, at random and
anew for every layer of a ring larger than the L2. Verified, then timed in CUDA graphs; `floor` is
the packed bytes of the chosen experts at the measured copy bandwidth. --sweep times every launch
shape as well.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import copy_bandwidth, time_calls

from ipex_llm import formats

QMV, QMM = 0, 1
lowbit = torch.ops.lowbit


def variants(each: float):
    for run, tiles, warps_n, warps_k, splits in itertools.product(
        (8, 16, 32), (1, 2, 4), (1, 2), (4, 8, 16), (1, 2)
    ):
        if 4 <= warps_n * warps_k <= (12 if run == 32 else 16) and each <= 2 * run:
            yield [QMV, run, tiles, warps_n, warps_k, splits, 1]
    for rows, tokens in itertools.product((64, 128), (8, 16, 32, 64, 128, 256)):
        if (rows > 64 or tokens <= 64) and tokens / 8 <= each <= tokens * 8:
            yield [QMM, rows, tokens, 1]


def routing(tokens: int, experts: int, top: int, generator):
    """Where the rows of each expert end, int32 [experts]."""
    chosen = torch.rand(tokens, experts, generator=generator).topk(top).indices
    return torch.bincount(chosen.flatten(), minlength=experts).cumsum(0).int()


def check(got, x, weight, ends) -> float:
    """The largest relative error of an expert's rows against float64."""
    worst, begin = 0.0, 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            expected = x[begin:end].double() @ weight[expert].double().T
            error = (got[begin:end].double() - expected).norm() / expected.norm()
            worst = max(worst, float(error))
            begin = end
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--formats", nargs="+", default=["sym_int4", "nf4", "fp8_e4m3"])
    parser.add_argument(
        "--shapes", nargs="+", default=["64:2048:2048:8", "128:1536:2048:8", "8:28672:4096:2"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s")
    rows = []
    generator = torch.Generator().manual_seed(0)
    for shape in args.shapes:
        experts, n, k, top = map(int, shape.split(":"))
        dense = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16) / 8
        layers = max(2, -(-(256 << 20) // (experts * n * k // 2)))
        dense_ring = [dense] + [dense.clone() for _ in range(max(1, layers // 3))]
        for tokens in args.tokens:
            layer_ends = [
                routing(tokens, experts, top, generator).cuda() for _ in range(max(layers, 4))
            ]
            x = torch.randn(tokens * top, k, device="cuda", dtype=torch.bfloat16)
            pairs = zip(layer_ends, itertools.cycle(dense_ring), strict=False)
            bf16 = time_calls(
                [lambda e=e, w=w: F.grouped_mm(x, w.transpose(-2, -1), offs=e) for e, w in pairs]
            )
            for name in args.formats:
                number = formats.FORMATS[name].number
                group = 64 if formats.FORMATS[name].grouped else 0
                packed, exponent = lowbit.quantize(dense, number, group)
                ring = [packed] + [packed.clone() for _ in range(layers - 1)]
                numbers = (n, k, number, group, int(exponent))
                weight = lowbit.dequantize(packed, [experts, n, k], *numbers[2:], torch.float32)
                got = lowbit.linear_grouped(x, packed, layer_ends[0], *numbers, 0)
                error = check(got, x, weight, layer_ends[0])
                assert error < 1e-2, (name, shape, tokens, error)

                def timed(op, last):
                    pairs = zip(layer_ends, itertools.cycle(ring), strict=False)
                    return time_calls(
                        [lambda e=e, w=w: op(x, w, e, *numbers, last) for e, w in pairs]
                    )

                ours = timed(lowbit.linear_grouped, 0)
                hit = sum(
                    int((torch.diff(e, prepend=e.new_zeros(1)) > 0).sum()) for e in layer_ends
                )
                hit_bytes = packed.numel() * hit / len(layer_ends) / experts
                row = {
                    "shape": shape,
                    "tokens": tokens,
                    "format": name,
                    "us": ours,
                    "bf16_us": bf16,
                    "floor_us": hit_bytes / bandwidth * 1e6,
                    "error": error,
                }
                if args.sweep:
                    found = []
                    for variant in variants(tokens * top / min(experts, tokens * top)):
                        try:
                            found.append((timed(lowbit.linear_grouped_variant, variant), variant))
                        except RuntimeError:
                            continue  # does not fit
                    row["sweep"] = sorted(found)
                    row["best_us"], row["best"] = row["sweep"][0]
                rows.append(row)
                best = f", best {row['best_us']:.1f} {row['best']}" if args.sweep else ""
                print(
                    f"{shape} {name} {tokens}: {ours:.1f} us, floor {row['floor_us']:.1f}, "
                    f"bf16 {bf16:.1f} ({bf16 / ours:.2f}){best}",
                    flush=True,
                )
        del dense, dense_ring
    Path(args.out).write_text(json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
