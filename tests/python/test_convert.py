"""`lowbit convert` against optimize_model + save_low_bit, byte for byte: architectures, fp8, limits
of memory, conversions that are killed. (test_program.py has the program's other commands.)"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ipex_llm
from ipex_llm import optimize_model
from ipex_llm.program import PROGRAM
from saved_models import mixed, tiny_llama, weight_files
from test_program import assert_same_save, lowbit

pytestmark = pytest.mark.skipif(
    not PROGRAM.exists(), reason="the program is not built (LOWBIT_PROGRAM=ON)"
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
}


def config_of(model_type, **changes):
    from transformers import AutoConfig

    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def saved_float(directory, model_type, auto="AutoModelForCausalLM", dtype=torch.float32, **changes):
    """A random model of this type in `directory`; returns its class."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, auto)
    model = cls.from_config(config_of(model_type, **changes)).to(dtype)
    model.save_pretrained(directory)
    return cls


# Names tell what is linear in these; transformers merges the experts of the last five.
BY_NAMES = [
    ("llama", "AutoModelForCausalLM"),
    ("mistral", "AutoModelForCausalLM"),
    ("qwen2", "AutoModelForCausalLM"),
    ("qwen3", "AutoModelForCausalLM"),
    ("bert", "AutoModel"),
    ("bert", "AutoModelForTokenClassification"),
    ("mixtral", "AutoModelForCausalLM"),
    ("qwen2_moe", "AutoModelForCausalLM"),
    ("qwen3_moe", "AutoModelForCausalLM"),
    ("deepseek_v3", "AutoModelForCausalLM"),
    ("olmoe", "AutoModelForCausalLM"),
]
BY_PLAN = [
    ("gpt2", "AutoModelForCausalLM"),
    ("gpt2", "AutoModel"),
    ("mixtral", "AutoModelForCausalLM"),
    ("qwen2_moe", "AutoModelForCausalLM"),
    ("bert", "AutoModelForMaskedLM"),
    ("bloom", "AutoModelForCausalLM"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("vit", "AutoModelForImageClassification"),
]


def converted_like_saved(tmp_path, cls, *arguments, low_bit="sym_int4", plan=False, **kwargs):
    model = cls.from_pretrained(tmp_path / "float", **kwargs)
    if plan:
        facts = ipex_llm.plan(model, low_bit).to_dict()
        (tmp_path / "plan.json").write_text(json.dumps(facts))
        arguments += ("--plan", tmp_path / "plan.json")
    else:
        arguments += ("--low-bit", low_bit)
    optimize_model(model, low_bit).save_low_bit(tmp_path / "saved")
    lowbit("convert", tmp_path / "float", tmp_path / "out", "--quiet", *arguments)
    assert_same_save(tmp_path / "out", tmp_path / "saved")
    return model


@pytest.mark.parametrize("model_type, auto", BY_NAMES)
def test_by_names(model_type, auto, tmp_path):
    dtype = torch.bfloat16 if model_type in ("qwen2", "mixtral") else torch.float32
    cls = saved_float(tmp_path / "float", model_type, auto, dtype)
    converted_like_saved(tmp_path, cls)


@pytest.mark.parametrize("model_type, auto", BY_PLAN)
def test_by_plan(model_type, auto, tmp_path):
    cls = saved_float(tmp_path / "float", model_type, auto)
    converted_like_saved(tmp_path, cls, plan=True)


@pytest.mark.parametrize(
    "model_type, auto", [("bert", "AutoModelForMaskedLM"), ("bloom", "AutoModelForCausalLM")]
)
def test_ties_that_names_do_not_tell_are_refused(model_type, auto, tmp_path):
    saved_float(tmp_path / "float", model_type, auto)
    assert "--plan" in lowbit("convert", tmp_path / "float", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_experts_are_merged_from_their_checkpoint(tmp_path):
    """What test_by_names relies on: one tensor per expert in the file."""
    saved_float(tmp_path / "float", "mixtral")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in file.keys()
    lowbit("convert", tmp_path / "float", tmp_path / "out", "--quiet")
    facts = json.loads(lowbit("inspect", tmp_path / "out", "--json"))
    by_name = {tensor["name"]: tensor for tensor in facts["tensors"]}
    assert by_name["model.layers.0.mlp.experts.gate_up_proj"]["shape"] == [4, 192, 64]
    # An expert that lacks a part is no expert.
    state = load_file(tmp_path / "float" / "model.safetensors")
    del state["model.layers.0.block_sparse_moe.experts.3.w3.weight"]
    save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    text = lowbit("convert", tmp_path / "float", tmp_path / "refused", code=1)
    assert "incomplete" in text and not (tmp_path / "refused").exists()


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_memory_gives_the_same_bytes(dtype, tmp_path):
    """Chunks of one tile; every path that copies: casts, transposed weights, stacks, exponents."""
    cls = saved_float(tmp_path / "float", "mixtral", dtype=dtype)
    path = tmp_path / "float" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": "float16"}))
    state = load_file(tmp_path / "float" / "model.safetensors")
    state["model.layers.0.block_sparse_moe.experts.2.w2.weight"].mul_(2.0**-12)  # an exponent
    save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    model = converted_like_saved(tmp_path, cls, "--max-memory", "30KB")
    assert model.model.layers[0].mlp.experts.down_proj.exponent != 0
    text = lowbit("convert", tmp_path / "float", tmp_path / "no", "--max-memory", "9KB", code=1)
    assert "raise it" in text and not (tmp_path / "no").exists()


def test_small_memory_and_transposed_weights(tmp_path):
    cls = saved_float(tmp_path / "float", "gpt2")
    converted_like_saved(tmp_path, cls, "--max-memory", "60KB", plan=True)


@pytest.mark.parametrize(
    "isa",
    [
        "scalar",
        "avx2",
        "avxvnni",
        "avx512vnni",
        "avx512bf16",
        "amx",
        "neon",
    ],
)
def test_any_instruction_set_gives_the_same_bytes(isa, tmp_path):
    saved_float(tmp_path / "float", "mixtral", dtype=torch.bfloat16)
    lowbit("convert", tmp_path / "float", tmp_path / "out", "--quiet", "--low-bit", "nf4")
    arguments = ["--threads", "3", "convert", tmp_path / "float", tmp_path / isa]
    done = subprocess.run(
        [PROGRAM, *map(str, arguments), "--quiet", "--low-bit", "nf4"],
        capture_output=True,
        text=True,
        env={**os.environ, "LOWBIT_FORCE_ISA": isa},
    )
    if "LOWBIT_FORCE_ISA" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    assert names_and_bytes(tmp_path / isa) == names_and_bytes(tmp_path / "out")


# ---- fp8 sources ---------------------------------------------------------------------------------


def quantized_fp8(weight, block, dtype=torch.float8_e4m3fn):
    """Codes and the scales to multiply them by, one per block."""
    rows, cols = (-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], cols * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, block[0], cols, block[1])
    scale = blocks.abs().amax((1, 3)) / torch.finfo(dtype).max
    codes = (blocks / scale[:, None, :, None]).view_as(padded)
    return codes[: weight.shape[0], : weight.shape[1]].to(dtype).contiguous(), scale


def fp8_checkpoint(directory, block=(32, 16), name="weight_scale_inv", dtype=torch.bfloat16):
    """A Llama whose projections are fp8, as DeepSeek-style checkpoints have them."""
    tiny_llama().to(dtype).save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    for key in [k for k in state if k.endswith("_proj.weight")]:
        shape = state[key].shape
        size = [b or s for b, s in zip(block, shape, strict=True)]
        state[key], scale = quantized_fp8(state[key].float(), size)
        state[key.removesuffix("weight") + name] = scale
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return state


def test_block_scaled_fp8_is_what_transformers_dequantizes(tmp_path):
    from transformers import LlamaForCausalLM

    fp8_checkpoint(tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 16],
    }
    path.write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "float")  # to bfloat16, without a GPU
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    optimize_model(model).save_low_bit(tmp_path / "saved")
    lowbit("convert", tmp_path / "float", tmp_path / "out", "--quiet")
    assert_same_save(tmp_path / "out", tmp_path / "saved")
    # What stays float is dequantized as well.
    lowbit("convert", tmp_path / "float", tmp_path / "kept", "--not-convert", "down_proj")
    name = "model.layers.0.mlp.down_proj.weight"
    kept = load_file(tmp_path / "kept" / weight_files(tmp_path / "kept")[0])[name]
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(kept, fresh.get_parameter(name))


