"""Example 1 as written: a ChatGLM2-style model whose code lies in the checkpoint directory."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

STYLE = Path(__file__).parent / "chatglm2_style"
PROMPT = torch.arange(5, 17)[None]


def float_model(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model with seeded random weights, its code and configuration taken from `directory`."""
    shutil.copytree(STYLE, directory, ignore=shutil.ignore_patterns("__pycache__"))
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    config.dtype = dtype
    model = AutoModel.from_config(config, trust_remote_code=True)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            # Norms away from 1 and a bias away from 0, so that a lost one changes the tokens.
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * values)
            else:
                parameter.copy_(0.2 * values)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_example_1(dtype, tmp_path):
    from ipex_llm import optimize_model

    saved_dir = str(tmp_path / "saved")
    original = float_model(tmp_path / "original", dtype)
    rotary = original.transformer.rotary_pos_emb.inv_freq.clone()
    original = optimize_model(original)
    expected = list(original.stream_generate(PROMPT, 12))
    logits = original(PROMPT).logits
    original.save_low_bit(saved_dir)
    # The saved directory stands alone: code, configuration, weights.
    shutil.rmtree(tmp_path / "original")

    # Take ChatGLM2-6B model as an example
    # Make sure you have saved the optimized model by calling 'save_low_bit'
    from ipex_llm.optimize import load_low_bit, low_memory_init

    with low_memory_init():  # Fast and low cost by loading model on meta device
        model = AutoModel.from_pretrained(saved_dir, torch_dtype="auto", trust_remote_code=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    model = load_low_bit(model, saved_dir)  # Load the optimized model

    assert type(model).__name__ == "ChatGLMForConditionalGeneration"
    assert not model.training
    # Buffers come from the save, and before that from the model's own constructor: never left as
    # memory happened to be.
    assert torch.equal(model.transformer.rotary_pos_emb.inv_freq, rotary)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(PROMPT).logits, logits)
    assert list(model.stream_generate(PROMPT, 12)) == expected


def test_optimized_model_computes_what_its_weights_say(tmp_path):
    """Against the same float code run on the dequantized weights."""
    import ipex_llm

    model = float_model(tmp_path / "original", torch.float32)
    reference = float_model(tmp_path / "reference", torch.float32)
    before = model(PROMPT).logits
    model = ipex_llm.optimize_model(model, low_bit="sym_int4")
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            weight = weights[name]
            if isinstance(weight, ipex_llm.LowBitTensor):
                parameter.copy_(weight.dequantize())
    with ipex_llm.set_activation_precision("fp32"):
        after = model(PROMPT).logits
    expected = reference(PROMPT).logits
    # Activations to 15 bits: 2^-15 per product; two blocks with a softmax between them pass it on
    # amplified, but not hundredfold.
    error = torch.linalg.vector_norm(after - expected) / torch.linalg.vector_norm(expected)
    assert error < 100 * 2**-15
    assert not torch.allclose(expected, before, rtol=1e-3)  # it was quantized
