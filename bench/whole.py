"""What a user waits for: optimize_model, save_low_bit and load_low_bit of a whole model.

    python bench/whole.py [--shape llama-1.1b | --model DIR] [--dtype bfloat16] [--low-bit sym_int4]
                          [--repeats 3] [--threads 2] [--no-fuse] [--keep-freed]

Seconds of each step, those of its parts, and resident memory in MiB: before optimizing (the float
model), the largest meanwhile, and after. Weights are random, each its own. `--keep-freed` leaves
freed float weights to the C library's allocator, to compare. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch
from decode import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ipex_llm import convert, ops, optimize
from ipex_llm.optimize import load_low_bit, low_memory_init, optimize_model

_SPREAD = 1 << 20


def random_model(config: LlamaConfig, dtype: torch.dtype, noise: torch.Tensor):
    """Every weight begins elsewhere in `noise`, which is faster than drawing them all."""
    with low_memory_init():
        model = LlamaForCausalLM(config).to(dtype)
    start = 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            start = (start + 77_777) % _SPREAD
            values = noise[start : start + parameter.numel()].reshape(parameter.shape).clone()
            values = torch.ones_like(values) if values.dim() == 1 else values
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return model.eval()


def resident(key: str) -> int:
    line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
    return int(line.split()[1]) >> 10


class Parts:
    """Seconds spent in functions, by their names."""

    def __init__(self, *places):
        self.seconds: dict[str, float] = {}
        for holder, name in places:
            setattr(holder, name, self._timed(name, getattr(holder, name)))

    def _timed(self, name, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0) + spent

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-1.1b", choices=SHAPES)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--keep-freed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    if arguments.keep_freed:
        ops.return_freed_memory = lambda: None
    parts = Parts(
        (convert, "check_finite"),
        (convert.ops, "quantize"),
        (optimize, "optimize_language_model"),
        (ops, "return_freed_memory"),
    )
    if arguments.model:
        # Not mapped: a model that stays in the page cache would not be counted.
        config = None
    else:
        config = LlamaConfig(**SHAPES[arguments.shape])
        weights = config.vocab_size * config.hidden_size
        noise = torch.empty(weights + _SPREAD, dtype=dtype).normal_(std=0.02)
    for _ in range(arguments.repeats):
        if config is None:
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        else:
            model = random_model(config, dtype, noise)
        gc.collect()
        parts.seconds.clear()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        optimize_model(model, arguments.low_bit, optimize_llm=not arguments.no_fuse)
        row = {"optimize": time.perf_counter() - start} | parts.seconds
        memory = {"before": before, "peak": resident("VmHWM"), "after": resident("VmRSS")}
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            model.save_low_bit(directory)
            row["save"] = time.perf_counter() - start
            del model
            gc.collect()
            start = time.perf_counter()
            with low_memory_init():
                model = AutoModelForCausalLM.from_config(
                    config or AutoModelForCausalLM.from_pretrained(directory).config, dtype=dtype
                )
            load_low_bit(model, directory)
            row["load"] = time.perf_counter() - start
            del model
            gc.collect()
        print(json.dumps({k.strip("_"): round(v, 3) for k, v in row.items()} | memory), flush=True)


if __name__ == "__main__":
    main()
