"""The contract of optimize_model on hand-written and on small real models."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import platform
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor, optimize_model
from ipex_llm.arguments import LOW_BITS
from ipex_llm.optimize import load_low_bit, low_memory_init
from references import assert_close, dequantized, exact


class Block(nn.Module):
    def __init__(self, size=64):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.kv_proj = nn.Linear(3 * size, size, bias=False)

    def forward(self, x):
        return x + self.kv_proj(F.gelu(self.qkv_proj(self.norm(x))))


class Model(nn.Module):
    def __init__(self, tied=True, size=64, layers=2):
        super().__init__()
        self.embed = nn.Embedding(50, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.lm_head = nn.Linear(size, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def low_bits(model):
    return {name for name, p in model.named_parameters() if isinstance(p, LowBitTensor)}


# ---- results ------------------------------------------------------------


@pytest.mark.parametrize("low_bit", LOW_BITS)
def test_every_type_computes_with_its_own_rounded_weights(model, low_bit):
    assert optimize_model(model, low_bit) is model
    assert len(low_bits(model)) == 5
    with exact():
        assert_close(model(IDS), dequantized(model)(IDS), layers=5)


@pytest.mark.parametrize(
    ("low_bit", "bound"), [("sym_int8", 0.03), ("bf16", 0.03), ("sym_int4", 0.5), ("fp8_e4m3", 0.2)]
)
def test_the_optimized_model_says_about_the_same(model, low_bit, bound):
    expected = model(IDS)
    optimize_model(model, low_bit)
    difference = (model(IDS) - expected).norm() / expected.norm()
    assert difference < bound


@pytest.mark.parametrize("size", [1, 7, 31, 33, 100])
def test_no_shape_is_left_behind(size):
    model = nn.Sequential(nn.Linear(size, size + 1), nn.Linear(size + 1, 1))
    optimize_model(model)
    assert len(low_bits(model)) == 2
    x = torch.randn(3, size)
    with exact():
        assert_close(model(x), dequantized(model)(x), layers=2)


def test_group_size_is_used(model):
    optimize_model(model, group_size=32)
    assert {p.group_size for p in model.parameters() if isinstance(p, LowBitTensor)} == {32}


# ---- what stays ------------------------------------------------------------


def test_flags_dtypes_hooks_and_names_stay(model):
    model.layers[0].train()
    model.layers[1].norm.weight.requires_grad_(False)
    model.layers[1].norm.half()
    calls = []
    model.layers[0].qkv_proj.register_forward_hook(lambda m, args, out: calls.append(out.shape))
    before = {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()}
    keys = list(model.state_dict())
    flags = {n: m.training for n, m in model.named_modules()}
    optimize_model(model)
    assert {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert not model.layers[1].norm.weight.requires_grad
    assert model.layers[0].norm.weight.requires_grad
    assert not model.layers[0].qkv_proj.weight.requires_grad
    model.layers[1].norm.float()
    model(IDS)
    assert calls == [(2, 12, 192)]


def test_hooks_that_replace_the_output_work_as_whispers_cache_does(model):
    """openai-whisper keeps its key-value cache by hooks that return another output."""
    optimize_model(model)
    plain = model(IDS)
    hook = model.layers[0].kv_proj.register_forward_hook(lambda m, args, out: out * 0)
    assert not torch.equal(model(IDS), plain)
    hook.remove()
    assert torch.equal(model(IDS), plain)


def test_a_tied_weight_is_converted_once_and_looked_up_by_row(model):
    optimize_model(model, "sym_int8")
    assert isinstance(model.embed.weight, LowBitTensor)
    assert model.embed.weight is model.lm_head.weight
    table = model.embed.weight.dequantize()
    assert torch.equal(model.embed(IDS), table[IDS])


@pytest.mark.parametrize("entry", ["embed", "lm_head"])
def test_a_tie_with_an_excluded_module_stays_float(model, entry):
    optimize_model(model, modules_to_not_convert=[entry])
    assert not isinstance(model.embed.weight, LowBitTensor)
    assert model.embed.weight is model.lm_head.weight
    assert isinstance(model.layers[0].qkv_proj.weight, LowBitTensor)


def test_an_untied_embedding_stays_float_unless_its_type_is_named():
    model = Model(tied=False)
    optimize_model(model)
    assert not isinstance(model.embed.weight, LowBitTensor)
    model = Model(tied=False)
    optimize_model(model, embedding_qtype="nf4")
    assert model.embed.weight.low_bit == "nf4"
    assert model.lm_head.weight.low_bit == "sym_int4"


def test_modules_shared_by_two_parents_are_converted_once():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.ReLU())})
    optimize_model(model)
    assert model["a"][0] is model["b"][0]
    assert isinstance(shared.weight, LowBitTensor)
    assert len(low_bits(model)) == 1


def test_deepcopy_pickle_and_state_dict(model, tmp_path):
    optimize_model(model)
    expected = model(IDS)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied).__name__ == "Model"
        assert isinstance(copied, Model)
        assert torch.equal(copied(IDS), expected)
        assert copied.embed.weight is copied.lm_head.weight
        assert hasattr(copied, "save_low_bit")
        with pytest.raises(ValueError, match="already optimized"):
            optimize_model(copied)
    torch.save(model.state_dict(), tmp_path / "sd.pt")
    state = torch.load(tmp_path / "sd.pt", weights_only=True)
    other = optimize_model(Model())
    other.load_state_dict(state)
    assert torch.equal(other.eval()(IDS), expected)


def test_conversions_keep_ties_weak_references_and_live_graphs(model):
    optimize_model(model)
    reference = weakref.ref(model.embed.weight)
    x = torch.randn(2, 64, requires_grad=True)
    # Not through the norm: its saved float weight changes dtype in plain torch as well.
    graph = model.layers[0].kv_proj(model.layers[0].qkv_proj(x)).sum()
    model.bfloat16()
    assert reference() is model.embed.weight is model.lm_head.weight
    assert model.embed.weight.dtype == torch.bfloat16
    assert model(IDS).dtype == torch.bfloat16
    graph.backward()
    assert x.grad.isfinite().all()


def test_two_threads_may_call_one_model(model):
    optimize_model(model, lightweight_bmm=True)
    expected = model(IDS)
    results = [None] * 4

    def call(i):
        results[i] = model(IDS)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


# ---- keywords ------------------------------------------------------------


def test_low_bit_none_packs_nothing(model):
    expected = model(IDS)
    optimize_model(model, low_bit=None, cpu_embedding=True, lightweight_bmm=True)
    assert not low_bits(model)
    assert torch.equal(model(IDS), expected)
    optimize_model(model, low_bit="sym_int8")  # nothing was low-bit: this is no second pass
    assert len(low_bits(model)) == 5


def test_torch_dtype_casts_what_stays_float_but_no_computed_tables(model):
    model.layers[0].register_buffer("saved", torch.ones(3))
    model.layers[0].register_buffer("frequencies", torch.ones(3), persistent=False)
    model.layers[0].register_buffer("counts", torch.ones(3, dtype=torch.int64))
    optimize_model(model, torch_dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layers[0].saved.dtype == torch.bfloat16
    assert model.layers[0].frequencies.dtype == torch.float32
    assert model.layers[0].counts.dtype == torch.int64
    assert model(IDS).dtype == torch.bfloat16


def test_weights_are_rounded_once_before_they_are_cast(model):
    other = copy.deepcopy(model)
    optimize_model(model, "sym_int8", torch_dtype=torch.bfloat16)
    optimize_model(other, "sym_int8")
    a, b = model.layers[0].qkv_proj.weight, other.layers[0].qkv_proj.weight
    assert torch.equal(a.packed, b.packed)


def test_progress(model, capsys):
    optimize_model(model, progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("kv_proj", {"layers.0.kv_proj.weight", "layers.1.kv_proj.weight"}),
        ("layers.0", {"layers.0.kv_proj.weight", "layers.0.qkv_proj.weight"}),
        ("layers.*.kv_proj", {"layers.0.kv_proj.weight", "layers.1.kv_proj.weight"}),
        ("*qkv*", {"layers.0.qkv_proj.weight", "layers.1.qkv_proj.weight"}),
        ("layers.1.qkv_proj", {"layers.1.qkv_proj.weight"}),
        ("layers.?.kv_proj.weight", {"layers.0.kv_proj.weight", "layers.1.kv_proj.weight"}),
    ],
)
def test_names_match_whole_segments_or_globs(model, entry, left):
    optimize_model(model, modules_to_not_convert=[entry])
    matrices = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert matrices - low_bits(model) == left


def test_an_entry_that_matches_nothing_warns_with_near_names(model):
    with pytest.warns(UserWarning, match=r"'q_proj' matches no module.*qkv_proj"):
        optimize_model(model, modules_to_not_convert=["q_proj"])
    assert len(low_bits(model)) == 5


def test_naming_a_module_without_weights_is_no_mistake(recwarn):
    optimize_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), modules_to_not_convert=["1"])
    assert not recwarn.list


# ---- bad input ------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_raises_with_its_place_and_touches_nothing(model, value):
    with torch.no_grad():
        model.layers[1].kv_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"layers\.1\.kv_proj\.weight.*\[3, 5\]"):
        optimize_model(model)
    assert not low_bits(model)
    assert type(model) is Model
    optimize_model(model, modules_to_not_convert=["layers.1.kv_proj"])


def test_a_second_pass_raises(model):
    optimize_model(model)
    with pytest.raises(ValueError, match=r"already optimized \(sym_int4\)"):
        optimize_model(model, "nf4")
    with pytest.raises(ValueError, match="low-bit already"):
        optimize_model(model.layers[0])


def test_a_part_optimized_before_is_kept(model):
    optimize_model(model.layers[0], "nf4")
    optimize_model(model, "sym_int8")
    assert model.layers[0].kv_proj.weight.low_bit == "nf4"
    assert model.layers[1].kv_proj.weight.low_bit == "sym_int8"


def test_meta_weights_have_no_values(model):
    with pytest.raises(ValueError, match="meta device"):
        optimize_model(model.to("meta"))
    assert not low_bits(model)


def test_torchscript_modules_are_refused():
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="TorchScript"):
        optimize_model(nn.Sequential(scripted))


def test_save_pretrained_names_the_way_to_go():
    from transformers import LlamaForCausalLM

    model = optimize_model(LlamaForCausalLM(tiny_llama()))
    with pytest.raises((ValueError, RuntimeError), match="save_low_bit"):
        model.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="save_low_bit"):  # before a repository is made
        model.push_to_hub("nobody/nothing")


def test_a_model_inside_another_is_saved_on_its_own(tmp_path):
    """Its save_pretrained used to fail in the middle, about an 'invalid python storage'."""
    from transformers import LlamaForCausalLM

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm, self.extra = LlamaForCausalLM(tiny_llama()), nn.Linear(32, 32)

    wrapper = optimize_model(Wrapper(), modules_to_not_convert=["lm.model.layers.0"])
    for part in (wrapper.lm, wrapper.lm.model):
        with pytest.raises(ValueError, match="save_low_bit"):
            part.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    wrapper.lm.save_low_bit(tmp_path)
    with low_memory_init():
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    load_low_bit(loaded, tmp_path)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wrapper.lm(ids).logits)
    with pytest.raises(ValueError, match="already optimized"):
        optimize_model(wrapper.lm)
    assert not hasattr(ipex_llm.dequantize(wrapper).lm, "save_low_bit")


def test_adapters_around_a_low_bit_model_are_saved_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = optimize_model(peft.get_peft_model(LlamaForCausalLM(tiny_llama()), config))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_model_of_which_nothing_becomes_low_bit_is_worth_a_warning():
    with pytest.warns(UserWarning, match=r"no weight of this Sequential .*ipex_llm\.plan"):
        optimize_model(nn.Sequential(nn.LayerNorm(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize_model(nn.Sequential(nn.LayerNorm(8)), low_bit=None)


# ---- interruptions and memory ------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_an_interruption_leaves_a_working_model_that_may_be_finished(model, monkeypatch, after):
    expected = copy.deepcopy(model)
    optimize_model(expected)
    quantize, count = LowBitTensor.quantize.__func__, 0

    def interrupted(cls, *args, **kwargs):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return quantize(cls, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LowBitTensor, "quantize", classmethod(interrupted))
        optimize_model(model)
    assert len(low_bits(model)) == after
    assert model(IDS).isfinite().all()
    assert model.embed.weight is model.lm_head.weight
    optimize_model(model)
    assert torch.equal(model(IDS), expected(IDS))


def test_an_interruption_between_two_owners_keeps_the_tie(model, monkeypatch):
    from ipex_llm import convert

    install, count = convert.install, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return install(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "install", interrupted)
        optimize_model(model)
    assert model.embed.weight is model.lm_head.weight
    optimize_model(model)
    assert model.embed.weight is model.lm_head.weight


def test_the_peak_is_the_float_model_plus_one_layer(monkeypatch):
    """When a weight is packed, the float weights before it are gone."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    floats = [weakref.ref(layer.weight) for layer in model]
    quantize, alive = LowBitTensor.quantize.__func__, []

    def watched(cls, *args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in floats))
        return quantize(cls, *args, **kwargs)

    monkeypatch.setattr(LowBitTensor, "quantize", classmethod(watched))
    optimize_model(model)
    assert alive == [4, 3, 2, 1]
    assert not any(ref() is not None for ref in floats)


