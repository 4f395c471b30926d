"""A transformers model, whatever its weights are, as an Engine."""

from __future__ import annotations

import inspect
from pathlib import Path


def checkpoint(model: Path, dtype, **arguments):
    """The model for inference; `dtype` had another name in old releases."""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    old = int(transformers.__version__.split(".")[0]) < 5
    arguments["torch_dtype" if old else "dtype"] = dtype
    return transformers.AutoModelForCausalLM.from_pretrained(model, **arguments).eval()


class HuggingFace:
    def __init__(self, model, quantize_seconds: float | None) -> None:
        self.model, self.quantize_seconds = model, quantize_seconds
        self.cache = None
        parameters = inspect.signature(type(model).forward).parameters
        # Logits of a prompt's last token only, in releases that can.
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def _forward(self, tokens: list[int]) -> int:
        import torch

        ids = torch.tensor([tokens])
        out = self.model(ids, past_key_values=self.cache, use_cache=True, **self.last)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def fill(self, tokens: list[int]) -> int:
        self.cache = None
        return self._forward(tokens)

    def step(self, token: int) -> int:
        return self._forward([token])
