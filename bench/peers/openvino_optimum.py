"""OpenVINO through optimum-intel: weights of 4 bits in groups of 64, or of 8 bits per row."""

from __future__ import annotations

from pathlib import Path

from .environments import Environment

KINDS = {"int4": "OpenVINO int4, groups of 64", "int8": "OpenVINO int8"}
ENVIRONMENT = Environment(
    "openvino",
    ("torch==2.13.0", "optimum-intel==2.2.0", "openvino==2026.4.1", "nncf==3.4.0"),
    removed=("torchvision",),  # made for another torch; transformers imports it where it is
)


def convert(kind: str, model: Path, target: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    if kind == "int4":
        weights = OVWeightQuantizationConfig(bits=4, sym=True, group_size=64, ratio=1.0)
    else:
        weights = OVWeightQuantizationConfig(bits=8, sym=True)
    OVModelForCausalLM.from_pretrained(
        model, export=True, quantization_config=weights, compile=False
    ).save_pretrained(target)


class OpenVino:
    quantize_seconds = None

    def __init__(self, model: Path, threads: int) -> None:
        from optimum.intel import OVModelForCausalLM

        self.model = OVModelForCausalLM.from_pretrained(
            model, ov_config={"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        self.length, self.cache = 0, None

    def _forward(self, tokens: list[int]) -> int:
        import torch

        self.length += len(tokens)
        out = self.model(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, self.length, dtype=torch.long),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def fill(self, tokens: list[int]) -> int:
        self.length, self.cache = 0, None
        return self._forward(tokens)

    def step(self, token: int) -> int:
        return self._forward([token])


def load(kind: str, model: Path, threads: int) -> OpenVino:
    return OpenVino(model, threads)
