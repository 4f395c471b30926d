"""A sample of the zoo (tests/python/zoo): one class per kind of weight. `make zoo` runs all."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from zoo import builders, checks, others

# Class -> what it is here for.
SAMPLE = {
    "LlamaForCausalLM": "the plain decoder",
    "GPT2LMHeadModel": "Conv1D, tied head",
    "GPTNeoXForCausalLM": "fused projections",
    "MambaForCausalLM": "state-space layers",
    "DbrxForCausalLM": "experts handed to a child module",
    "GptOssForCausalLM": "transposed experts with biases",
    "JetMoeForCausalLM": "experts behind an index",
    "DeepseekV3ForCausalLM": "latent attention, router",
    "RwkvForCausalLM": "a forward that writes some of its weights",
    "XLNetLMHeadModel": "3-D einsum weights",
    "T5ForConditionalGeneration": "encoder and decoder",
    "IBertForMaskedLM": "weights read by custom autograd functions",
    "WhisperForConditionalGeneration": "audio, convolutions",
    "ViTForImageClassification": "patch embedding",
    "BitForImageClassification": "standardized convolutions",
    "Qwen2VLForConditionalGeneration": "vision and text",
    "PatchTSTModel": "time series",
}
CASES = {case.class_name: case for case in builders.cases() if case.class_name in SAMPLE}


def test_the_sample_exists():
    assert set(CASES) == set(SAMPLE)


@pytest.mark.parametrize("name", SAMPLE)
def test_class(name):
    low_bit = ("sym_int4", "nf4")[len(name) % 2]  # both types, half of the time
    (result,) = checks.run_case(CASES[name], (low_bit,))
    assert result.status == "ok", result.detail


@pytest.mark.parametrize("case", others.cases(), ids=lambda case: case.class_name)
def test_other(case):
    (result,) = others.run_case(case, ("sym_int4",))
    if result.status == "not built":
        pytest.skip(result.detail)
    assert result.status == "ok", result.detail


def test_a_wrong_weight_is_noticed(monkeypatch):
    """The zoo can fail: wrong codes in a few rows of one layer are far above its tolerance."""
    dequantize = checks.ipex_llm.dequantize

    def other_weights(model):
        model.model.layers[0].mlp.down_proj.weight.packed[0, :32] ^= 0x77
        return dequantize(model)

    monkeypatch.setattr(checks.ipex_llm, "dequantize", other_weights)
    (result,) = checks.run_case(CASES["LlamaForCausalLM"], ("sym_int4",), save=False)
    assert result.status == "failed"
    assert "differs from the dequantized model" in result.detail
