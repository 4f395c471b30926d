"""bitsandbytes, nf4 weights and bf16 activations; quantizes while it loads."""

from __future__ import annotations

import time
from pathlib import Path

from .environments import Environment
from .hugging_face import HuggingFace, checkpoint

KINDS = {"nf4": "bitsandbytes nf4"}
ENVIRONMENT = Environment(
    "hf",
    (
        "torch==2.13.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "bitsandbytes==0.50.2",
        "optimum-quanto==0.2.7",
    ),
)


def load(kind: str, model: Path, threads: int) -> HuggingFace:
    import torch
    from transformers import BitsAndBytesConfig

    torch.set_num_threads(threads)
    weights = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    began = time.perf_counter()
    candidate = checkpoint(model, torch.bfloat16, quantization_config=weights, device_map="cpu")
    return HuggingFace(candidate, time.perf_counter() - began)
