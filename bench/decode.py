"""Decoding through optimize_llm: tokens per second, fused against not, and at a long context.

    python bench/decode.py [--model DIR | --shape llama-1.1b] [--low-bit sym_int4] [--threads 2]

Steps of the contenders alternate, so that a noisy machine slows all alike; medians are reported.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch

import ipex_llm

SHAPES = {
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}


def build(arguments):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if arguments.model:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape])).eval()
    finally:
        torch.set_default_dtype(default)


class Decoder:
    """One contender: a model with a filled cache, advanced token by token."""

    def __init__(self, name, model, prompt):
        self.name, self.model = name, model
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plain = ipex_llm.optimize_model(build(arguments), arguments.low_bit, optimize_llm=False)
    fused = copy.deepcopy(plain)
    from ipex_llm.fuse import fuse_model

    fuse_model(fused)
    print(ipex_llm.optimization_report(fused))
    contexts = [int(c) for c in arguments.contexts.split(",")]
    vocabulary = plain.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, vocabulary, (1, c), generator=generator) for c in contexts]
    with torch.no_grad():
        fused(prompts[0][:, :8])  # memory of the operators, thread pool
        plain(prompts[0][:, :8])
        decoders = [
            Decoder(f"{name} at {context}", model, prompt)
            for context, prompt in zip(contexts, prompts, strict=True)
            for name, model in (("fused", fused), ("unfused", plain))
        ]
        for _ in range(arguments.steps):
            for decoder in decoders:
                decoder.step()
    for decoder, context in zip(decoders, [c for c in contexts for _ in range(2)], strict=True):
        rate = context / decoder.prefill
        print(f"{decoder.name}: decode {decoder.speed:.1f} tok/s, prompt {rate:.0f} tok/s")
    first, last = decoders[0], decoders[-2]
    print(f"decode at {contexts[-1]} / at {contexts[0]}: {last.speed / first.speed:.2f}")
    print(f"fused / unfused at {contexts[0]}: {first.speed / decoders[1].speed:.2f}")


if __name__ == "__main__":
    main()