@pytest.mark.parametrize(
    "block, name",
    [((1, None), "weight_scale"), ((None, None), "weight_scale"), ((32, 24), "weight_scale_inv")],
    ids=["per row", "per tensor", "short last blocks"],
)
def test_other_grids_of_scales(block, name, tmp_path):
    """codes * scales in float32, rounded to the model's type: the definition all of them share."""
    from transformers import LlamaForCausalLM

    state = fp8_checkpoint(tmp_path / "float", block, name)
    path = tmp_path / "float" / "config.json"
    config = json.loads(path.read_text())
    reference = {}
    for key, value in state.items():
        if value.dtype == torch.float8_e4m3fn:
            scale = state[key.removesuffix("weight") + name]
            size = [b or s for b, s in zip(block, value.shape, strict=True)]
            wide = scale.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
            wide = wide[: value.shape[0], : value.shape[1]]
            reference[key] = (value.float() * wide).bfloat16()
        elif not key.endswith(name):
            reference[key] = value
    (tmp_path / "dequantized").mkdir()
    (tmp_path / "dequantized" / "config.json").write_text(json.dumps(config))
    save_file(reference, tmp_path / "dequantized" / "model.safetensors", {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dequantized")
    optimize_model(model, "nf4").save_low_bit(tmp_path / "saved")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 24]}
    path.write_text(json.dumps(config))
    lowbit("convert", tmp_path / "float", tmp_path / "out", "--quiet", "--low-bit", "nf4")
    for file in ["ipex_llm.json", *weight_files(tmp_path / "saved")]:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


