"""Codes and scales that others chose, packed without rounding, and models made of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import test_formats as numpy_reader
from ipex_llm import LowBitTensor, formats, ops, optimize_model
from ipex_llm.arguments import Options
from ipex_llm.imports.assemble import optimize_with
from ipex_llm.optimize import load_low_bit, low_memory_init
from saved_models import Mixed, ids, mixed, tiny_llama

WITH_CODES = [name for name in formats.FORMATS if name not in ("fp16", "bf16")]


def parts(low_bit, shape, group_size, seed=0):
    """Random codes, scales and minima of a format."""
    random = np.random.default_rng(seed)
    *lead, n, k = shape
    codes = random.integers(0, 1 << formats.FORMATS[low_bit].bits, shape, dtype=np.uint8)
    if low_bit == "sym_int8":
        codes[codes == 0] = 1
    groups = -(-k // group_size) if group_size else 1
    scales = random.normal(size=(*lead, n, groups)).astype(np.float16)
    minima = random.normal(size=scales.shape).astype(np.float16)
    if low_bit.startswith("fp8"):
        codes[codes & 0x7F >= 0x7B] = 0x3C
        scales = random.normal(size=(*lead, n)).astype(np.float32)
    tensors = [torch.from_numpy(a) for a in (codes, scales, minima)]
    return tensors[0], tensors[1], tensors[2] if low_bit.startswith("asym") else None


@pytest.mark.parametrize("low_bit", WITH_CODES)
def test_the_numpy_reader_sees_the_same_weights(low_bit):
    for group_size in (32, 64, 128, 256) if formats.FORMATS[low_bit].grouped else (0,):
        codes, scales, minima = parts(low_bit, (19, 212), group_size)
        packed = ops.pack_codes(codes, scales, low_bit, group_size, minima)
        read = numpy_reader.decode(packed.numpy().reshape(-1), low_bit, 19, 212, group_size, 0)
        wide = scales.double().reshape(19, -1).repeat_interleave(group_size or 212, 1)[:, :212]
        info = formats.FORMATS[low_bit]
        if low_bit in numpy_reader.FP8:
            values = torch.from_numpy(numpy_reader.FP8[low_bit])[codes.long()]
        elif low_bit in numpy_reader.TABLES:
            values = torch.from_numpy(numpy_reader.TABLES[low_bit]).double()[codes.long()]
        else:
            values = codes.double() - info.zero_point
        expected = wide * values
        if minima is not None:
            expected += minima.double().repeat_interleave(group_size, 1)[:, :212]
        assert np.array_equal(read, expected.numpy())


@pytest.mark.parametrize("low_bit", WITH_CODES)
@pytest.mark.parametrize("shape", [(3, 20, 100), (40, 64), (0, 32)])
def test_there_and_back(low_bit, shape):
    group_size = 32 if formats.FORMATS[low_bit].grouped else 0
    codes, scales, minima = parts(low_bit, shape, group_size)
    weight = LowBitTensor.from_codes(
        codes, scales, low_bit, group_size, minima=minima, exponent=-3, dtype=torch.bfloat16
    )
    assert weight.shape == shape
    assert weight.dtype == torch.bfloat16
    assert weight.packed.shape == formats.packed_shape(shape, low_bit, group_size)
    for got, expected in zip(weight.to_codes(), (codes, scales, minima), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    turned = LowBitTensor.from_codes(
        codes, scales, low_bit, group_size, minima=minima, exponent=-3, transposed=True
    )
    assert torch.equal(turned.dequantize(), weight.dequantize(torch.float32).mT)


def test_codes_of_quantize_pack_to_its_bytes():
    for low_bit in WITH_CODES:
        weight = LowBitTensor.quantize(torch.randn(2, 24, 100), low_bit)
        codes, scales, minima = weight.to_codes()
        again = LowBitTensor.from_codes(codes, scales, low_bit, minima=minima)
        assert torch.equal(again.packed, weight.packed)


def test_signed_codes_and_float8_codes():
    values = torch.tensor([[-8, -1, 0, 7] * 8], dtype=torch.int8)
    one = torch.ones(1, 1, dtype=torch.float16)
    weight = LowBitTensor.from_codes(values, one, "sym_int4", 32)
    assert torch.equal(weight.dequantize(), values.float())
    values[0, 3] = 8
    with pytest.raises(ValueError, match=r"codes\[0, 3\] is 16.*0 to 15"):
        LowBitTensor.from_codes(values, one, "sym_int4", 32)
    values = torch.randn(4, 32).to(torch.float8_e4m3fn)
    scales = torch.rand(4)
    weight = LowBitTensor.from_codes(values, scales, "fp8_e4m3")
    assert torch.equal(weight.dequantize(), values.float() * scales[:, None])
    with pytest.raises(TypeError, match="cannot have codes of"):
        LowBitTensor.from_codes(values, scales, "fp8_e5m2")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codes": torch.zeros(4, 64)}, TypeError, "codes must be Byte"),
        ({"codes": torch.zeros(64, dtype=torch.uint8)}, ValueError, "two dimensions"),
        ({"scales": torch.ones(4, 2)}, TypeError, "scales must be Half"),
        ({"scales": torch.ones(4, 3).half()}, ValueError, r"scales must be of shape \[4, 2\]"),
        ({"scales": torch.full((4, 2), torch.inf).half()}, ValueError, "is infinite"),
        ({"minima": torch.ones(4, 2).half()}, ValueError, "sym_int4 has no minima"),
        ({"low_bit": "asym_int4"}, ValueError, "asym_int4 needs minima"),
        ({"low_bit": "int4"}, ValueError, "unknown low_bit"),
        ({"group_size": 48}, ValueError, "group_size"),
        ({"low_bit": "fp16", "group_size": 0}, TypeError, "scales must be Float"),
    ],
)
def test_bad_parts_are_refused(change, error, match):
    good = {
        "codes": torch.zeros(4, 64, dtype=torch.uint8),
        "scales": torch.ones(4, 2).half(),
        "low_bit": "sym_int4",
        "group_size": 32,
    }
    ops.pack_codes(**good)
    with pytest.raises(error, match=match):
        ops.pack_codes(**{**good, **change})


def as_packed(model, names, **how):
    """The named weights of a float model as a checkpoint of another world would bring them."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    return {name: LowBitTensor.quantize(weights[name].detach(), **how) for name in names}


