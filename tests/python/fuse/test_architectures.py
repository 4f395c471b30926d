"""Fused against unfused on tiny models of transformers' architectures, one per kind of structure.

All of them: `python tests/python/fuse/table.py`, which writes docs/fusion-models.md.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import table

from zoo import builders

BOTH = "MLP and attention"
# What each stands for: the parts that must be fused.
SAMPLE = {
    "gpt-sw3": BOTH,  # fused q, k, v in a transposed matrix
    "opt": BOTH,  # queries multiplied before the attention
    "bloom": BOTH,  # ALiBi as an argument, attention written out, weights returned
    "bert": BOTH,  # norms after the sums
    "cohere": BOTH,  # halves side by side
    "gemma2": BOTH,  # softcap, norms before and after each half
    "gpt_oss": "attention and experts",  # sinks; biased experts, clamped gates in turn
    "apertus": BOTH,  # an activation with parameters
    "minimax_m3_vl_text": "MLP and attention and experts",  # clamped gates side by side
    "hunyuan_v1_dense": BOTH,  # norms of queries and keys after the rotation
    "olmo2": BOTH,  # norms over all heads
    "bitnet": BOTH,  # norms inside the halves
    "gpt_neo": "MLP",  # a window of its own
    "qwen3_moe": "attention and experts",  # experts in one tensor
    "deepseek_v2": "MLP and attention and experts",  # latents, complex rotary tables
    "deepseek_v3": "MLP and attention and experts",  # latents, queries of low rank
    "deepseek_v32": "MLP and experts",  # an index picks positions
    "minicpm3": BOTH,  # latents in whole blocks
    "bailing_hybrid": "MLP and attention and experts",  # latents and gates of heads
    "mamba": "",  # no part that is known
}


def case_of(name: str):
    return next(c for c in builders.cases(("causal_lm",)) if c.model_type == name)


@pytest.mark.parametrize("name", SAMPLE)
def test_logits_and_tokens_are_those_of_the_unfused_model(name):
    row = table.examine(case_of(name))
    assert row["status"] == "ok", row
    assert row["fused"] == SAMPLE[name], row["left"]


@pytest.mark.slow
@pytest.mark.parametrize("case", builders.cases(("causal_lm",)), ids=lambda c: c.model_type)
def test_every_architecture(case):
    row = table.examine(case)
    assert row["status"] in ("ok", "not built", "not run"), row