IMPORTS = Path(__file__).parents[1] / "data" / "imports"


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("gptq", "gptq"),
        ("awq_gemm", "awq"),
        ("bnb_nf4", "bitsandbytes"),
        ("bnb_int8", "bitsandbytes"),
        ("compressed_tensors", "compressed-tensors"),
    ],
)
def test_codes_of_other_tools_are_not_taken_for_numbers(name, method, planned, tmp_path):
    source, options = tmp_path / "source", []
    shutil.copytree(IMPORTS / name, source)
    if planned:
        plan = {"parameters": [], "buffers": [], "options": {}}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        options = ["--plan", tmp_path / "plan.json"]
    text = lowbit("convert", source, tmp_path / "out", *options, code=1)
    assert f"the checkpoint is quantized by {method}" in text and "load_quantized" in text
    (source / "config.json").unlink()
    text = lowbit("convert", source / "model.safetensors", tmp_path / "out", *options, code=1)
    assert "the checkpoint is quantized;" in text
    assert not (tmp_path / "out").exists()


def test_fp8_without_its_scales_is_refused(tmp_path):
    state = fp8_checkpoint(tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    file = tmp_path / "float" / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"

    def refused(scale, expected):
        changed = {k: v for k, v in state.items() if k != name}
        save_file(changed | ({} if scale is None else {name: scale}), file, {"format": "pt"})
        text = lowbit("convert", tmp_path / "float", tmp_path / "out", code=1)
        assert expected in text and name in text, text
        assert not (tmp_path / "out").exists()

    refused(None, "no ")
    refused(torch.ones(5, 7), "do not divide")
    refused(torch.ones(2, 2, 2), "do not divide")
    refused(torch.ones(2, 4, dtype=torch.int32), "int32")


# ---- what comes along ----------------------------------------------------------------------------


def test_files_beside_the_weights(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    source = tmp_path / "float"
    extra = {
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": "{}",
        "merges.txt": "a b\n",
        "vocab.txt": "a\n",
        "spiece.model": "\x00\x01",
        "chat_template.jinja": "{{ x }}",
        "modeling_x.py": "x = 1\n",
        "LICENSE": "free\n",
    }
    for name, text in extra.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_bytes(b"not this")
    (source / ".hidden.json").write_text("{}")
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as older checkpoints write it
    config["rms_norm_eps"] = 1e-05
    (source / "config.json").write_text(json.dumps(config))
    lowbit("convert", source, tmp_path / "out", "--quiet")
    for name, text in extra.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not {"pytorch_model.bin", ".hidden.json"} & set(os.listdir(tmp_path / "out"))
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours.pop("quantization_config")["quant_method"] == "ipex_llm"
    config["dtype"] = config.pop("torch_dtype")
    assert ours == config


# ---- killed conversions --------------------------------------------------------------------------


def names_and_bytes(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_killed_conversion_is_taken_up(tmp_path):
    """What is there after a kill does not load; the next run goes on and ends with the bytes of one
    that was never killed. (The C++ test kills at every step.)"""
    saved_float(tmp_path / "float", "llama", vocab_size=30000, num_hidden_layers=6)
    lowbit("convert", tmp_path / "float", tmp_path / "whole", "--quiet")
    whole = names_and_bytes(tmp_path / "whole")
    killed_half_way(tmp_path / "float", tmp_path / "out")
    assert "ipex_llm.json" in lowbit("verify", tmp_path / "out", code=1)
    for name, data in names_and_bytes(tmp_path / "out").items():
        assert name.startswith(".lowbit-"), name
        if data not in whole.values():  # else complete, and about to get its name
            lowbit("inspect", tmp_path / "out" / name, code=1)
    arguments = [PROGRAM, "convert", tmp_path / "float", tmp_path / "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "are there from an interrupted conversion" in done.stderr
    assert names_and_bytes(tmp_path / "out") == whole


def killed_half_way(source, destination, *arguments):
    """A conversion that is killed once its journal has lines."""
    for _ in range(50):
        process = subprocess.Popen(
            [PROGRAM, "convert", source, destination, "--max-memory", "40KB", *arguments],
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            journals = list(destination.glob(".lowbit-*-journal.part"))
            if journals and journals[0].exists() and journals[0].stat().st_size > 500:
                process.kill()
                break
        process.wait()
        if process.returncode != 0:
            return
        for path in destination.iterdir():
            path.unlink()
    raise AssertionError("could not be killed in time")


@pytest.mark.parametrize("change", ["source", "options", "damage"])
def test_what_has_changed_is_not_taken_up(change, tmp_path):
    source = tmp_path / "float"
    saved_float(source, "llama", vocab_size=30000, num_hidden_layers=6)
    killed_half_way(source, tmp_path / "out")
    arguments = []
    if change == "source":
        state = load_file(source / "model.safetensors")
        state["model.layers.0.mlp.up_proj.weight"].mul_(2)
        save_file(state, source / "model.safetensors", {"format": "pt"})
    elif change == "options":
        arguments = ["--not-convert", "down_proj"]
    else:
        data = next(tmp_path.glob("out/.lowbit-*-00001.part"))
        with open(data, "r+b") as file:
            file.seek(40_000)
            file.write(b"\xff" * 16)
    done = subprocess.run(
        [PROGRAM, "convert", source, tmp_path / "out", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if change != "damage":
        assert "interrupted" not in done.stderr
    lowbit("convert", source, tmp_path / "whole", "--quiet", *arguments)
    assert names_and_bytes(tmp_path / "out") == names_and_bytes(tmp_path / "whole")


def test_another_save_takes_the_rest_of_a_killed_conversion_away(tmp_path):
    saved_float(tmp_path / "float", "llama", vocab_size=30000, num_hidden_layers=6)
    killed_half_way(tmp_path / "float", tmp_path / "out")
    optimize_model(mixed()).save_low_bit(tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_two_conversions_of_the_same_do_not_mix(tmp_path):
    saved_float(tmp_path / "float", "llama", vocab_size=30000, num_hidden_layers=6)
    lowbit("convert", tmp_path / "float", tmp_path / "whole", "--quiet")
    both = [
        subprocess.Popen(
            [PROGRAM, "convert", tmp_path / "float", tmp_path / "out"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    texts = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes
    for code, text in zip(codes, texts, strict=True):
        assert code == 0 or "another process" in text
    assert names_and_bytes(tmp_path / "out") == names_and_bytes(tmp_path / "whole")
