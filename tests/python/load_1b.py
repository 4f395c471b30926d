"""Time and memory of loading a 1.1 B-shaped save: one process, imports done, figures as JSON.

python tests/python/load_1b.py make DIR    writes the save (random weights; minutes, 6 GiB)
python tests/python/load_1b.py load DIR [--no-verify] [--no-mmap]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ipex_llm.optimize import load_low_bit, low_memory_init, optimize_model

SHAPES = Path(__file__).resolve().parents[2] / "bench" / "shapes.json"


def make(directory: Path) -> None:
    torch.manual_seed(0)
    with low_memory_init():
        shape = json.loads(SHAPES.read_text())["models"]["llama-1.1b"]
        model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=torch.bfloat16)
                values.fill_(1) if parameter.dim() == 1 else values.normal_(std=0.02)
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    optimize_model(model.eval()).save_low_bit(directory)


def load(directory: Path, verify: bool, mmap: bool) -> dict:
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype="auto")
    constructed = time.perf_counter()
    load_low_bit(model, directory, verify=verify, mmap=mmap)
    end = time.perf_counter()
    grown = process.memory_info().rss - before
    return {
        "seconds": round(end - start, 3),
        "of which constructing": round(constructed - start, 3),
        "file MiB": sum(p.stat().st_size for p in directory.glob("*.safetensors")) >> 20,
        "RSS growth MiB": grown >> 20,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["make", "load"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--no-mmap", action="store_true")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.directory)
    else:
        print(json.dumps(load(arguments.directory, not arguments.no_verify, not arguments.no_mmap)))
