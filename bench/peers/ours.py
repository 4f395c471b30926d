"""ipex_llm itself: with its fused decoder blocks, and with the model's own forward."""

from __future__ import annotations

import time
from pathlib import Path

from .environments import OURS
from .hugging_face import HuggingFace, checkpoint

KINDS = {"fused": "ours, sym_int4", "unfused": "ours, sym_int4, `optimize_llm=False`"}
ENVIRONMENT = OURS


def load(kind: str, model: Path, threads: int) -> HuggingFace:
    import torch

    from ipex_llm import optimize_model

    torch.set_num_threads(threads)
    candidate = checkpoint(model, torch.bfloat16)
    began = time.perf_counter()
    optimize_model(candidate, "sym_int4", optimize_llm=kind == "fused")
    return HuggingFace(candidate, time.perf_counter() - began)
