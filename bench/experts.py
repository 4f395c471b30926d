"""Experts of a mixture: the fused operator against the loop over the experts that were hit.

    python bench/experts.py [--like olmoe] [--low-bit sym_int4] [--threads 2] [--tokens 1,16,256]
                            [--repeats 30]

A layer of OLMoE's experts (64 experts of 2048 x 1024, 8 per token), or of gpt-oss-20b's (32 of 2880
x 2880 with biases and clamped gates, 4 per token), with random weights and choices.
The contenders take turns, so that a noisy machine slows all alike; medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch

import ipex_llm


def build(arguments, fusing: bool):
    """The experts of a model of one layer."""
    from transformers import GptOssConfig, GptOssForCausalLM, OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "vocab_size": 256, "pad_token_id": 0}
    if arguments.like == "olmoe":
        config, kind = OlmoeConfig(**small), OlmoeForCausalLM
    else:
        config = GptOssConfig(**small, num_local_experts=32, layer_types=["full_attention"])
        kind = GptOssForCausalLM
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = kind(config).eval()
    finally:
        torch.set_default_dtype(default)
    model = ipex_llm.optimize_model(model, arguments.low_bit, optimize_llm=fusing)
    return config, model, model.model.layers[0].mlp.experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", default="olmoe", choices=("olmoe", "gpt-oss"))
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, model, fused = build(arguments, True)
    count = getattr(config, "num_local_experts", None) or config.num_experts
    _, _, plain = build(arguments, False)
    print(ipex_llm.optimization_report(model))
    generator = torch.Generator().manual_seed(1)
    contenders = {"loop over the experts": plain, "fused": fused}
    for tokens in (int(t) for t in arguments.tokens.split(",")):
        x = torch.randn((tokens, config.hidden_size), generator=generator).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        results = {}
        with torch.no_grad():
            for _ in range(arguments.repeats):
                # Other experts each time: the weights come from memory.
                scores = torch.rand((tokens, count), generator=generator)
                shares, ids = scores.topk(config.num_experts_per_tok)
                shares = (shares / shares.sum(-1, keepdim=True)).bfloat16()
                for name, experts in contenders.items():
                    start = time.perf_counter()
                    results[name] = experts(x, ids, shares)
                    times[name].append(time.perf_counter() - start)
        want, have = results.values()
        error = float((have - want).abs().max() / want.abs().max())
        loop, one = (1e3 * statistics.median(t) for t in times.values())
        print(
            f"{tokens} tokens: loop {loop:.2f} ms, fused {one:.2f} ms, {loop / one:.2f} x; "
            f"results differ by {error:.4f} of the largest"
        )


if __name__ == "__main__":
    main()
