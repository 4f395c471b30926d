"""What load_low_bit does to a model: fills it, or leaves it alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ipex_llm import optimize_model
from ipex_llm.optimize import load_low_bit, low_memory_init
from saved_models import Mixed, ids, mixed, same, snapshot, tiny_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixed")
    optimize_model(mixed()).save_low_bit(directory)
    return directory


@pytest.fixture(scope="module")
def expected():
    return optimize_model(mixed())(ids())


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_into_a_model_with_values(saved, expected, mmap, verify):
    model = mixed(5)
    assert load_low_bit(model, str(saved), verify=verify, mmap=mmap) is model
    assert torch.equal(model(ids()), expected)


def test_the_save_may_be_gone_afterwards(saved, expected, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    model = load_low_bit(mixed(5), copy)
    shutil.rmtree(copy)
    assert torch.equal(model(ids()), expected)


def test_into_an_optimized_model(saved, expected):
    model = optimize_model(mixed(5), low_bit="nf3", modules_to_not_convert=["lift"])
    load_low_bit(model, saved)
    assert torch.equal(model(ids()), expected)
    assert model.lift.weight.low_bit == "sym_int4"


def test_flags_hooks_and_computed_buffers_stay(saved):
    model = mixed(5).train()
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    model.computed.zero_()
    calls = []
    model.lift.register_forward_hook(lambda *_: calls.append(1))
    computed = model.computed
    load_low_bit(model, saved)
    assert model.training and not model.norm.training
    assert not model.norm.weight.requires_grad and model.norm.bias.requires_grad
    assert model.computed is computed and not model.computed.any()
    model(ids())
    assert calls == [1]


def test_what_is_loaded_can_be_changed_without_touching_the_file(saved, expected):
    model = load_low_bit(mixed(5), saved)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.positions.zero_()
    assert torch.equal(load_low_bit(mixed(5), saved)(ids()), expected)


def test_ties_are_restored_whatever_the_model_had(saved, expected):
    model = mixed(5)
    model.head.weight = nn.Parameter(torch.zeros(50, 48))
    load_low_bit(model, saved)
    assert model.head.weight is model.table.weight
    assert torch.equal(model(ids()), expected)


def test_differences_are_listed_and_nothing_is_touched(saved):
    model = mixed(5)
    model.extra = nn.Linear(3, 3)
    model.lift = nn.Linear(48, 71)
    del model.norm
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        load_low_bit(model, saved)
    text = str(error.value)
    assert "6 differences" in text
    assert "extra.weight: parameter [3, 3] of the model is not in the save" in text
    assert "lift.weight: the model has [71, 48], the save [70, 48]" in text
    assert "norm.weight: [70] of the save is not in the model" in text
    assert same(before, snapshot(model))


def test_at_most_ten_differences_are_listed(saved):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more") as error:
        load_low_bit(model, saved)
    assert str(error.value).count("\n  ") == 11
    assert same(before, snapshot(model))


def test_a_buffer_constructed_on_meta_is_asked_for(saved):
    with torch.device("meta"):
        model = Mixed()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"computed.*low_memory_init"):
        load_low_bit(model, saved)
    assert same(before, snapshot(model))


def test_bad_arguments(saved):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        load_low_bit("model", saved)
    with pytest.raises(TypeError, match="not the class"):
        load_low_bit(Mixed, saved)
    with pytest.raises(TypeError, match="verify"):
        load_low_bit(mixed(), saved, verify="yes")
    with pytest.raises(TypeError, match="mmap"):
        load_low_bit(mixed(), saved, mmap=None)
    with pytest.raises(TypeError, match="the directory"):
        load_low_bit(mixed(), None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_low_bit(mixed(), saved / "nowhere")


def test_options_come_back(tmp_path):
    model = optimize_model(
        mixed(), cpu_embedding=True, lightweight_bmm=True, modules_to_not_convert=["attention"]
    )
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(mixed(5), tmp_path)
    from ipex_llm.record import options_of

    assert options_of(loaded) == options_of(model)
    with pytest.raises(ValueError, match="already optimized"):
        optimize_model(loaded)


# ---- transformers --------------------------------------------------------------------------------


def test_base_class_and_class_with_a_head_match_each_other(tmp_path):
    from transformers import LlamaForCausalLM, LlamaModel

    tokens = ids() + 1
    model = optimize_model(tiny_llama())
    model.save_low_bit(tmp_path / "head")
    with low_memory_init():
        base = LlamaModel.from_pretrained(tmp_path / "head")
    base = load_low_bit(base, tmp_path / "head")
    hidden = base(tokens).last_hidden_state
    assert torch.equal(hidden, model.model(tokens).last_hidden_state)

    base.save_low_bit(tmp_path / "base")
    with low_memory_init():
        head = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    head = load_low_bit(head, tmp_path / "base")
    assert head.lm_head.weight is head.model.embed_tokens.weight
    assert torch.equal(head(tokens).logits, model(tokens).logits)


def test_an_untied_head_is_not_invented(tmp_path):
    from transformers import LlamaForCausalLM

    model = optimize_model(tiny_llama(tie_word_embeddings=False))
    optimize_model(tiny_llama(tie_word_embeddings=False).model).save_low_bit(tmp_path)
    with low_memory_init():
        head = LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match=r"lm_head\.weight: parameter .* is not in the save"):
        load_low_bit(head, tmp_path)


def test_float_load_of_transformers_does_not_take_a_save_for_a_model(tmp_path):
    from transformers import LlamaForCausalLM

    optimize_model(tiny_llama()).save_low_bit(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        LlamaForCausalLM.from_pretrained(tmp_path)


# ---- speed and memory ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_1b_model_loads_within_a_second_and_its_own_size():
    """The load row of the speed table (docs/performance.md), in processes of their own."""
    program = Path(__file__).with_name("load_1b.py")
    directory = Path(__file__).parents[2] / ".cache" / "llama1b-sym_int4"
    if not (directory / "ipex_llm.json").exists():
        subprocess.run([sys.executable, program, "make", directory], check=True)
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, program, "load", directory], check=True, capture_output=True, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    # The best of three: the others may have shared the machine.
    assert min(run["seconds"] for run in runs) < 1, runs
    for run in runs:
        assert run["RSS growth MiB"] <= run["file MiB"] + 400, runs