def test_inference_tensors_are_converted(model):
    with torch.inference_mode():
        inference = Model().eval()
        optimize_model(inference)
    assert isinstance(inference.lm_head.weight, LowBitTensor)
    x = torch.randn(2, 64, requires_grad=True)
    inference.layers[0].kv_proj(inference.layers[0].qkv_proj(x.clone())).sum()


# ---- other people's models ------------------------------------------------------------


def tiny_llama(**kwargs):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, **kwargs,
    )  # fmt: skip


def transformers_model(name):
    import transformers as t

    small = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "llama":
        return t.LlamaForCausalLM(tiny_llama(tie_word_embeddings=False))
    if name == "llama tied":
        return t.LlamaForCausalLM(tiny_llama(tie_word_embeddings=True))
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, **small))
    if name == "opt":
        return t.OPTForCausalLM(t.OPTConfig(
            hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, **small))  # fmt: skip
    if name == "bert":
        return t.BertForMaskedLM(t.BertConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            **small))  # fmt: skip
    if name == "t5":
        return t.T5ForConditionalGeneration(t.T5Config(
            d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
            **small))  # fmt: skip
    if name == "whisper":
        return t.WhisperForConditionalGeneration(t.WhisperConfig(
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8,
            max_source_positions=20, decoder_start_token_id=1, **small))  # fmt: skip
    raise ValueError(name)


