"""plan(): what becomes of every parameter, on any module and device, touching nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor, optimize_model, planning
from ipex_llm.arguments import LOW_BITS


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 48)
        self.linear = nn.Linear(48, 40)
        self.head = nn.Linear(48, 30, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(48))
        self.ids = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, ids):
        return self.head(self.linear(self.embed(ids))[..., :48] * self.scale)


def test_the_plan_is_what_optimize_model_does():
    model = Mixed()
    plan = ipex_llm.plan(model, "nf4")
    assert not any(isinstance(p, LowBitTensor) for p in model.parameters())
    optimize_model(model, "nf4")
    for name, parameter in model.named_parameters():
        (entry,) = (e for e in plan if name in e.names)
        assert entry.converts == isinstance(parameter, LowBitTensor)
        if entry.converts:
            assert entry.low_bit == parameter.low_bit
            assert entry.group_size == parameter.group_size
            assert entry.bytes_after == parameter.packed.numel()
        else:
            assert entry.bytes_after == parameter.numel() * parameter.element_size()
            assert entry.reason


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (100, 4096), (3, 50, 31)])
@pytest.mark.parametrize("low_bit", LOW_BITS)
def test_packed_bytes(low_bit, shape):
    packed = LowBitTensor.quantize(torch.zeros(shape), low_bit).packed
    assert planning.packed_bytes(shape, low_bit) == packed.numel()


def test_the_table_and_the_dict_say_the_same():
    plan = ipex_llm.plan(Mixed(), modules_to_not_convert=["linear"])
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["model"] == "Mixed"
    assert values["bytes_before"] == sum(p["bytes_before"] for p in values["parameters"])
    assert values["bytes_after"] == sum(p["bytes_after"] for p in values["parameters"])
    assert 0 < values["share_converted"] < 1
    by_name = {p["name"]: p for p in values["parameters"]}
    assert by_name["embed.weight"]["names"] == ["embed.weight", "head.weight"]
    assert by_name["embed.weight"]["low_bit"] == "sym_int4"
    assert "modules_to_not_convert ('linear')" in by_name["linear.weight"]["reason"]
    assert "int64" in by_name["ids"]["reason"]
    text = str(plan)
    for name, entry in by_name.items():
        assert name in text
        assert entry["reason"] in text
    assert f"{values['bytes_after']:,}" in text


def test_meta_models_can_be_planned():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008), nn.Linear(11008, 4096))
    plan = ipex_llm.plan(model)
    assert plan.bytes_before == 4 * (2 * 4096 * 11008 + 11008 + 4096)
    assert 0.13 < plan.bytes_after / plan.bytes_before < 0.14
    assert all(p.is_meta for p in model.parameters())


def test_an_optimized_model_can_be_planned():
    model = optimize_model(Mixed(), modules_to_not_convert=["linear"])
    plan = ipex_llm.plan(model)
    entry = next(e for e in plan if e.name == "embed.weight")
    assert entry.done and entry.reason == "already low-bit"
    assert next(e for e in plan if e.name == "linear.weight").converts


def test_strict_names_what_would_stay_float_and_touches_nothing():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(64, 64))
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(x) + self.table

    model = nn.Sequential(Gate())
    with pytest.raises(ValueError, match=r"0\.table \[64, 64\]: 4\d\.\d%.*not used as a matrix"):
        optimize_model(model, strict=True)
    assert not any(isinstance(p, LowBitTensor) for p in model.parameters())
    optimize_model(model, strict=0.6)
    assert isinstance(model[0].linear.weight, LowBitTensor)
    model = nn.Sequential(Gate())
    optimize_model(model, strict=True, modules_to_not_convert=["table"])  # asked for by name


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = nn.Linear(64, 64)
        self.again = [self.seen]
        self.projections = {"a": [nn.Linear(64, 48), nn.Linear(48, 64)]}
        self.loose = torch.randn(64, 32)
        self.register_buffer("matrix", torch.randn(64, 64), persistent=False)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool))
        self.cycle = [self]
        self.cycle.append(self.cycle)


def test_matrices_that_are_no_parameters_are_named():
    model = nn.Sequential(Hidden())
    plan = ipex_llm.plan(model)
    assert [(e.name, e.is_weight) for e in plan.outside] == [
        ("0.matrix", False),
        ("0.projections['a'][0].weight", True),
        ("0.projections['a'][1].weight", True),
        ("0.loose", False),
    ]
    assert [e.name for e in plan] == ["0.seen.weight", "0.seen.bias"]
    facts = json.loads(json.dumps(plan.to_dict()))["outside"]
    assert facts[0] == {
        "name": "0.matrix",
        "shape": [64, 64],
        "dtype": "float32",
        "bytes": 64 * 64 * 4,
        "reason": "a buffer",
    }
    for fact in facts:
        assert fact["name"] in str(plan) and fact["reason"] in str(plan)
    with pytest.raises(ValueError, match=r"projections\['a'\]\[0\].weight.*register it"):
        optimize_model(model, strict=True)
    optimize_model(model)
    assert [e.name for e in ipex_llm.plan(model).outside] == [e.name for e in plan.outside]


def test_modules_that_contain_themselves_are_walked_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("again", model)
    assert len(ipex_llm.plan(nn.ModuleList([nn.Linear(4, 4)]))) == 2
    assert {e.name for e in planning.build_plan(model, planning.Options())} == {
        "0.weight",
        "0.bias",
    }


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("kv_proj", "layers.0.kv_proj", True),
        ("kv_proj", "layers.0.qkv_proj", False),
        ("kv_proj", "layers.0.kv_proj.weight", True),
        ("layers.0", "model.layers.0.mlp", True),
        ("layers.0", "model.layers.01.mlp", False),
        ("ers.0", "model.layers.0", False),
        ("layers.*.mlp", "model.layers.3.mlp.up", True),
        ("layers.*.mlp", "model.layers.3.attn.mlp", False),
        ("model.*.mlp", "model.layers.3.mlp", True),
        ("*_proj", "a.b.q_proj.weight", True),
        ("layers.[01]", "layers.1.x", True),
        ("layers.[01]", "layers.2.x", False),
        ("a.b.c", "a.b", False),
    ],
)
def test_name_matching(pattern, name, matches):
    assert planning.name_matches(pattern, name) == matches
