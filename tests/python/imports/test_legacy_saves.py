"""Saves that ipex-llm 2.2.0 itself wrote (make_checkpoints.py), through load_low_bit."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from make_checkpoints import DATA, LEGACY_TYPES, ON_THE_CPU, Layers, fill
from safetensors.torch import load_file
from torch import nn

import ipex_llm
from ipex_llm.formats import FORMATS
from ipex_llm.optimize import load_low_bit, low_memory_init

IDS = torch.arange(1, 13)[None]
NOT_EXACT = {"sym_int8": "scales rounded", "nf3": "codebook", "fp8_e4m3": "scales per 64"}
# What quantizing itself may cost, for the types that the archived project does not run on CPUs.
CODEBOOK_ERROR = {"nf3": 0.2, "nf4": 0.11, "fp4": 0.13, "fp8_e4m3": 0.06, "fp8_e5m2": 0.11}


def layers(low_bit: str) -> Layers:
    with low_memory_init():
        model = Layers()
    return load_low_bit(model.eval(), DATA / f"legacy_{low_bit}")


def numpy_weight(low_bit: str, flat: np.ndarray, n: int, k: int) -> np.ndarray:
    """A second reader of the blocks, from docs/imports.md."""
    blocks = flat.reshape(n, k // 64, -1)

    def half(at):
        return blocks[..., at : at + 2].copy().view(np.float16).astype(np.float64)

    def single():
        return blocks[..., :4].copy().view(np.float32).astype(np.float64)

    def bits(part):
        return np.unpackbits(part, axis=-1, bitorder="little").astype(int)

    def low_first(part):
        return np.concatenate((part % 16, part // 16), -1).astype(int)

    if low_bit == "sym_int4":
        values = half(0) * (low_first(blocks[..., 2:]) - 8)
    elif low_bit == "asym_int4":
        values = half(0) * low_first(blocks[..., 4:]) + half(2)
    elif low_bit == "sym_int5":
        values = half(0) * (low_first(blocks[..., 10:]) + 16 * bits(blocks[..., 2:10]) - 16)
    elif low_bit == "asym_int5":
        codes = low_first(blocks[..., 12:]) + 16 * bits(blocks[..., 4:12])
        values = half(0) * codes + half(2)
    elif low_bit == "sym_int8":
        values = single() * blocks[..., 4:].copy().view(np.int8)
    elif low_bit == "nf4":
        table = np.array(FORMATS["nf4"].codebook, np.float32).astype(np.float64)
        values = half(0) * table[np.concatenate((blocks[..., 2:] // 16, blocks[..., 2:] % 16), -1)]
    elif low_bit == "fp4":
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table = np.concatenate((table, -table))
        values = half(0) * table[low_first(blocks[..., 2:])]
    else:
        dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[low_bit]
        numbers = torch.from_numpy(blocks[..., 4:].copy()).view(dtype).double().numpy()
        values = single() * numbers / (256 if low_bit == "fp8_e4m3" else 1)
    return values.reshape(n, k)


@pytest.mark.parametrize("low_bit", LEGACY_TYPES)
def test_the_weights_are_those_of_the_archived_project(low_bit):
    model, original = layers(low_bit), fill(Layers())
    report = ipex_llm.import_report(model)
    if low_bit in NOT_EXACT:
        assert not report.exact
        assert all(NOT_EXACT[low_bit] in entry["note"] for entry in report.rounded)
    else:
        assert not report.rounded
    saved = torch.load(DATA / f"legacy_{low_bit}" / "pytorch_model.bin", weights_only=True)
    outputs = DATA / f"legacy_{low_bit}" / "expected.safetensors"
    for name in ("one", "two"):
        weight, float_weight = getattr(model, name).weight, getattr(original, name).weight
        values = weight.dequantize(torch.float64)
        # 2^-11 where fp32 scales became fp16, half a step of int8 where it was quantized again.
        tolerance = {"sym_int8": 2.0**-11, "fp8_e4m3": 1 / 254, "nf3": 1 / 254}.get(low_bit, 0.0)
        if low_bit in ("fp16", "bf16"):
            assert torch.equal(values, saved[f"{name}.weight"].double())
        elif low_bit != "nf3":
            flat = saved[f"{name}.weight"].view(torch.uint8).numpy()
            expected = numpy_weight(low_bit, flat, *weight.shape)
            error = np.abs(values.numpy() - expected)
            assert error.max() <= tolerance * np.abs(expected).max() * 1.001
        if low_bit in CODEBOOK_ERROR:
            error = (values - float_weight).norm() / float_weight.norm()
            assert error < CODEBOOK_ERROR[low_bit]
        if low_bit in ON_THE_CPU:
            # Its outputs for unit vectors, in float32 (bf16: rounded once with the bias).
            bias = getattr(original, name).bias
            expected = load_file(outputs)[name].T - (0 if bias is None else bias[:, None])
            slack = 2.0**-7 if low_bit == "bf16" else tolerance + 2.0**-22
            assert (values - expected).abs().max() <= slack * values.abs().max()
    assert torch.equal(model.one.bias.float(), original.one.bias.to(model.one.bias.dtype).float())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_language_model_says_what_it_said_there(name, tmp_path):
    """Merged q, k and v; Qwen2 also with biases, a padded MLP, in shards, by the other API."""
    from transformers import AutoModelForCausalLM

    directory = DATA / f"legacy_{name}"
    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype="auto")
    model = load_low_bit(model, directory)
    assert not ipex_llm.import_report(model).rounded
    expected = load_file(directory / "expected.safetensors")["logits"][:, -1]
    with torch.enable_grad():  # so that nothing is fused yet, which takes seconds
        logits = model(IDS).logits
        # It rounds activations to int8 per 64 inputs, which is 1 to 2 % of the outputs; so does
        # "auto" where there is VNNI, and then the two agree to 1e-6.
        assert (logits[:, -1] - expected).abs().max() < 0.03 * expected.abs().max()
        assert (logits[:, -1] - expected).norm() < 0.02 * expected.norm()
        model.save_low_bit(tmp_path)
        with low_memory_init():
            again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(load_low_bit(again, tmp_path)(IDS).logits, logits)


def copied(name: str, tmp_path):
    shutil.copytree(DATA / name, tmp_path / name)
    return tmp_path / name


def state_of(directory) -> dict:
    return torch.load(directory / "pytorch_model.bin", weights_only=True)


def test_a_head_that_was_packed_beside_its_tied_table(tmp_path):
    """That project packs the head of a tied model and leaves the table float."""
    from transformers import AutoModelForCausalLM

    directory = copied("legacy_llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(directory)
    model = load_low_bit(model, directory)
    assert isinstance(model.lm_head.weight, ipex_llm.LowBitTensor)
    assert not isinstance(model.model.embed_tokens.weight, ipex_llm.LowBitTensor)


def test_projections_that_were_split(tmp_path):
    """optimize_llm splits gate_up_proj and dense_h_to_4h; here they are put together again."""

    class Mlp(nn.Module):
        def __init__(self, name):
            super().__init__()
            setattr(self, name, nn.Linear(64, 24, bias=False))

    data = state_of(DATA / "legacy_sym_int4")["one.weight"]
    (tmp_path / "bigdl_config.json").write_text('{"bigdl_transformers_low_bit": "sym_int4"}')
    torch.save(
        {"mlp.gate_proj.weight": data, "mlp.up_proj.weight": data[: 8 * 34].clone()},
        tmp_path / "pytorch_model.bin",
    )
    whole = layers("sym_int4").one.weight.dequantize()
    for name in ("gate_up_proj", "dense_h_to_4h"):
        model = nn.ModuleDict({"mlp": Mlp(name)})
        weight = getattr(load_low_bit(model, tmp_path)["mlp"], name).weight
        assert torch.equal(weight.dequantize(), torch.cat((whole, whole[:8])))


class Runs:
    """Unpickling it would make a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_type(d):
    (d / "bigdl_config.json").write_text('{"bigdl_transformers_low_bit": "q2_k"}')


