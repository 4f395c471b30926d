"""What recognising and proving blocks costs: the first call of a loaded model, without its tokens.

    python bench/fusing.py [--model DIR | --shape llama-1.1b] [--low-bit sym_int4] [--threads 1]
                           [--repeats 5]

Every repeat fuses a copy of the same low-bit model; the median is reported.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch
from decode import SHAPES, build

import ipex_llm
from ipex_llm import fuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--shape", default="llama-1.1b", choices=SHAPES)
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = ipex_llm.optimize_model(build(arguments), arguments.low_bit, optimize_llm=False)
    times = []
    for _ in range(arguments.repeats):
        fused = copy.deepcopy(model)
        start = time.perf_counter()
        fuse.fuse_model(fused)
        times.append(time.perf_counter() - start)
    print(ipex_llm.optimization_report(fused))
    listed = ", ".join(f"{t:.2f}" for t in times)
    print(f"{statistics.median(times):.2f} s (median of {listed})")


if __name__ == "__main__":
    main()
