"""Decoding through optimize_llm: tokens per second, fused against not, and at a long context.

    python bench/decode.py [--model DIR | --shape llama-1.1b] [--low-bit sym_int4] [--threads 2]
        [--contenders fused,int8,fp8,unfused] [--contexts 100,2000] [--batches 1,4,16] [--saved DIR]

Contenders: fused, with keys and values in the model's type or as kv_cache_dtype says, and unfused.
Before anything is timed, their logits are compared with each other and with those of each sequence
of the batch alone. Steps of the contenders alternate, so that a noisy machine slows all alike;
medians are reported, tokens of all sequences counted.
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


# Relative to the norm of the logits, activations exact: what bfloat16 rounds between operators, and
# 8-bit keys and values on top of it. A sequence that sees another's, or a wrong position, is at 1.
BOUNDS = {"fused": 0.05, "unfused": 0.05, "int8": 0.1, "fp8": 0.3}


def verify(models: dict, prompt: torch.Tensor) -> None:
    """A prompt and a step of every contender: as the first contender, and as each row alone.

    Raises SystemExit if one differs by more than its bound.
    """
    first, reference = next(iter(models)), None
    with ipex_llm.set_activation_precision("fp32"):
        for name, model in models.items():
            logits = _step_logits(model, prompt)
            alone = torch.cat([_step_logits(model, row[None]) for row in prompt])
            reference = logits if reference is None else reference
            for other, want in ((first, reference), ("each sequence alone", alone)):
                error = float((logits - want).norm(dim=-1).div(want.norm(dim=-1)).max())
                print(f"verified: {name} in a batch of {len(prompt)} against {other}: {error:.1e}")
                if not error <= max(BOUNDS[name], BOUNDS[first]):
                    raise SystemExit(f"{name} differs from {other} by {error:.3f} of its logits")


def _step_logits(model, prompt: torch.Tensor) -> torch.Tensor:
    """Logits [batch, vocabulary] of the last token, read after all others are in the cache."""
    cache = model(prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    return model(prompt[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()


class Decoder:
    """One contender: a model with a filled cache, advanced by a token of every sequence."""

    def __init__(self, model, prompt):
        self.model, self.batch = model, len(prompt)
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
        return self.batch / statistics.median(self.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--shape", default="llama-1.1b", choices=SHAPES)
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--contexts", default="100,2000")
    parser.add_argument("--batches", default="1", help="sequences decoded at once")
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
    batches = [int(b) for b in arguments.batches.split(",")]
    vocabulary = next(iter(models.values())).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    decoders = {}
    with torch.no_grad():
        verify(models, torch.randint(5, vocabulary, (max(batches), 24), generator=generator))
        for batch in batches:
            for context in contexts:
                prompt = torch.randint(5, vocabulary, (batch, context), generator=generator)
                for name, model in models.items():
                    decoders[name, batch, context] = Decoder(model, prompt)
        for _ in range(arguments.steps):
            for decoder in decoders.values():
                decoder.step()
    first = next(iter(models))
    for (name, batch, context), decoder in decoders.items():
        print(
            f"{name}, {batch} at {context}: decode {decoder.speed:.1f} tok/s, "
            f"prompt {batch * context / decoder.prefill:.0f} tok/s; "
            f"{decoder.speed / decoders[name, batch, contexts[0]].speed:.2f} of that at "
            f"{contexts[0]}, {decoder.speed / decoders[name, batches[0], context].speed:.2f} of "
            f"that of {batches[0]}, {decoder.speed / decoders[first, batch, context].speed:.2f} of "
            f"{first}"
        )


if __name__ == "__main__":
    main()
