"""transformers loads saves directly once asked to. Each test in a process of its own would be slow:
registering is for a whole process, so one program does everything and says what it saw."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ipex_llm import optimize_model
from saved_models import tiny_llama

PROGRAM = """
import sys, torch, warnings
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

model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out)
assert torch.equal(again(tokens).logits, expected)
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