def inputs_of(name):
    ids = torch.arange(3, 23).reshape(2, 10)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if name == "whisper":
        torch.manual_seed(1)
        return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


NAMES = ["llama", "llama tied", "gpt2", "opt", "bert", "t5", "whisper"]


@pytest.mark.parametrize("low_bit", ["sym_int4", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers(name, low_bit):
    torch.manual_seed(0)
    model = transformers_model(name).eval()
    optimize_model(model, low_bit)
    with exact():
        got, expected = model(**inputs_of(name)), dequantized(model)(**inputs_of(name))
        assert_close(got.logits, expected.logits, layers=12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate(name):
    torch.manual_seed(0)
    model = transformers_model(name).eval()
    optimize_model(model, "sym_int8")
    ids = torch.arange(3, 9).reshape(1, 6)
    reference = dequantized(model)
    with exact():
        for options in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
            got = model.generate(ids, max_new_tokens=6, **options)
            assert torch.equal(got, reference.generate(ids, max_new_tokens=6, **options))


class WhisperLinear(nn.Linear):
    """openai-whisper's Linear: casts its own weight to the dtype of the input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whispers_own_linear(dtype):
    layer = nn.Sequential(WhisperLinear(70, 30))
    optimize_model(layer, "asym_int5")
    x = torch.randn(4, 70).to(dtype)
    with exact():
        assert layer(x).dtype == dtype
        assert_close(layer(x), dequantized(layer)(x))


def test_multihead_attention_and_encoder_layers():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2)
    optimize_model(encoder.eval())
    assert all(isinstance(p, LowBitTensor) for p in encoder.parameters() if p.dim() > 1)
    x = torch.randn(2, 9, 64)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    reference = dequantized(encoder)
    with exact():
        assert_close(encoder(x), reference(x), layers=8)
        got = encoder(x, src_key_padding_mask=padding)
        expected = reference(x, src_key_padding_mask=padding)
        # torch's fast path writes zeros where a padded query would give a meaningless value
        assert_close(got[~padding], expected[~padding], layers=8)


MEMORY_OF_CONVERTING = """
import json, torch
from torch import nn
from ipex_llm import optimize_model

def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key + ":"))
    return int(line.split()[1]) / 1024

model = nn.Sequential(*[nn.Linear(1024, 2048, bias=False) for _ in range(80)])
optimize_model(nn.Linear(1024, 2048), "sym_int8")
above = torch.ones(1 << 20)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
optimize_model(model, "sym_int8")
print(json.dumps({"before": before, "peak": status("VmHWM"), "after": status("VmRSS"),
                  "packed": sum(p.packed.numel() for p in model.parameters()) / 2**20}))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="measures glibc on Linux"
)
def test_float_weights_are_returned_while_packed_ones_are_made():
    """Weights of 8 MiB from the heap, which glibc does not return by itself."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_CONVERTING],
        env=dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(32 << 20)),
        capture_output=True,
        text=True,
        check=True,
    )
    mib = json.loads(result.stdout)
    assert 160 < mib["packed"] < 190
    # A chunk of float weights and its packed form, and a slab that is begun.
    assert mib["peak"] < mib["before"] + 110
    assert mib["after"] < mib["before"] - 640 + mib["packed"] + 60


def test_the_package_exports():
    assert ipex_llm.optimize_model is optimize_model
    from ipex_llm.optimize import load_low_bit, low_memory_init

    assert ipex_llm.load_low_bit is load_low_bit
    assert ipex_llm.low_memory_init is low_memory_init