def test_a_model_of_given_weights_is_what_optimize_model_leaves(tmp_path):
    names = ["lift.weight", "attention.out_proj.weight", "head.weight"]
    model = mixed()
    packed = as_packed(model, names, low_bit="sym_int4")
    expected = optimize_model(copy.deepcopy(model))
    made = optimize_with("load", model, packed, Options())
    assert made is model
    assert made.table.weight is made.head.weight
    assert torch.equal(made(ids()), expected(ids()))
    made.save_low_bit(tmp_path / "made")
    expected.save_low_bit(tmp_path / "expected")
    assert {p.name: p.read_bytes() for p in (tmp_path / "made").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()
    }
    with low_memory_init():
        empty = Mixed()
    assert torch.equal(load_low_bit(empty.eval(), tmp_path / "made")(ids()), expected(ids()))
    with pytest.raises(ValueError, match="already optimized"):
        optimize_model(made)


def test_weights_on_meta_are_replaced_and_blocks_fused():
    model = tiny_llama()
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    packed = as_packed(model, names, low_bit="asym_int4", group_size=32)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, attribute, nn.Parameter(getattr(owner, attribute).to("meta")))
    made = optimize_with("load", model, packed, Options(low_bit="asym_int4", group_size=32))
    from ipex_llm import optimization_report

    assert len(optimization_report(made).fused) == 2
    assert made.lm_head.weight.low_bit == "asym_int4"  # tied, packed from its float values
    assert made(torch.arange(8)[None]).logits.isfinite().all()


def test_given_weights_that_do_not_fit_are_refused_before_anything_is_touched():
    model = mixed()
    packed = as_packed(model, ["lift.weight", "head.weight", "table.weight"], low_bit="nf4")
    for given, match in [
        ({"lift.wait": packed["lift.weight"]}, "no parameter 'lift.wait'"),
        ({"lift.weight": packed["head.weight"]}, r"\(70, 48\) in the model and \(50, 48\)"),
        ({n: packed[n] for n in ("head.weight", "table.weight")}, "one tied weight"),
    ]:
        with pytest.raises(ValueError, match=match):
            optimize_with("load", model, given, Options())
    with pytest.raises(TypeError, match="must be a LowBitTensor"):
        optimize_with("load", model, {"lift.weight": model.lift.weight}, Options())
    assert not any(isinstance(p, LowBitTensor) for p in model.parameters())
    assert not hasattr(model, "save_low_bit")
