"""The archived ipex-llm 2.2.0, the last release for the CPU, with what it was pinned to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from .environments import OURS, Environment
from .hugging_face import HuggingFace, checkpoint

KINDS = {"sym_int4": "ipex-llm 2.2.0 sym_int4", "bf16": "ipex-llm 2.2.0 bf16"}
ENVIRONMENT = Environment(
    "ipex22",
    (
        "torch==2.1.2",
        "transformers==4.37.2",
        "numpy<2",
        "accelerate==0.23.0",
        "py-cpuinfo",
        "sentencepiece",
        "protobuf",
    ),
    alone=("ipex-llm==2.2.0", "bigdl-core-cpp==2.6.0"),  # the second asks for another torch
)
CONVERTER = OURS


def convert(kind: str, model: Path, target: Path) -> None:
    """The same weights under a configuration that transformers 4.37 reads."""
    target.mkdir()
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    config.update(torch_dtype="bfloat16", rope_theta=10000.0)
    (target / "config.json").write_text(json.dumps(config))
    os.link(model / "model.safetensors", target / "model.safetensors")


def load(kind: str, model: Path, threads: int) -> HuggingFace:
    import torch

    torch.set_num_threads(threads)
    candidate = checkpoint(model, torch.bfloat16)
    from ipex_llm import optimize_model  # not ours: that of this environment

    began = time.perf_counter()
    candidate = optimize_model(candidate, low_bit=kind)
    return HuggingFace(candidate, time.perf_counter() - began)
