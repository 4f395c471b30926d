"""Checkpoints of other tools: their own (make_checkpoints.py), and corners."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from make_checkpoints import COMPRESSED_LAYERS, DATA, GPTQ_LAYERS
from safetensors.torch import load_file, save_file
from torch import nn

import ipex_llm
from ipex_llm import formats, load_quantized
from ipex_llm.imports import grids, words
from ipex_llm.optimize import load_low_bit, low_memory_init
from saved_models import same, snapshot, tiny_llama

IDS = torch.arange(1, 13)[None]
HALF = 2.0**-11  # the rounding of an fp16


def expected_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / name / "expected.safetensors")


def entry_of(model, name: str) -> dict:
    return next(e for e in ipex_llm.import_report(model).entries if e["name"] == f"{name}.weight")


def values(model, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.dequantize(torch.float32)


# ---- what the tools themselves make of their files -----------------------------------------------


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_models_of_gptqmodel(layout):
    model = load_quantized(DATA / layout)
    becomes = {
        "q_proj": ("sym_int4", True),
        "k_proj": ("asym_int4", False),
        "v_proj": ("sym_int8", False),  # its symmetric 8 bits do reach -128
        "o_proj": ("sym_int4", True),
        "gate_proj": ("sym_int4", True),
        "up_proj": ("sym_int4", True),
        "down_proj": ("sym_int8", False),
    }
    assert becomes.keys() == GPTQ_LAYERS.keys()
    for name, expected in expected_of("gptq").items():
        entry = entry_of(model, name)
        kind = name.rpartition(".")[2]
        assert (entry["low_bit"], entry["exact"]) == becomes[kind], name
        error = (values(model, name) - expected).abs().max() / expected.abs().max()
        assert error <= {"k_proj": HALF, "v_proj": 1 / 254, "down_proj": 1 / 250}.get(kind, 0.0)
    assert "act-order" in entry_of(model, "model.layers.0.mlp.down_proj")["note"]
    assert entry_of(model, "model.layers.0.self_attn.q_proj")["group_size"] == 32
    assert model.lm_head.weight.dtype == torch.float16
    assert not isinstance(model.lm_head.weight, ipex_llm.LowBitTensor)


@pytest.mark.parametrize("layout", ["awq_gemm", "awq_gemv"])
def test_awq_models_of_autoawq(layout):
    expected = expected_of(layout)
    for exact, low_bit, bound in ((False, "asym_int4", HALF), (True, "sym_int5", 0.0)):
        model = load_quantized(DATA / layout, exact=exact)
        for name, weight in expected.items():
            entry = entry_of(model, name)
            assert (entry["low_bit"], entry["group_size"]) == (low_bit, 32)
            error = (values(model, name) - weight).abs().max() / weight.abs().max()
            assert error <= bound
        assert bool(ipex_llm.import_report(model).rounded) is not exact


@pytest.mark.parametrize(
    ("name", "low_bit", "bound"),
    [
        ("bnb_nf4", "nf4", 0.0),
        ("bnb_nf4_double", "nf4", HALF),
        ("bnb_fp4", "fp4", 1.001 / 192),
        ("bnb_int8", "sym_int8", HALF),
    ],
)
def test_models_of_bitsandbytes(name, low_bit, bound):
    model = load_quantized(DATA / name)
    for key, expected in expected_of(name).items():
        entry = entry_of(model, key)
        assert entry["low_bit"] == low_bit
        assert entry["exact"] is (bound == 0.0)
        assert (values(model, key) - expected).abs().max() <= bound * expected.abs().max()
        if key.endswith("down_proj"):  # 96 inputs, blocks of 64 numbers
            assert entry["group_size"] == 32
    assert torch.isfinite(model(IDS).logits).all()


def test_a_model_of_compressed_tensors():
    model = load_quantized(DATA / "compressed_tensors")
    types = {
        "q_proj": "sym_int4",
        "k_proj": "asym_int4",
        "v_proj": "sym_int8",
        "o_proj": "sym_int8",
        "gate_proj": "fp8_e4m3",
        "up_proj": "fp8_e4m3",
        "down_proj": "fp4",
    }
    expected = expected_of("compressed_tensors")
    assert {name.rpartition(".")[2] for name in expected} == types.keys()
    for name, weight in expected.items():
        kind = name.rpartition(".")[2]
        assert model.get_submodule(name).weight.low_bit == types[kind]
        entry = entry_of(model, name)
        error = (values(model, name) - weight).abs().max()
        if kind == "k_proj":  # minima of -zero * scale need more than 11 bits
            assert not entry["exact"]
            assert error <= HALF * 15 * weight.abs().max()
        elif kind == "o_proj":  # the largest negative weight of a row has the code -128
            assert "leave -127 to 127" in entry["note"]
            assert error <= weight.abs().max() / 250
        else:
            assert entry["exact"], entry
            assert torch.equal(values(model, name), weight), kind
    assert COMPRESSED_LAYERS.keys() == types.keys()
    assert not hasattr(model.config, "quantization_config")
    assert model(IDS).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"o_proj.weight'.*cannot hold it exactly"):
        load_quantized(DATA / "compressed_tensors", exact=True)


def test_saved_loaded_and_fused_like_any_optimized_model(tmp_path):
    from transformers import LlamaForCausalLM

    model = load_quantized(DATA / "bnb_nf4", torch_dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_low_bit(tmp_path)
    assert "bnb_4bit" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"is a save of this library.*load_low_bit"):
        load_quantized(tmp_path)
    with low_memory_init():
        again = LlamaForCausalLM.from_pretrained(tmp_path)
    again = load_low_bit(again, tmp_path)
    with ipex_llm.set_activation_precision("fp32"), torch.no_grad():
        expected = ipex_llm.dequantize(load_quantized(DATA / "bnb_nf4", torch_dtype=torch.float32))
        logits, reference = model(IDS).logits, expected(IDS).logits
        assert ipex_llm.optimization_report(model).fused
        assert (logits - reference).abs().max() < 1e-4 * reference.abs().max()
        assert torch.equal(again(IDS).logits, logits)


def test_low_bit_converts_what_was_left_float():
    model = load_quantized(DATA / "gptq", low_bit="sym_int8")
    assert model.lm_head.weight.low_bit == "sym_int8"
    assert model.model.layers[0].self_attn.q_proj.weight.low_bit == "sym_int4"
    kept = load_quantized(DATA / "gptq", low_bit="sym_int8", modules_to_not_convert=["lm_head"])
    assert not isinstance(kept.lm_head.weight, ipex_llm.LowBitTensor)


# ---- corners, against readers written from docs/imports.md ---------------------------------------


def write(directory, tensors: dict, quantization: dict, shards: int = 1, **config) -> None:
    os.makedirs(directory, exist_ok=True)
    tensors = {name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
            index.update(dict.fromkeys(names[i::shards], file))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization})
    )


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [rows, count] -> int32 [rows, words]; bit b of code j is bit bits * j + b of a row."""
    planes = (codes[..., None] >> np.arange(bits)) & 1
    stream = planes.reshape(len(codes), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def gptq_tensors(
    rng, prefix: str, n: int, k: int, bits: int, index, version: int, symmetric=False, pack=None
):
    """A random GPTQ matrix: its tensors and the weight in float64."""
    groups, top = int(index.max()) + 1, (1 << bits) - 1
    codes = rng.integers(0, top + 1, (n, k))
    low = 1 if symmetric else 0
    zeros = (
        np.full((groups, n), (top + 1) // 2)
        if symmetric
        else rng.integers(low, top + 1, (groups, n))
    )
    scales = rng.uniform(0.001, 0.01, (groups, n)).astype(np.float16)
    stored = (zeros - 1) % (top + 1) if version == 1 else zeros
    pack = pack or bit_stream
    tensors = {
        f"{prefix}.qweight": pack(codes, bits).T.copy(),
        f"{prefix}.qzeros": pack(stored, bits),
        f"{prefix}.scales": scales,
        f"{prefix}.g_idx": index.astype(np.int32),
    }
    weight = (codes - zeros[index].T) * scales.astype(np.float64)[index].T
    return tensors, weight


def one_layer(n: int, k: int, bias: bool = False) -> nn.ModuleDict:
    with low_memory_init():
        return nn.ModuleDict({"a": nn.Linear(k, n, bias=bias)})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("k", "size", "ours"),
    [(96, 32, 32), (192, 96, 32), (320, 128, 64), (256, 256, 128), (96, 48, 0)],
)
def test_gptq_layouts(version, bits, k, size, ours, tmp_path):
    rng = np.random.default_rng(bits * k + size)
    n = 32
    index = np.arange(k) // size
    tensors, weight = gptq_tensors(rng, "a", n, k, bits, index, version)
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": size}
    quantization["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    if version == 2:
        del tensors["a.g_idx"]  # then the configuration tells
    write(tmp_path, tensors, quantization)
    model = load_quantized(tmp_path, one_layer(n, k))
    packed = model["a"].weight
    error = np.abs(packed.dequantize(torch.float64).numpy() - weight).max() / np.abs(weight).max()
    entry = entry_of(model, "a")
    if not ours:
        assert "multiple of 32" in entry["note"]
        assert error < 1 / 250
        return
    wanted = 128 if (k, size) == (320, 128) else ours
    assert packed.group_size == wanted
    if bits in (2, 3):
        assert entry["exact"]
        assert error == 0
    elif bits == 4:
        assert packed.low_bit == "asym_int4"
        assert error <= HALF
        exactly = load_quantized(tmp_path, one_layer(n, k), exact=True)["a"].weight
        assert exactly.low_bit == "sym_int5"
        assert np.array_equal(exactly.dequantize(torch.float64).numpy(), weight)
    else:
        assert packed.low_bit == "sym_int8"
        assert error <= 1 / 250


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [rows, 32 j] -> int32 [rows, bits j] in the planes of "gptq_p"."""
    blocks = codes.reshape(len(codes), -1, 32)
    parts, at = [], 0
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
        field = (blocks >> at) & ((1 << width) - 1)
        words = field.reshape(*field.shape[:2], width, 32 // width).astype(np.int64)
        parts.append((words << (width * np.arange(32 // width))).sum(-1))
        at += width
    return np.concatenate(parts, -1).reshape(len(codes), -1).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_planes(bits, symmetric, tmp_path):
    rng = np.random.default_rng(bits)
    n, k, index = 64, 192, np.arange(192) // 64
    tensors, weight = gptq_tensors(rng, "a", n, k, bits, index, 2, symmetric, planes)
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 64, "format": "gptq_p"}
    write(tmp_path, tensors, quantization)
    model = load_quantized(tmp_path, one_layer(n, k), exact=bits != 8)
    packed = model["a"].weight
    error = np.abs(packed.dequantize(torch.float64).numpy() - weight).max() / np.abs(weight).max()
    wanted = {2: "sym_int4", 3: "sym_int4", 4: "sym_int4", 5: "sym_int5"}.get(bits, "sym_int8")
    if not symmetric:
        wanted = {3: "sym_int4", 4: "sym_int5", 5: "sym_int8"}.get(bits, wanted)
    assert packed.low_bit == wanted
    # Codes of 8 bits may leave sym_int8's, with any zero and with 128.
    assert error <= (1 / 250 if bits == 8 else 0)
    if bits == 5 and not symmetric:
        packed = load_quantized(tmp_path, one_layer(n, k))["a"].weight
        assert packed.low_bit == "asym_int5"
        error = np.abs(packed.dequantize(torch.float64).numpy() - weight).max()
        assert error <= HALF * np.abs(weight).max()


@pytest.mark.parametrize(("n", "k"), [(48, 64), (64, 48)])
def test_gptq_planes_of_odd_sizes_are_refused(n, k, tmp_path):
    rng = np.random.default_rng(0)
    tensors, _ = gptq_tensors(rng, "a", n, k, 4, np.arange(k) // 16, 2)
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"})
    with pytest.raises(ValueError, match="planes hold 32 codes each"):
        load_quantized(tmp_path, one_layer(n, k))


def marlin_tensors(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes [n, k] and scales [n, groups] as Marlin's kernels take them.

    Said by where each code goes: thread t of 32 holds, of each tile of 16 inputs x 16 outputs, two
    columns of four inputs, which is what a tensor core's fragment of a 16 x 8 matrix is, twice.
    """
    n, k = codes.shape
    words = np.zeros((k // 16, n // 64, 32, 4), np.uint64)  # [tile][run][thread][tile of outputs]
    nibble = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # even ones in the lower half
    for thread in range(32):
        for part in range(4):
            for place in range(8):
                column, quarter = thread // 4 + 8 * (place // 4), place % 4
                row = 2 * (thread % 4) + quarter % 2 + 8 * (quarter // 2)
                chosen = codes[column + 16 * part :: 64, row::16].T.astype(np.uint64)
                words[:, :, thread, part] |= chosen << np.uint64(4 * nibble[place])
    run = 64 if scales.shape[1] > 1 else 32
    order = np.arange(64).reshape(8, 8).T.ravel()
    if run == 32:
        order = np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2).ravel()
    stored = scales.T.reshape(-1, run)[:, order].reshape(scales.T.shape)
    return words.reshape(k // 16, -1).astype(np.uint32).view(np.int32), stored.copy()


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_marlin(method, groups, tmp_path):
    rng = np.random.default_rng(groups)
    n, k = 128, 256
    codes = rng.integers(0, 16, (n, k))
    scales = rng.uniform(0.001, 0.01, (n, groups)).astype(np.float16)
    weight = (codes - 8) * scales.astype(np.float64).repeat(k // groups, 1)
    words, stored = marlin_tensors(codes, scales)
    size = -1 if groups == 1 else k // groups
    if method == "gptq":
        tensors = {"a.B": words, "a.s": stored, "a.workspace": np.zeros(16, np.int32)}
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": size}
        quantization["is_marlin_format"] = True
    else:
        tensors = {"a.qweight": words, "a.scales": stored}
        quantization = {"quant_method": "awq", "w_bit": 4, "q_group_size": size}
        quantization |= {"version": "marlin", "zero_point": False}
    write(tmp_path, tensors, quantization)
    packed = load_quantized(tmp_path, one_layer(n, k), exact=True)["a"].weight
    assert packed.low_bit == "sym_int4"
    assert packed.group_size == (64 if groups == 4 else 128)
    assert np.array_equal(packed.dequantize(torch.float64).numpy(), weight)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.B", lambda t: t[:, :-1], "do not belong to it"),
        ("a.B", lambda t: t[:, :-128], "do not belong to it"),
        ("a.s", lambda t: t[:, :-64], "do not belong to it"),
        ("a.s", lambda t: t[:3], "3 groups for 256 inputs, expected 4 of 64"),
        ("a.s", lambda t: t * np.float16(np.inf), "s holds "),
        ("a.s", lambda t: t.view(np.int16), "must be a matrix of floats"),
        ("a.B", lambda t: t.view(np.float32), "must be a matrix of int32"),
        ("a.s", None, "has no a.s beside it"),
    ],
)
def test_damaged_marlin_is_refused(name, value, message, tmp_path):
    rng = np.random.default_rng(0)
    words, stored = marlin_tensors(rng.integers(0, 16, (128, 256)), np.ones((128, 4), np.float16))
    tensors = {"a.B": words, "a.s": stored}
    if value is None:
        del tensors[name]
    else:
        tensors[name] = np.ascontiguousarray(value(tensors[name]))
    write(tmp_path, tensors, {"quant_method": "gptq", "group_size": 64, "format": "marlin"})
    model = one_layer(128, 256)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_quantized(tmp_path, model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_read_alike_on_either_byte_order(bits, monkeypatch):
    stored = torch.from_numpy(
        np.random.default_rng(bits).integers(-(2**31), 2**31, (5, 7), np.int32)
    )
    codes = words.unpack(stored, bits, 7 * 32 // bits - 1)
    monkeypatch.setattr(words.sys, "byteorder", "big")
    assert torch.equal(words.unpack(stored, bits, 7 * 32 // bits - 1), codes)


def test_gptq_act_order_of_whole_runs_is_exact(tmp_path):
    rng = np.random.default_rng(1)
    index = np.repeat([2, 0, 1, 0, 2, 1], 32)  # groups come back, but in runs of 32
    tensors, weight = gptq_tensors(rng, "a", 8, 192, 4, index, 1, symmetric=True)
    write(
        tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    )
    model = load_quantized(tmp_path, one_layer(8, 192), exact=True)
    assert model["a"].weight.low_bit == "sym_int4"
    assert np.array_equal(model["a"].weight.dequantize(torch.float64).numpy(), weight)


def test_gptq_act_order_and_the_type_to_requantize_to(tmp_path):
    rng = np.random.default_rng(2)
    index = rng.permutation(np.arange(128) // 32)
    tensors, weight = gptq_tensors(rng, "a", 16, 128, 4, index, 1, symmetric=True)
    write(
        tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    )
    errors = []
    for low_bit in ("sym_int8", "sym_int5"):
        model = load_quantized(tmp_path, one_layer(16, 128), requantize=low_bit)
        assert model["a"].weight.low_bit == low_bit
        difference = model["a"].weight.dequantize(torch.float64).numpy() - weight
        errors.append(np.linalg.norm(difference) / np.linalg.norm(weight))
        said = float(entry_of(model, "a")["note"].rpartition(" ")[2])
        assert said == pytest.approx(errors[-1], rel=0.1)
    assert errors[0] < 0.01 < errors[1] < 0.1
    untouched = one_layer(16, 128)
    before = snapshot(untouched)
    with pytest.raises(ValueError, match=r"exact=True.*act-order"):
        load_quantized(tmp_path, untouched, exact=True)
    assert same(before, snapshot(untouched))


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
@pytest.mark.parametrize("size", [64, 128, -1])
def test_awq_layouts(layout, size, tmp_path):
    rng = np.random.default_rng(size + 5)
    n, k = 24, 256
    groups = 1 if size == -1 else k // size
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, groups))
    scales = rng.uniform(0.001, 0.01, (n, groups)).astype(np.float16)
    wide = k // groups
    weight = (codes - zeros.repeat(wide, 1)) * scales.astype(np.float64).repeat(wide, 1)
    if layout == "gemm":
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(rows):
            return bit_stream(rows.reshape(len(rows), -1, 8)[..., order].reshape(len(rows), -1), 4)

        tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T.copy()}
    else:
        room = np.zeros((n, -groups % 8))
        tensors = {
            "qweight": bit_stream(codes, 4),
            "qzeros": bit_stream(np.hstack((zeros, room)).astype(int), 4),
            "scales": np.hstack((scales, room)).astype(np.float16),
        }
    tensors = {f"a.{name}": tensor for name, tensor in tensors.items()}
    tensors["a.bias"] = np.arange(n, dtype=np.float16)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": size, "version": layout}
    write(tmp_path, tensors, quantization)
    model = load_quantized(tmp_path, one_layer(n, k, bias=True), exact=True)
    assert np.array_equal(model["a"].weight.dequantize(torch.float64).numpy(), weight)
    assert model["a"].bias.tolist() == list(range(n))
    assert model["a"].weight.group_size == (64 if size == 64 else 128)


def fast_tensors(codes: np.ndarray) -> np.ndarray:
    """codes [n, k] -> int16 [n / 4, k] as the kernels of "gemv_fast" take them."""
    n, k = codes.shape
    stored = np.zeros((n // 4, k // 64, 256), np.int64)
    for row in range(4):
        for i in range(64):
            inside = i % 32  # of 32 inputs, pair p of run q is pair q of run p
            run, pair, odd = inside // 8, inside % 8 // 2, inside % 2
            place = 32 * (i // 32) + 8 * pair + 4 * odd + run
            stored[:, :, 64 * row + place] = codes[row::4, i::64]
    words = (stored.reshape(n // 4, k, 4) << (4 * np.arange(4))).sum(-1)
    return words.astype(np.uint16).view(np.int16)


@pytest.mark.parametrize("layout", ["gemv_fast", "llm-awq"])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_awq_gemv_fast(layout, size, tmp_path):
    rng = np.random.default_rng(size + 7)
    n, k = 24, 256
    groups = 1 if size == -1 else k // size
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, groups))
    scales = rng.uniform(0.001, 0.01, (n, groups)).astype(np.float16)
    shifts = -(scales * zeros).astype(np.float16)  # rounded: what the kernel adds
    wide = k // groups
    weight = codes * scales.astype(np.float64).repeat(wide, 1) + shifts.repeat(wide, 1)
    room = ((0, -groups % 8), (0, 0))
    tensors = {
        "a.qweight": fast_tensors(codes),
        "a.scales": np.pad(scales.T, room),
        "a.scaled_zeros": np.pad(shifts.T, room),
        "a.bias": np.arange(n, dtype=np.float16),
    }
    quantization = {"quant_method": "awq", "bits": 4, "group_size": size, "version": layout}
    write(tmp_path, tensors, quantization)
    model = load_quantized(tmp_path, one_layer(n, k, bias=True), exact=True)
    assert model["a"].weight.low_bit == "asym_int4"
    assert np.array_equal(model["a"].weight.dequantize(torch.float64).numpy(), weight)
    assert model["a"].weight.group_size == {-1: 128}.get(size, size)


def test_awq_gemv_fast_as_autoawq_shows_it():
    # The order that its packing routine gives in a comment for 32 consecutive inputs of an output.
    codes = np.tile(np.arange(32) % 16, (4, 2))
    words = fast_tensors(codes).view(np.uint16)
    nibbles = (words[0, :16, None] >> (4 * np.arange(4))) & 15
    first = [0, 1, 8, 9, 16, 17, 24, 25]
    expected = [first[i] % 16 for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert nibbles.reshape(-1)[:8].tolist() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "exllama"}, "layout is 'exllama' with 4 bits, expected one of gemm, gemv"),
        ({"version": "ipex"}, "layout is 'ipex'"),
        ({"version": 3}, "layout is 3 "),
        ({"bits": 3}, "'gemv_fast' with 3 bits"),
        ({"group_size": 16}, "do not belong to it"),
        ({"group_size": -2}, "group_size must be -1 or positive"),
    ],
)
def test_awq_that_is_refused(changes, message, tmp_path):
    tensors = {
        "a.qweight": np.zeros((6, 256), np.int16),
        "a.scales": np.ones((8, 24), np.float16),
        "a.scaled_zeros": np.zeros((8, 24), np.float16),
    }
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv_fast"}
    write(tmp_path, tensors, quantization | changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_quantized(tmp_path, one_layer(24, 256))


def compressed(bits: int, size: int | None = None, **scheme) -> dict:
    strategy = "channel" if size is None else "group"
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size, **scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def compressed_tensors(rng, n: int, k: int, bits: int, index, symmetric: bool):
    """A random matrix of "pack-quantized": its tensors and the weight in float64."""
    groups = int(index.max()) + 1
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = rng.integers(0, 1 << bits, (n, groups))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = rng.uniform(0.001, 0.01, (n, groups)).astype(np.float16)
    words = -(-k * bits // 32)
    tensors = {
        "a.weight_packed": np.ascontiguousarray(bit_stream(codes, bits)[:, :words]),
        "a.weight_scale": scales,
        "a.weight_shape": np.array([n, k]),
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = bit_stream(zeros.T, bits).T.copy()
    return tensors, (codes - zeros[:, index]) * scales.astype(np.float64)[:, index]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "size"), [(192, 64), (200, None), (320, 128), (96, 48)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_layouts(bits, k, size, symmetric, tmp_path):
    rng = np.random.default_rng(bits)
    index = np.arange(k) // (size or k)
    tensors, weight = compressed_tensors(rng, 40, k, bits, index, symmetric)
    write(tmp_path, tensors, compressed(bits, size))
    if size == 48:
        packed = load_quantized(tmp_path, one_layer(40, k))["a"].weight
        error = np.abs(packed.dequantize(torch.float64).numpy() - weight).max()
        assert error <= np.abs(weight).max() / 250
        return
    packed = load_quantized(tmp_path, one_layer(40, k), exact=bits < 8)["a"].weight
    error = np.abs(packed.dequantize(torch.float64).numpy() - weight).max()
    assert error <= (0 if bits < 8 else np.abs(weight).max() / 250)
    assert packed.group_size == (64 if size == 64 else 128)


@pytest.mark.parametrize("whole", [True, False])
def test_compressed_tensors_in_an_order_of_their_own(whole, tmp_path):
    rng = np.random.default_rng(3)
    index = np.repeat([1, 0, 1, 0], 32) if whole else rng.permutation(np.arange(128) // 64)
    tensors, weight = compressed_tensors(rng, 16, 128, 4, index, True)
    tensors["a.weight_g_idx"] = index.astype(np.int32)
    write(tmp_path, tensors, compressed(4, 64, actorder="group"))
    model = load_quantized(tmp_path, one_layer(16, 128), exact=whole)
    error = np.abs(model["a"].weight.dequantize(torch.float64).numpy() - weight).max()
    assert error <= (0 if whole else np.abs(weight).max() / 250)
    if not whole:
        assert "act-order" in entry_of(model, "a")["note"]


def test_compressed_tensors_with_scales_for_blocks(tmp_path):
    rng = np.random.default_rng(4)
    codes = torch.from_numpy(rng.normal(size=(96, 160))).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(rng.uniform(0.001, 0.01, (2, 3))).float()
    config = compressed(8, strategy="block", block_structure=[64, 64], type="float")
    write(tmp_path, {"a.weight": codes, "a.weight_scale": scales}, config)
    model = load_quantized(tmp_path, one_layer(96, 160))
    wide = scales.repeat_interleave(64, 0)[:96].repeat_interleave(64, 1)[:, :160]
    weight = codes.double() * wide
    error = (model["a"].weight.dequantize(torch.float64) - weight).abs().max()
    assert 0 < error <= weight.abs().max() / 250
    assert "blocks of 64 x 64" in entry_of(model, "a")["note"]


def drop(*names):
    def change(tensors, config):
        for name in names:
            del tensors[f"a.{name}"]

    return change


def put(name, value):
    return lambda tensors, config: tensors.update({f"a.{name}": value})


def say(**changes):
    return lambda tensors, config: config.update(changes)


def floats(value, scale):
    def change(tensors, config):
        tensors.clear()
        tensors.update({"a.weight": value, "a.weight_scale": scale})

    return change


FP8 = torch.ones(32, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (say(format="nvfp4-pack-quantized"), "its format is 'nvfp4-pack-quantized'"),
        (say(format=["pack-quantized"]), "its format is ['pack-quantized']"),
        (say(sparsity_config={"format": "sparse-24-bitmask"}), "is 'sparse-24-bitmask'"),
        (say(config_groups={}), "config_groups does not say"),
        (say(config_groups=[1]), "config_groups does not say"),
        (say(config_groups={"a": {"weights": {"num_bits": 9}}}), "(9) would fit"),
        (say(config_groups={"a": {"weights": {"num_bits": "4"}}}), "('4') would fit"),
        (say(config_groups={"a": {"weights": {"num_bits": 4}}}), "(none)"),
        (drop("weight_scale"), "has no a.weight_scale beside it"),
        (drop("weight_shape"), "has no a.weight_shape beside it"),
        (put("weight_shape", np.array([32, 65])), "would fit; 2 to 8 are read"),
        (put("weight_shape", np.array([32, -64])), "would fit; 2 to 8 are read"),
        (put("weight_shape", np.array([32])), "the two sizes of one"),
        (put("weight_packed", np.zeros((32, 8), np.float32)), "must hold int32"),
        (put("weight_packed", np.zeros((32, 9), np.int32)), "would fit; 2 to 8 are read"),
        (put("weight_packed", np.zeros((0, 8), np.int32)), "must hold int32"),
        (put("weight_scale", np.ones((31, 2), np.float16)), "does not belong to it"),
        (put("weight_scale", np.ones((1, 2), np.float16)), "does not belong to it"),
        (put("weight_scale", np.ones((32, 3), np.float16)), "3 groups for 64 inputs"),
        (put("weight_scale", np.full((32, 2), np.nan, np.float16)), "weight_scale holds nan"),
        (put("weight_scale", np.ones((32, 2), np.int16)), "must hold float16"),
        (put("weight_zero_point", np.zeros((5, 2), np.int32)), "expected [4, 2]"),
        (put("weight_g_idx", np.full(64, 2, np.int32)), "there are 2 groups"),
        (put("weight_g_idx", np.full(63, 1, np.int32)), "expected [64]"),
        (put("weight_packed", np.zeros((32, 24), np.uint8)), "must hold uint8"),
        (floats(FP8, torch.ones(32, 2)), "expected [32, 1]"),
        (floats(FP8, torch.full((32, 1), torch.inf)), "weight_scale holds inf"),
        (
            floats(torch.full((32, 64), torch.nan).to(FP8.dtype), torch.ones(1)),
            "weight [0, 0] is not finite",
        ),
        (floats(FP8[0], torch.ones(1)), "must be a matrix"),
        (floats(torch.ones(32, 64), torch.ones(1)), "must hold int8"),
    ],
)
def test_compressed_tensors_that_are_refused(damage, message, tmp_path):
    tensors, _ = compressed_tensors(np.random.default_rng(0), 32, 64, 4, np.arange(64) // 32, True)
    config = compressed(4, 32)
    damage(tensors, config)
    write(tmp_path, tensors, config)
    model = one_layer(32, 64)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^load_quantized: .*" + re.escape(message)):
        load_quantized(tmp_path, model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("scale", [255, 127])
def test_compressed_mxfp4(scale, tmp_path):
    tensors = {
        "a.weight_packed": np.full((8, 32), 0x21, np.uint8),
        "a.weight_scale": np.full((8, 2), scale, np.uint8),
    }
    write(tmp_path, tensors, compressed(4, 32, type="float") | {"format": "mxfp4-pack-quantized"})
    if scale == 255:
        with pytest.raises(ValueError, match="holds a NaN"):
            load_quantized(tmp_path, one_layer(8, 64))
        return
    packed = load_quantized(tmp_path, one_layer(8, 64), exact=True)["a"].weight
    assert packed.dequantize(torch.float64).tolist() == [[0.5, 1.0] * 32] * 8


def bnb_tensors(rng, name: str, shape, blocksize: int, table, storage=torch.uint8):
    count = int(np.prod(shape))
    codes = rng.integers(0, 16, count)
    absmax = rng.uniform(0.01, 0.1, -(-count // blocksize)).astype(np.float16).astype(np.float32)
    pairs = np.pad(codes, (0, count % 2)).reshape(-1, 2)
    data = torch.from_numpy((pairs[:, 0] * 16 + pairs[:, 1]).astype(np.uint8))
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float16", "shape": list(shape)}
    tensors = {
        name: data.view(storage)[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode())
        ).byte(),
    }
    wide = absmax.repeat(blocksize)[:count]
    weight = (np.asarray(table, np.float32)[codes] * wide).reshape(shape)  # as it does: in float32
    return tensors, weight


NF4 = torch.tensor(formats.FORMATS["nf4"].codebook)


@pytest.mark.parametrize(
    ("shape", "blocksize", "group"),
    [((24, 64), 512, 64), ((8, 96), 64, 32), ((16, 192), 128, 64), ((1, 512), 4096, 128)],
)
def test_bitsandbytes_blocks_and_rows(shape, blocksize, group, tmp_path):
    rng = np.random.default_rng(blocksize)
    for storage in (torch.uint8, torch.bfloat16):
        tensors, weight = bnb_tensors(rng, "a.weight", shape, blocksize, NF4, storage)
        write(tmp_path, tensors, {"quant_method": "bitsandbytes"})
        model = load_quantized(tmp_path, one_layer(*shape), exact=True)
        assert model["a"].weight.group_size == group
        assert np.array_equal(model["a"].weight.dequantize(torch.float32).numpy(), weight)


def test_bitsandbytes_that_no_grid_holds(tmp_path):
    rng = np.random.default_rng(3)
    table = torch.linspace(-1, 1, 16)
    for shape, codebook, why in (((8, 128), table, "codebook"), ((7, 37), NF4, "not runs of 32")):
        tensors, weight = bnb_tensors(rng, "a.weight", shape, 64, codebook)
        write(tmp_path, tensors, {"quant_method": "bitsandbytes"})
        model = load_quantized(tmp_path, one_layer(*shape))
        assert why in entry_of(model, "a")["note"]
        error = np.abs(model["a"].weight.dequantize(torch.float32).numpy() - weight).max()
        assert error < np.abs(weight).max() / 250


# ---- scales --------------------------------------------------------------------------------------


def test_scales_take_the_exponent_that_keeps_them():
    mantissas = torch.tensor([1.0, 1.5, 2047 / 1024, 1 / 1024])
    for power in (-120, -40, -14, 0, 14, 100):
        scales = mantissas.double() * 2.0**power
        (half,), exponent, exact = grids.to_half(scales)
        assert exact
        assert torch.equal(half.double() * 2.0**exponent, scales)
        assert exponent == 0 if -14 <= power <= 0 else True
    (half,), exponent, exact = grids.to_half(torch.tensor([0.0, 65504.0]))
    assert (exponent, exact) == (0, True)
    for wanted in (
        torch.tensor([1 / 3, 3e-5]),
        torch.tensor([1e-9, 3e-10]),
        torch.tensor([7e4, 1 / 3]),
    ):
        (half,), exponent, exact = grids.to_half(wanted)
        assert not exact
        error = (half.double() * 2.0**exponent - wanted.double()).abs()
        assert (error <= wanted.double() * HALF + 2.0 ** (exponent - 25)).all()


# ---- models --------------------------------------------------------------------------------------


def quantized_llama(directory, shards: int = 1, extra=None, **changes):
    """A llama whose linear layers are GPTQ: the float model with those weights."""
    model = tiny_llama(**changes)
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    quantize_into(directory, model, state, shards, extra)
    return model


def quantize_into(directory, model, state: dict, shards: int = 1, extra=None, only: str = "proj"):
    """Writes `state` with its projections as GPTQ matrices, whose numbers it gets."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in state.items():
        if tensor.dim() != 2 or only not in name:
            tensors[name] = tensor
            continue
        index = np.arange(tensor.shape[1]) // 32
        prefix = name.removesuffix(".weight")
        packed, weight = gptq_tensors(rng, prefix, *tensor.shape, 4, index, 1, symmetric=True)
        tensors |= packed
        tensor.copy_(torch.from_numpy(weight))
    config = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": "float32",
    }
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write(directory, tensors | (extra or {}), quantization, shards, **config)


@pytest.mark.parametrize("only", ["proj", "self_attn"])
def test_experts_become_one_tensor(only, tmp_path):
    """Checkpoints hold a matrix per expert, transformers 5 one tensor for all of them."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=12,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=72,
    )
    reference = Qwen2MoeForCausalLM(config).eval()
    state = {}  # as the checkpoints of this architecture have it
    for name, tensor in reference.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            state[name] = tensor
            continue
        prefix = name.rpartition(".")[0]
        for expert in range(12):
            if name.endswith("down_proj"):
                state[f"{prefix}.{expert}.down_proj.weight"] = tensor[expert]
            else:
                state[f"{prefix}.{expert}.gate_proj.weight"] = tensor[expert, :32]
                state[f"{prefix}.{expert}.up_proj.weight"] = tensor[expert, 32:]
    quantize_into(tmp_path, reference, state, only=only)
    model = load_quantized(tmp_path, exact=True)
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        if only == "proj":
            assert (weight.low_bit, weight.group_size) == ("sym_int4", 32)
            weight = weight.dequantize(torch.float32)
        assert torch.equal(weight, getattr(reference.model.layers[0].mlp.experts, name))
    with ipex_llm.set_activation_precision("fp32"):  # and gradients on: nothing is fused
        logits, expected = model(IDS).logits, reference(IDS).logits
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_experts_that_are_not_complete_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=72,
    )
    rng, prefix = np.random.default_rng(0), "model.layers.0.block_sparse_moe.experts"
    tensors = {}
    for name, n, k in (("0.w1", 32, 64), ("0.w3", 32, 64), ("1.w1", 32, 64)):
        tensors |= gptq_tensors(rng, f"{prefix}.{name}", n, k, 4, np.arange(k) // 32, 1)[0]
    write(
        tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32}, **config.to_dict()
    )
    with low_memory_init():
        model = MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="of which some are missing"):
        load_quantized(tmp_path, model)


def test_tied_embeddings_shards_and_what_old_tools_left_behind(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.mlp.up_proj.bias": torch.zeros(96),
    }
    reference = quantized_llama(tmp_path, shards=3, extra=extra)
    model = load_quantized(tmp_path, exact=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with ipex_llm.set_activation_precision("fp32"):  # and gradients on: nothing is fused
        logits, expected = model(IDS).logits, reference(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_bias_that_the_model_lacks_is_not_dropped(tmp_path):
    quantized_llama(tmp_path, extra={"model.layers.1.mlp.up_proj.bias": torch.ones(96)})
    with pytest.raises(ValueError, match=r"up_proj.bias: \[96\] of the save is not in the model"):
        load_quantized(tmp_path)


def test_conv1d_keeps_its_orientation(tmp_path):
    from transformers.pytorch_utils import Conv1D

    rng = np.random.default_rng(4)
    tensors, weight = gptq_tensors(rng, "h.c_fc", 64, 64, 4, np.arange(64) // 32, 1, symmetric=True)
    tensors["h.c_fc.bias"] = np.zeros(64, np.float32)
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with low_memory_init():
        model = nn.ModuleDict({"h": nn.ModuleDict({"c_fc": Conv1D(64, 64)})})
    packed = load_quantized(tmp_path, model)["h"]["c_fc"].weight
    assert packed.transposed
    assert np.array_equal(packed.dequantize(torch.float64).numpy(), weight.T)


def test_the_old_configuration_files(tmp_path):
    rng = np.random.default_rng(5)
    tensors, weight = gptq_tensors(rng, "a", 8, 64, 4, np.arange(64) // 64, 1, symmetric=True)
    write(tmp_path, tensors, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-64g.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    packed = load_quantized(tmp_path, one_layer(8, 64), exact=True, mmap=False)["a"].weight
    assert np.array_equal(packed.dequantize(torch.float64).numpy(), weight)


# ---- refusals ------------------------------------------------------------------------------------


def change(name, value=None, drop=()):
    def damage(d):
        tensors = load_file(d / "model.safetensors")
        for key in drop:
            del tensors[key]
        if name is not None:
            tensors[name] = value(tensors[name])
        save_file({k: v.contiguous() for k, v in tensors.items()}, d / "model.safetensors")

    return damage


def configure(**changes):
    def damage(d):
        config = json.loads((d / "config.json").read_text())
        config["quantization_config"].update(changes)
        (d / "config.json").write_text(json.dumps(config))

    return damage


def replace(name, text):
    return lambda d: (d / name).write_text(text)


def truncated(d):
    data = (d / "model.safetensors").read_bytes()
    (d / "model.safetensors").write_bytes(data[: len(data) // 2])


def fifo(d):
    (d / "model.safetensors").unlink()
    os.mkfifo(d / "model.safetensors")


def pickled(d):
    (d / "model.safetensors").rename(d / "pytorch_model.bin")
    (d / "expected.safetensors").unlink()


def infinite(t):
    t.view(-1)[3] = float("inf")
    return t


def with_index(weight_map):
    return replace("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


A = "model.layers.0.mlp.down_proj"
GPTQ_REFUSED = {
    "index_leads_out": (with_index({"a": "../model.safetensors"}), "in the same directory"),
    "index_names_a_pickle": (with_index({"a": "model.bin"}), "in the same directory"),
    "index_disagrees": (with_index({"a": "model.safetensors"}), "which does not hold it"),
    "index_not_json": (replace("model.safetensors.index.json", "["), "is not JSON"),
    "config_not_json": (replace("config.json", "\xff"), "is not JSON"),
    "config_deep": (replace("config.json", "[" * 200_000), "is not JSON"),
    "config_key_twice": (replace("config.json", '{"a": 1, "a": 2}'), "the key 'a' twice"),
    "not_quantized": (replace("config.json", "{}"), "has no quantization_config"),
    "another_method": (configure(quant_method="aqlm"), "quantized by 'aqlm'"),
    "fp8": (configure(quant_method="fp8"), "`lowbit convert` takes fp8 checkpoints"),
    "another_layout": (configure(checkpoint_format="bitblas"), "layout is 'bitblas'"),
    "not_marlin": (configure(checkpoint_format="marlin"), "no weight is quantized"),
    "truncated": (truncated, "model.safetensors"),
    "fifo": (fifo, "regular file"),
    "pickle": (pickled, "a pickle, which is not read"),
    "no_scales": (change(None, drop=[f"{A}.scales"]), f"has no {A}.scales beside it"),
    "float_codes": (change(f"{A}.qweight", lambda t: t.float()), "must be a matrix of int32"),
    "group_out_of_range": (change(f"{A}.g_idx", lambda t: t + 1), "but there are 2 groups"),
    "negative_group": (change(f"{A}.g_idx", lambda t: t - 1), "g_idx holds -1 to 0"),
    "fewer_scales": (change(f"{A}.scales", lambda t: t[:, :-8]), "do not belong to it"),
    "fewer_codes": (change(f"{A}.qweight", lambda t: t[:-1]), "of bits per code"),
    "infinite_scale": (change(f"{A}.scales", infinite), "scales holds inf at 3"),
    "another_model": (change(None, drop=["model.norm.weight"]), "is not in the save"),
}
BNB_REFUSED = {
    "no_absmax": (change(None, drop=[f"{A}.weight.absmax"]), f"has no {A}.weight.absmax"),
    "no_state": (
        change(None, drop=[f"{A}.weight.quant_state.bitsandbytes__nf4"]),
        "has no .quant_state.bitsandbytes__nf4",
    ),
    "state_not_json": (
        change(f"{A}.weight.quant_state.bitsandbytes__nf4", lambda t: t[:-2]),
        "is not JSON",
    ),
    "fewer_codes": (change(f"{A}.weight", lambda t: t[:-8]), "bytes of codes for shape [64, 96]"),
    "fewer_blocks": (change(f"{A}.weight.absmax", lambda t: t[:-1]), "one for each 64"),
    "short_map": (change(f"{A}.weight.quant_map", lambda t: t[:-1]), "must be 16 floats"),
    "fewer_outer_blocks": (change(f"{A}.weight.nested_absmax", lambda t: t[:0]), "and [1]"),
    "nan": (change(f"{A}.weight.nested_absmax", lambda t: t * float("nan")), "absmax holds nan"),
}


@pytest.mark.parametrize("name", GPTQ_REFUSED.keys() | BNB_REFUSED.keys())
def test_what_is_refused(name, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for source, table in (("gptq", GPTQ_REFUSED), ("bnb_nf4_double", BNB_REFUSED)):
        if name not in table:
            continue
        damage, message = table[name]
        directory = tmp_path / source
        shutil.copytree(DATA / source, directory)
        with low_memory_init():
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory))
        damage(directory)
        before = snapshot(model)
        with pytest.raises((ValueError, OSError), match=r"^load_quantized: ") as caught:
            load_quantized(directory, model)
        assert message in str(caught.value)
        assert same(before, snapshot(model))


def test_remote_code_is_not_run(tmp_path):
    config = {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "code.Mine"}}
    tensors, _ = gptq_tensors(np.random.default_rng(0), "a", 8, 64, 4, np.arange(64) // 32, 1)
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32}, **config)
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="read it, then pass trust_remote_code=True"):
        load_quantized(tmp_path)


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="unknown requantize 'int9'"):
        load_quantized(DATA / "gptq", requantize="int9")
    with pytest.raises(ValueError, match="unknown kv_cache_dtype 'int3'"):
        load_quantized(DATA / "gptq", kv_cache_dtype="int3")
    with pytest.raises(TypeError, match="exact must be True or False"):
        load_quantized(DATA / "gptq", exact=1)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        load_quantized(tmp_path / "none")
    with pytest.raises(ValueError, match=r"ipex_llm\.load_quantized\("):
        load_low_bit(tiny_llama(), DATA / "gptq")
