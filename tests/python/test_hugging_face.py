"""transformers loads saves directly once asked to. Each test in a process of its own would be slow:
registering is for a whole process, so one program does everything and says what it saw."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ipex_llm import optimize_model, program
from saved_models import tiny_llama

PROGRAM = """
import json, os, sys, torch, warnings
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from ipex_llm import LowBitTensor
from ipex_llm.optimize import low_memory_init, load_low_bit
from saved_models import ids, tiny_llama
saved, plain, out = sys.argv[1:]

try:
    AutoModelForCausalLM.from_pretrained(saved)
    raise SystemExit("loaded without registering")
except OSError as error:
    assert "no file named" in str(error), error

import ipex_llm.transformers
import ipex_llm
method = PreTrainedModel.__dict__["from_pretrained"]
ipex_llm.register_with_transformers()
assert PreTrainedModel.__dict__["from_pretrained"] is method, "registered twice"

tokens = ids() + 1
with low_memory_init():
    reference = LlamaForCausalLM.from_pretrained(saved)
assert all(p.is_meta for p in reference.parameters())
reference = load_low_bit(reference, saved)
expected = reference(tokens).logits

model = AutoModelForCausalLM.from_pretrained(saved)
assert isinstance(model.model.layers[0].mlp.up_proj.weight, LowBitTensor)
assert torch.equal(model(tokens).logits, expected) and not model.training
base = AutoModel.from_pretrained(saved)
assert torch.equal(base(tokens).last_hidden_state, reference.model(tokens).last_hidden_state)
for device_map in ("auto", "cpu", {"": "cpu"}, torch.device("cpu")):
    placed = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
    assert torch.equal(placed(tokens).logits, expected)
split = {"model": "cpu", "lm_head": "cpu"}
dispatched = AutoModelForCausalLM.from_pretrained(saved, device_map=split)
assert torch.equal(dispatched(tokens).logits, expected)
half = AutoModelForCausalLM.from_pretrained(saved, dtype="bfloat16")
assert half.dtype == half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
assert not any(info.values())

# What is not a save loads as before.
ordinary = AutoModelForCausalLM.from_pretrained(plain)
assert not any(isinstance(p, LowBitTensor) for p in ordinary.parameters())

# What transformers' own quantizers leave on a model; casts go on working.
with open(os.path.join(saved, "config.json")) as file:
    facts = json.load(file)["quantization_config"]
assert facts["quant_method"] == "ipex_llm" and facts["low_bit"] == "sym_int4"
from ipex_llm.transformers import LowBitConfig
from transformers.quantizers import AutoQuantizationConfig
config = AutoQuantizationConfig.from_pretrained(saved)
assert isinstance(config, LowBitConfig) and config.to_dict() == facts
assert model.is_quantized and model.quantization_method == "ipex_llm"
assert model.hf_quantizer.is_serializable()
assert model.config.quantization_config.low_bit == "sym_int4"
assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32

# Quantized while it is loaded.
for low_bit in ("nf4", "fp8_e4m3"):
    fresh = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=LowBitConfig(low_bit, modules_to_not_convert=["lm_head"])
    )
    assert fresh.model.layers[0].mlp.up_proj.weight.low_bit == low_bit
    by_hand = ipex_llm.optimize_model(
        LlamaForCausalLM.from_pretrained(plain), low_bit, modules_to_not_convert=["lm_head"]
    )
    assert torch.equal(fresh(tokens).logits, by_hand(tokens).logits)
    assert not isinstance(fresh.lm_head.weight, LowBitTensor)
try:
    LowBitConfig("int3")
    raise SystemExit("int3 is no type")
except ValueError as error:
    assert "LowBitConfig" in str(error), error

# A hub's cache is directories of links; a save may lie in a subfolder.
snapshot = os.path.join(out + "_cache", "models--someone--tiny", "snapshots", "0" * 40)
os.makedirs(snapshot)
os.makedirs(os.path.join(out + "_cache", "models--someone--tiny", "refs"))
with open(os.path.join(out + "_cache", "models--someone--tiny", "refs", "main"), "w") as file:
    file.write("0" * 40)
