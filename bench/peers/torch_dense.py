"""Plain torch: the model as it is, in bfloat16 and in float32."""

from __future__ import annotations

from pathlib import Path

from .environments import OURS
from .hugging_face import HuggingFace, checkpoint

KINDS = {"bfloat16": "torch bf16", "float32": "torch fp32"}
ENVIRONMENT = OURS


def load(kind: str, model: Path, threads: int) -> HuggingFace:
    import torch

    torch.set_num_threads(threads)
    return HuggingFace(checkpoint(model, getattr(torch, kind)), None)
