"""Latent attention: a fused block against the same block with low-bit weights alone.

    python bench/latent.py [--low-bit sym_int4] [--threads 2] [--contexts 100,2000] [--repeats 20]

A decoder layer with the attention of DeepSeek-V2-Lite (16 heads, latents of 512) and a small MLP,
random weights, bfloat16. One token behind so many others, and a prompt of so many. The contenders
take turns; medians are reported.
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


def build(low_bit: str, fusing: bool):
    from transformers import DeepseekV2Config, DeepseekV2Model

    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=256,
        pad_token_id=0,
    )
    model = DeepseekV2Model(config).eval().bfloat16()
    return ipex_llm.optimize_model(model, low_bit, optimize_llm=fusing)


def timed(model, ids, cache) -> float:
    start = time.perf_counter()
    model(input_ids=ids, past_key_values=cache)
    return time.perf_counter() - start


def main() -> None:
    from transformers import DynamicCache

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="100,2000")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contenders = {name: build(arguments.low_bit, name == "fused") for name in ("plain", "fused")}
    print(ipex_llm.optimization_report(contenders["fused"]))
    with torch.no_grad():
        for context in (int(c) for c in arguments.contexts.split(",")):
            ids = torch.randint(3, 250, (1, context))
            prompts: dict[str, list[float]] = {name: [] for name in contenders}
            tokens: dict[str, list[float]] = {name: [] for name in contenders}
            caches = {}
            for _ in range(4):
                for name, model in contenders.items():
                    caches[name] = DynamicCache(config=model.config)
                    prompts[name].append(timed(model, ids, caches[name]))
            for _ in range(arguments.repeats):
                for name, model in contenders.items():
                    tokens[name].append(timed(model, ids[:, :1], caches[name]))
            for what, times in (("prompt", prompts), ("token", tokens)):
                plain, fused = (1e3 * statistics.median(times[name]) for name in contenders)
                print(
                    f"{what} at {context}: plain {plain:.2f} ms, fused {fused:.2f} ms, "
                    f"{plain / fused:.2f} x"
                )


if __name__ == "__main__":
    main()
