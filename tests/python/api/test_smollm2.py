"""SmolLM2-135M: text generation with each type, saved and loaded, token for token."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Bits per weight as documented, for SmolLM2's shapes within 2 % (its 9 groups of 64 inputs end in a
# lone group, whose scale block is padded).
BITS = {
    "sym_int4": 4.25,
    "asym_int4": 4.5,
    "sym_int5": 5.25,
    "asym_int5": 5.5,
    "sym_int8": 8.25,
    "nf3": 3.25,
    "nf4": 4.25,
    "fp4": 4.25,
    "fp8": 8.0,
    "fp8_e4m3": 8.0,
    "fp8_e5m2": 8.0,
    "fp16": 16.0,
    "bf16": 16.0,
}
IN_FULL = {"sym_int4", "nf3", "fp8", "bf16"}  # one of each way to store; the rest when slow


# The float model prefers " Paris" by 5.2 in logits; asked in a chat, the first token is a tie of
# "The" and "L'" that any rounding decides.
PROMPT = "The capital of France is the city of"


def prompt(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer, tokenizer(PROMPT, return_tensors="pt")


def generate(model, ids, count=16):
    return model.generate(**ids, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize(
    "low_bit",
    [name if name in IN_FULL else pytest.param(name, marks=pytest.mark.slow) for name in BITS],
)
def test_generate_save_load(low_bit, smollm2_dir, tmp_path):
    from ipex_llm import optimize_model
    from ipex_llm.optimize import load_low_bit, low_memory_init

    tokenizer, ids = prompt(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype="auto")
    quantized = sum(
        parameter.numel() for parameter in model.parameters() if parameter.ndim == 2
    )  # every matrix; the output layer is the embedding's
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim != 2)

    model = optimize_model(model, low_bit=low_bit)
    expected = generate(model, ids)
    text = tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    if low_bit not in ("nf3", "fp4"):  # coarser than a 135M model stands: any text will do
        assert "Paris" in text

    model.save_low_bit(tmp_path)
    files = json.loads((tmp_path / "ipex_llm.json").read_text())
    assert files
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert stored == pytest.approx(quantized * BITS[low_bit] / 8 + rest, rel=0.02)

    del model
    with low_memory_init():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    loaded = load_low_bit(loaded, tmp_path)
    assert torch.equal(generate(loaded, ids), expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
