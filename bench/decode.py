"""Decoding through optimize_llm: tokens per second, fused against not, and at a long context.

    python bench/decode.py [--model DIR | --shape llama-1.1b] [--low-bit sym_int4] [--threads 2]
        [--contenders fused,int8,fp8,unfused] [--saved DIR]

Contenders: fused, with keys and values in the model's type or as kv_cache_dtype says, and unfused.
Steps of the contenders alternate, so that a noisy machine slows all alike; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch

import ipex_llm

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())["models"]
_LONG = {"max_position_embeddings": 4096}


def build(arguments):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if arguments.model:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**{**SHAPES[arguments.shape], **_LONG})).eval()
    finally:
        torch.set_default_dtype(default)


def optimized(arguments):
    """The low-bit model, unfused; from `--saved` where it is there already."""
    saved = arguments.saved
    if saved is None or not (saved / "ipex_llm.json").exists():
        model = ipex_llm.optimize_model(build(arguments), arguments.low_bit, optimize_llm=False)
        if saved is None:
            return model
        model.save_low_bit(saved)
    from transformers import AutoModelForCausalLM

    from ipex_llm.optimize import load_low_bit, low_memory_init

    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    return load_low_bit(model, saved)


class Decoder:
    """One contender: a model with a filled cache, advanced token by token."""

    def __init__(self, model, prompt):
        self.model = model
        self.times: list[float] = []
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        self.prefill = time.perf_counter() - start
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def step(self):
        start = time.perf_counter()
        out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)
        self.times.append(time.perf_counter() - start)

    @property
    def speed(self) -> float:
        return 1 / statistics.median(self.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--shape", default="llama-1.1b", choices=SHAPES)
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--contexts", default="100,2000")
    parser.add_argument("--contenders", default="fused,unfused")
    parser.add_argument("--saved", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from ipex_llm.fuse import fuse_model

    models = {}
    for name in arguments.contenders.split(","):
        models[name] = optimized(arguments)
        if name != "unfused":
            fuse_model(models[name], None if name == "fused" else name)
    print(ipex_llm.optimization_report(next(iter(models.values()))))
    contexts = [int(c) for c in arguments.contexts.split(",")]
    vocabulary = next(iter(models.values())).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, vocabulary, (1, c), generator=generator) for c in contexts]
    decoders = {}
    with torch.no_grad():
        for model in models.values():
            model(prompts[0][:, :8])  # memory of the operators, thread pool
        for context, prompt in zip(contexts, prompts, strict=True):
            for name, model in models.items():
                decoders[name, context] = Decoder(model, prompt)
        for _ in range(arguments.steps):
            for decoder in decoders.values():
                decoder.step()
    first = next(iter(models))
    for (name, context), decoder in decoders.items():
        print(
            f"{name} at {context}: decode {decoder.speed:.1f} tok/s, "
            f"prompt {context / decoder.prefill:.0f} tok/s; "
            f"{decoder.speed / decoders[name, contexts[0]].speed:.2f} of that at {contexts[0]}, "
            f"{decoder.speed / decoders[first, context].speed:.2f} of {first}"
        )


if __name__ == "__main__":
    main()
