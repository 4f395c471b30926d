"""The lowbit program: what it writes is what optimize_model and save_low_bit write."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import ipex_llm
from ipex_llm import optimize_model
from ipex_llm.optimize import load_low_bit, low_memory_init
from ipex_llm.program import PROGRAM
from saved_models import ids, mixed, tiny_llama, weight_files

pytestmark = pytest.mark.skipif(
    not PROGRAM.exists(), reason="the program is not built (LOWBIT_PROGRAM=ON)"
)


def lowbit(*arguments, code=0):
    done = subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def assert_same_save(converted, saved):
    names = ["ipex_llm.json", *weight_files(saved)]
    assert set(names) <= set(os.listdir(converted))
    assert weight_files(converted) == weight_files(saved)
    for name in names:
        assert (converted / name).read_bytes() == (saved / name).read_bytes(), name
    for name in ("config.json", "generation_config.json"):
        assert (converted / name).exists() == (saved / name).exists(), name
        if not (saved / name).exists():
            continue
        ours, theirs = ((d / name).read_text() for d in (converted, saved))
        assert json.loads(ours) == json.loads(theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("low_bit", ["sym_int4", "nf3", "fp8_e4m3", "bf16"])
def test_a_conversion_is_the_save_of_the_optimized_model(low_bit, tied, tmp_path):
    from transformers import LlamaForCausalLM

    tiny_llama(tie_word_embeddings=tied).bfloat16().save_pretrained(tmp_path / "float")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "float")
    optimize_model(model, low_bit, modules_to_not_convert=["layers.1.mlp"]).save_low_bit(
        tmp_path / "saved", max_shard_size=30_000
    )
    for threads in (1, 3):
        lowbit(
            *("--threads", threads, "convert", tmp_path / "float", tmp_path / f"by{threads}"),
            *("--low-bit", low_bit, "--not-convert", "layers.1.mlp", "--max-shard-size", 30_000),
            "--quiet",
        )
        assert_same_save(tmp_path / f"by{threads}", tmp_path / "saved")
    with low_memory_init():
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "by1")
    loaded = load_low_bit(loaded, tmp_path / "by1")
    assert torch.equal(loaded(ids() + 1).logits, model(ids() + 1).logits)


def test_shards_casts_and_group_sizes(tmp_path):
    from transformers import LlamaForCausalLM

    tiny_llama().save_pretrained(tmp_path / "float", max_shard_size="60KB")
    assert (tmp_path / "float" / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    config["dtype"] = "float16"  # the model is loaded in another type than it is stored in
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "float")
    assert model.dtype == torch.float16
    optimize_model(model, "asym_int5", group_size=32).save_low_bit(tmp_path / "saved")
    lowbit(
        *("convert", tmp_path / "float", tmp_path / "out", "--quiet"),
        *("--low-bit", "asym_int5", "--group-size", 32),
    )
    assert_same_save(tmp_path / "out", tmp_path / "saved")


def test_weights_that_need_an_exponent(tmp_path):
    from transformers import LlamaForCausalLM

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0**-60)
    model.save_pretrained(tmp_path / "float")
    model = optimize_model(LlamaForCausalLM.from_pretrained(tmp_path / "float"))
    assert model.model.layers[0].mlp.up_proj.weight.exponent != 0
    model.save_low_bit(tmp_path / "saved")
    lowbit("convert", tmp_path / "float", tmp_path / "out", "--quiet")
    assert_same_save(tmp_path / "out", tmp_path / "saved")


def test_with_a_plan_any_model_converts(tmp_path):
    """GPT-2's transposed weights, convolutions, attention: nothing that names tell."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=90, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path / "float")
    source = tmp_path / "float"
    # Under the names that the model has: its checkpoints leave `transformer.` out or not.
    state = {k: v.clone() for k, v in gpt2.state_dict().items() if k != "lm_head.weight"}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    text = lowbit("convert", source, tmp_path / "refused", code=1)
    assert "c_attn.weight" in text and "--plan" in text
    assert not (tmp_path / "refused").exists()
    (tmp_path / "plan.json").write_text(json.dumps(ipex_llm.plan(gpt2).to_dict()))
    optimize_model(gpt2).save_low_bit(tmp_path / "saved")
    lowbit("convert", source, tmp_path / "out", "--plan", tmp_path / "plan.json", "--quiet")
    assert_same_save(tmp_path / "out", tmp_path / "saved")

    plain = mixed()
    state = {k: v.clone() for k, v in plain.state_dict().items() if k != "head.weight"}
    (tmp_path / "plain").mkdir()
    save_file(state, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(ipex_llm.plan(plain).to_dict()))
    optimize_model(plain).save_low_bit(tmp_path / "saved2")
    lowbit("convert", tmp_path / "plain", tmp_path / "out2", "--plan", tmp_path / "plan.json")
    for name in ["ipex_llm.json", *weight_files(tmp_path / "saved2")]:
        ours, theirs = ((tmp_path / d / name).read_bytes() for d in ("out2", "saved2"))
        assert ours == theirs, name


def test_refusals_leave_nothing_behind(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    good = load_file(tmp_path / "float" / "model.safetensors")

    def refused(change, expected, *arguments):
        state = {name: tensor.clone() for name, tensor in good.items()}
        change(state)
        save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
        text = lowbit("convert", tmp_path / "float", tmp_path / "out", *arguments, code=1)
        assert expected in text, text
        assert not (tmp_path / "out").exists()

    name = "model.layers.1.mlp.up_proj.weight"
    refused(lambda s: s[name][3, 5].fill_(float("nan")), "row 3, column 5")
    refused(lambda s: s.update(surprise=torch.ones(4, 4)), "surprise")
    refused(lambda s: None, "low_bit", "--low-bit", "int3")
    refused(lambda s: None, "48", "--group-size", "48")
    refused(lambda s: None, "raise it", "--max-memory", "1KB")
    (tmp_path / "float" / "model.safetensors").write_bytes(b"x" * 100)
    assert "model.safetensors" in lowbit("convert", tmp_path / "float", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()
    optimize_model(mixed()).save_low_bit(tmp_path / "save")
    assert "already" in lowbit("convert", tmp_path / "save", tmp_path / "out", code=1)


def test_inspect_verify_and_exit_codes(tmp_path):
    optimize_model(mixed(), "nf4").save_low_bit(tmp_path)
    table = lowbit("inspect", tmp_path)
    assert "lift.weight" in table and "nf4" in table and "head.weight" in table
    facts = json.loads(lowbit("inspect", tmp_path, "--json"))
    by_name = {tensor["name"]: tensor for tensor in facts["tensors"]}
    assert by_name["lift.weight"]["shape"] == [70, 48]
    assert facts["ties"] == {"head.weight": "table.weight"}
    assert facts["options"]["low_bit"] == "nf4"
    assert "every digest" in lowbit("verify", tmp_path)
    victim = tmp_path / weight_files(tmp_path)[0]
    assert "lift.weight" in lowbit("inspect", victim)
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    assert "damaged" in lowbit("verify", tmp_path, code=1)
    assert "nowhere" in lowbit("verify", tmp_path / "nowhere", code=1)
    lowbit("verify", code=2)
    lowbit("no-such-command", code=2)
    assert "Exit codes" in lowbit("--help")
    assert "linear GB/s" in lowbit("bench", "--low-bit", "nf4", "-n", 64, "-k", 64)
