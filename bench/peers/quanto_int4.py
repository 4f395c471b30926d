"""optimum-quanto, int4 weights and bf16 activations."""

from __future__ import annotations

import time
from pathlib import Path

from .bitsandbytes_nf4 import ENVIRONMENT as ENVIRONMENT
from .hugging_face import HuggingFace, checkpoint

KINDS = {"int4": "optimum-quanto int4"}


def load(kind: str, model: Path, threads: int) -> HuggingFace:
    import torch
    from optimum.quanto import freeze, qint4, quantize

    torch.set_num_threads(threads)
    candidate = checkpoint(model, torch.bfloat16)
    began = time.perf_counter()
    quantize(candidate, weights=qint4)
    freeze(candidate)
    return HuggingFace(candidate, time.perf_counter() - began)