def not_json(d):
    (d / "bigdl_config.json").write_text("{")


def twice(d):
    key = '"bigdl_transformers_low_bit": '
    (d / "bigdl_config.json").write_text("{" + key + '"nf4", ' + key + '"sym_int4"}')


def truncated(d):
    data = (d / "pytorch_model.bin").read_bytes()
    (d / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def runs_code(d):
    torch.save({"one.weight": Runs(d / "made")}, d / "pytorch_model.bin")


def runs_code_without_zip(d):
    (d / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(d / "made"), protocol=2))


def a_list(d):
    torch.save([torch.zeros(3)], d / "pytorch_model.bin")


def one_row_less(d):
    state = state_of(d)
    state["one.weight"] = state["one.weight"][:-34].clone()
    torch.save(state, d / "pytorch_model.bin")


def huge_by_strides(d):
    state = state_of(d)
    state["two.weight"] = torch.zeros(1, dtype=torch.uint8).expand(1 << 40)
    torch.save(state, d / "pytorch_model.bin")


def infinite_scale(d):
    state = state_of(d)
    state["two.weight"][:2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    torch.save(state, d / "pytorch_model.bin")


def a_packed_weight_of_ours(d):
    state = state_of(d)
    state["two.weight"] = ipex_llm.LowBitTensor.quantize(torch.randn(8, 128), "sym_int4")
    torch.save(state, d / "pytorch_model.bin")


def leads_out(d):
    index = {"weight_map": {"one.weight": "../pytorch_model.bin"}}
    (d / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def fifo(d):
    (d / "pytorch_model.bin").unlink()
    os.mkfifo(d / "pytorch_model.bin")


def missing(d):
    (d / "pytorch_model.bin").unlink()


def another_model(d):
    state = state_of(d)
    state["three.weight"] = state.pop("two.weight")
    torch.save(state, d / "pytorch_model.bin")


BAD = {
    bad_type: "in its type 'q2_k', which is not read; expected one of sym_int4",
    not_json: "bigdl_config.json is not JSON",
    twice: "the key 'bigdl_transformers_low_bit' twice",
    truncated: "pytorch_model.bin is damaged",
    runs_code: "because it could run code",
    runs_code_without_zip: "because it could run code",
    a_list: "holds a list, expected tensors by name",
    one_row_less: "'one.weight' has 510 bytes, expected 544",
    huge_by_strides: "'two.weight' is not contiguous",
    infinite_scale: "'two.weight': a block has a scale that is not finite",
    a_packed_weight_of_ours: "'two.weight' is a LowBitTensor, expected a plain tensor",
    leads_out: "is said to be in '../pytorch_model.bin'",
    fifo: "is not a regular file",
    missing: "does not exist",
    another_model: "holds another model than this Layers",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda f: f.__name__)
def test_what_is_refused(damage, tmp_path):
    from saved_models import same, snapshot

    directory = copied("legacy_sym_int4", tmp_path)
    damage(directory)
    model = fill(Layers())
    before = snapshot(model)
    error = FileNotFoundError if damage is missing else ValueError
    with pytest.raises(error, match=r"^load_low_bit: ") as caught:
        load_low_bit(model, directory)
    assert BAD[damage] in str(caught.value)
    assert same(before, snapshot(model))
    assert not (directory / "made").exists()


def test_models_whose_weights_were_rescaled_are_refused():
    model = fill(Layers())
    model.config = type("Config", (), {"model_type": "minicpm"})()
    with pytest.raises(ValueError, match="applies again"):
        load_low_bit(model, DATA / "legacy_sym_int4")


def test_the_report_is_of_imported_models_only():
    with pytest.raises(ValueError, match="was not imported"):
        ipex_llm.import_report(Layers())
    assert "2 of 2 weights are exactly" in str(ipex_llm.import_report(layers("nf4")))