for name in os.listdir(saved):
    os.symlink(os.path.join(saved, name), os.path.join(snapshot, name))
cached = AutoModelForCausalLM.from_pretrained("someone/tiny", cache_dir=out + "_cache")
assert torch.equal(cached(tokens).logits, expected)
nested = AutoModelForCausalLM.from_pretrained(
    os.path.dirname(saved), subfolder=os.path.basename(saved)
)
assert torch.equal(nested(tokens).logits, expected)

model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out)
assert torch.equal(again(tokens).logits, expected)
os.remove(os.path.join(out, "ipex_llm.json"))
try:
    AutoModelForCausalLM.from_pretrained(out)
    raise SystemExit("loaded without its manifest")
except (ValueError, OSError) as error:
    assert "ipex_llm.json" in str(error), error
print("passed")
"""


@pytest.fixture
def directories(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    optimize_model(tiny_llama()).save_low_bit(tmp_path / "saved", max_shard_size="30KB")
    return tmp_path / "saved", tmp_path / "plain", tmp_path / "out"


def test_from_pretrained_and_save_pretrained(directories):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, directories)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.stdout.endswith("passed\n"), done.stderr


LIBRARIES = """
import sys, torch
import ipex_llm.transformers
from ipex_llm import LowBitTensor
from sentence_transformers import SentenceTransformer
from transformers import pipeline
text, minilm, float_minilm, saved = sys.argv[1:]

generate = pipeline("text-generation", model=text)
assert isinstance(generate.model.model.layers[0].mlp.up_proj.weight, LowBitTensor)
said = generate("The capital of France is", max_new_tokens=5, do_sample=False)
assert "Paris" in said[0]["generated_text"], said

sentences = ["A man eats food.", "A man is eating.", "The girl carries a baby."]
encoder = SentenceTransformer(minilm, device="cpu")
assert any(isinstance(p, LowBitTensor) for p in encoder.parameters())
ours = torch.as_tensor(encoder.encode(sentences))
exact = torch.as_tensor(SentenceTransformer(float_minilm, device="cpu").encode(sentences))
assert torch.cosine_similarity(ours, exact).min() > 0.99

# Saved by its own method: transformer, pooling and normalizing.
encoder = ipex_llm.optimize_model(SentenceTransformer(float_minilm, device="cpu"), "nf4")
encoder.save_pretrained(saved)
again = SentenceTransformer(saved, device="cpu")
assert {p.low_bit for p in again.parameters() if isinstance(p, LowBitTensor)} == {"nf4"}
assert torch.equal(*(torch.as_tensor(m.encode(sentences)) for m in (again, encoder)))
print("passed")
"""


def test_pipelines_and_sentence_transformers_load_conversions(smollm2_dir, minilm_dir, tmp_path):
    """Directories that the program wrote, tokenizer and module folders included."""
    for source, name in ((smollm2_dir, "text"), (minilm_dir, "minilm")):
        arguments = ["convert", source, tmp_path / name, "--low-bit", "sym_int8", "--quiet"]
        subprocess.run([program.PROGRAM, *map(str, arguments)], check=True)
    arguments = [tmp_path / "text", tmp_path / "minilm", minilm_dir, tmp_path / "saved"]
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.stdout.endswith("passed\n"), done.stderr


def test_importing_ipex_llm_registers_nothing():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from transformers import PreTrainedModel\n"
            "before = PreTrainedModel.__dict__['from_pretrained']\n"
            "import ipex_llm.optimize\n"
            "assert PreTrainedModel.__dict__['from_pretrained'] is before\n",
        ],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0


def test_the_archived_projects_classes_are_answered_with_what_to_do_instead():
    done = subprocess.run(
        [sys.executable, "-c", "from ipex_llm.transformers import AutoModelForCausalLM"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 1
    assert (
        "ImportError: ipex_llm.transformers has no AutoModelForCausalLM; load with" in done.stderr
    )
