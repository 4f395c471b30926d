"""Fused decoder blocks: the same results as the original, or the original itself."""

import copy
import pathlib
import pickle
import re

import pytest
import torch
from torch import nn

import ipex_llm
from ipex_llm import fuse
from ipex_llm.fuse import forward
from ipex_llm.fuse.state import STATE, local

transformers = pytest.importorskip("transformers")

VOCABULARY = 300


@pytest.fixture(autouse=True)
def exact_activations():
    """`auto` rounds activations to int8 from a few tokens on: an ulp before it becomes 1/127."""
    with ipex_llm.set_activation_precision("fp32"):
        yield


def build(kind="llama", dtype=torch.float32, layers=2, **more):
    """A tiny random model whose norms and biases are random too: ones and zeros would hide bugs."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        **more,
    }
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    return model.to(dtype)


def pair(*args, low_bit="sym_int4", **kwargs):
    """The same low-bit model unfused and fused."""
    plain = ipex_llm.optimize_model(build(*args, **kwargs), low_bit, optimize_llm=False)
    fused = ipex_llm.optimize_model(build(*args, **kwargs), low_bit)
    return plain, fused


def fused_modules(model):
    return [m for m in model.modules() if STATE in m.__dict__]


def close(a, b, tolerance=2e-3):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def ids(batch=2, tokens=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY - 1, (batch, tokens), generator=generator)


class Calls:
    """Counts calls that the operators serve and calls that go to the original."""

    def __init__(self, monkeypatch):
        self.served = self.refused = 0
        run = forward.run

        def counted(*args):
            out = run(*args)
            if out is None:
                self.refused += 1
            else:
                self.served += 1
            return out

        monkeypatch.setattr(forward, "run", counted)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3"])
def test_blocks_of_common_models_are_fused_whole(kind, monkeypatch):
    plain, fused = pair(kind)
    report = ipex_llm.optimization_report(fused)
    assert [entry["fused"] for entry in report.fused] == ["attention and MLP"] * 2, str(report)
    calls = Calls(monkeypatch)
    mask = torch.ones((2, 11), dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        want = plain(ids(), attention_mask=mask).logits[mask.bool()]
        have = fused(ids(), attention_mask=mask).logits[mask.bool()]
    assert close(have, want)
    assert (calls.served, calls.refused) == (2, 0)


@pytest.mark.parametrize("low_bit", ["asym_int4", "nf3", "sym_int8", "fp8", "bf16"])
def test_every_kind_of_weight(low_bit):
    plain, fused = pair(low_bit=low_bit)
    assert len(fused_modules(fused)) == 2
    with torch.no_grad():
        assert close(fused(ids()).logits, plain(ids()).logits)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_gives_the_same_tokens(how):
    plain, fused = pair()
    batch = 1 if "prompt_lookup_num_tokens" in how else 2
    prompt = ids(batch)
    mask = torch.ones_like(prompt)
    if batch > 1:
        mask[1, :4] = 0
    more = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **how}
    assert torch.equal(plain.generate(prompt, **more), fused.generate(prompt, **more))


def test_a_chat_goes_on_with_the_cache_of_before():
    plain, fused = pair()
    results = []
    for model in (plain, fused):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids(1, 9), past_key_values=cache)
            copied = copy.deepcopy(cache)
            cache.crop(-2)
            first = model(ids(1, 4, seed=1), past_key_values=cache).logits
            second = model(ids(1, 300, seed=2), past_key_values=copied).logits  # buffers grow
            third = model(ids(1, 1, seed=3), past_key_values=copied).logits
            revived = pickle.loads(pickle.dumps(cache))
            fourth = model(ids(1, 1, seed=4), past_key_values=revived).logits
        assert (cache.get_seq_length(), copied.get_seq_length()) == (11, 310)
        results.append((first, second, third, fourth))
    for want, have in zip(*results, strict=True):
        assert close(have, want)


def test_sliding_windows_longer_than_the_window():
    plain, fused = pair("mistral", sliding_window=8)
    assert len(fused_modules(fused)) == 2
    more = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(plain.generate(ids(), **more), fused.generate(ids(), **more))


def test_long_prompts_cross_chunks_and_long_caches_split():
    plain, fused = pair(layers=1)
    with torch.no_grad():
        for model in (plain, fused):
            model.cache = transformers.DynamicCache(config=model.config)
        prompt = ids(1, 1100)
        want = plain(prompt, past_key_values=plain.cache).logits
        have = fused(prompt, past_key_values=fused.cache).logits
        assert close(have, want)
        want = plain(prompt[:, :1], past_key_values=plain.cache).logits
        have = fused(prompt[:, :1], past_key_values=fused.cache).logits
        assert close(have, want)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma2", {"sliding_window": 16, "head_dim": 16}),  # softcap
        ("gpt_oss", {"sliding_window": 16, "head_dim": 16, "num_local_experts": 4}),  # sinks
        ("bloom", {}),  # ALiBi
        ("falcon", {"alibi": False, "new_decoder_architecture": True}),
    ],
    ids=str,
)
def test_long_prompts_in_a_batch_with_padding(kind, more):
    plain, fused = pair(kind, **more)
    assert any("attention" in e["fused"] for e in ipex_llm.optimization_report(fused).fused)
    prompt = ids(2, 70)
    mask = torch.ones_like(prompt)
    mask[1, :30] = 0
    with torch.no_grad():
        want, have = (m(prompt, attention_mask=mask).logits[mask.bool()] for m in (plain, fused))
    assert close(have, want)
    generate = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(prompt, **generate), fused.generate(prompt, **generate))


LATENT = {
    "q_lora_rank": 40,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["minicpm3", "youtu"])
def test_latent_attention_gives_the_same_tokens(kind, how, monkeypatch):
    plain, fused = pair(kind, **LATENT)
    assert [e["fused"] for e in ipex_llm.optimization_report(fused).fused] == [
        "attention and MLP"
    ] * 2
    calls = Calls(monkeypatch)
    prompt = ids(1 if "prompt_lookup_num_tokens" in how else 2, 30)
    mask = torch.ones_like(prompt)
    if len(prompt) > 1:
        mask[1, :4] = 0
    more = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **how}
    assert torch.equal(plain.generate(prompt, **more), fused.generate(prompt, **more))
    assert calls.served >= 2 and calls.refused == 0


@pytest.mark.parametrize("rank", [40, None])
def test_latents_are_kept_in_the_cache_of_a_chat(rank):
    """What the fused form wrote, the original goes on with, and the other way round."""
    plain, fused = pair("deepseek_v3", **{**LATENT, "q_lora_rank": rank}, first_k_dense_replace=2)
    assert len(fused_modules(fused)) == 2
    results = []
    for models in ((plain, plain, plain, plain), (fused, plain, fused, fused)):
        cache = transformers.DynamicCache(config=plain.config)
        with torch.no_grad():
            first = models[0](ids(2, 90), past_key_values=cache).logits
            assert cache.layers[0].keys.shape == (2, 1, 90, 48)
            assert cache.layers[0].values.shape == (2, 1, 90, 16)
            cache.crop(-7)
            second = models[1](ids(2, 4, 1), past_key_values=cache).logits
            third = models[2](ids(2, 1, 2), past_key_values=cache).logits
            copied = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
            fourth = models[3](ids(2, 300, 3), past_key_values=copied).logits
        results.append((first, second, third, fourth))
    for want, have in zip(*results, strict=True):
        assert close(have, want)


def test_latents_are_not_quantized():
    plain = ipex_llm.optimize_model(build("minicpm3", **LATENT), optimize_llm=False)
    with pytest.warns(UserWarning, match="no effect"):
        fused = ipex_llm.optimize_model(build("minicpm3", **LATENT), kv_cache_dtype="int8")
    more = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(ids(), **more), fused.generate(ids(), **more))


class Indexed(nn.Module):
    """Attends to the best 64 positions only, which a short probe cannot see."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.index = nn.Linear(64, 1)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            p(x).view(batch, tokens, 4, 16).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        score = self.index(x)[..., 0]
        kept = torch.zeros((batch, 1, 1, tokens), dtype=torch.bool)
        kept[:, 0, 0] = score >= score.topk(min(64, tokens)).values[:, -1:]
        mask = None if tokens <= 64 else kept
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.o(out.transpose(1, 2).reshape(batch, tokens, 64))


def test_an_attention_with_an_index_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Indexed()])

        def forward(self, x):
            return self.blocks[0](x)

    torch.manual_seed(0)
    model = ipex_llm.optimize_model(Model().eval())
    with torch.no_grad():
        model(torch.randn(1, 5, 64))
        assert [e["fused"] for e in ipex_llm.optimization_report(model).entries] == [""]


def test_bfloat16_is_no_worse_than_the_original():
    _, fused = pair(dtype=torch.bfloat16)
    ratios = [entry["error_ratio"] for entry in ipex_llm.optimization_report(fused).fused]
    # One of a kind is compared in its own type.
    assert ratios[0] <= 1.5 and ratios[1:] == [None]


def test_decoding_runs_all_blocks_as_one_operator():
    plain, fused = pair(layers=3)
    before = local.stacks
    more = {"max_new_tokens": 8, "do_sample": False}
    want, have = plain.generate(ids(), **more), fused.generate(ids(), **more)
    assert torch.equal(want, have)
    assert local.stacks - before == 7  # every token but the first, which ends the prompt


def test_blocks_run_one_by_one_where_somebody_looks_between_them():
    plain, fused = pair(layers=3)
    seen = []
    fused.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    before = local.stacks
    for model in (plain, fused):
        model.cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids(1), past_key_values=model.cache)
    with torch.no_grad():
        want = plain(ids(1, 1), past_key_values=plain.cache, output_hidden_states=True)
        have = fused(ids(1, 1), past_key_values=fused.cache, output_hidden_states=True)
    assert len(seen) == 2
    assert local.stacks == before
    for a, b in zip(have.hidden_states, want.hidden_states, strict=True):
        assert close(a, b)


@pytest.mark.parametrize(
    "kind, columns", [("llama", slice(8, None)), ("cohere", slice(1, None, 2))]
)
def test_tables_that_turn_the_values_of_a_pair_by_different_angles(kind, columns, monkeypatch):
    """As rotary positions of several axes do, where they are cut by columns (HunYuanVL, images)."""
    plain, fused = pair(kind, layers=3)
    for model in (plain, fused):
        rotary = model.model.rotary_emb
        model.other = False

        def turned(*args, original=rotary.forward, model=model, **kwargs):
            cos, sin = original(*args, **kwargs)
            if model.other:
                cos, sin = cos.clone(), sin.clone()
                cos[:, -1:, columns], sin[:, -1:, columns] = 0.5, 0.3
            return cos, sin

        rotary.forward = turned
    results = []
    for other in (False, True):
        calls = Calls(monkeypatch)
        for model in (plain, fused):
            model.other = other
            cache = transformers.DynamicCache(config=model.config)
            with torch.no_grad():
                prompt = model(ids(), past_key_values=cache).logits
                results.append((prompt, model(ids(2, 1, 1), past_key_values=cache).logits))
        served, refused = calls.served, calls.refused
        assert (served == 0 and refused >= 3) if other else (served >= 3 and refused == 0)
        want, have = results[-2:]
        assert close(have[0], want[0]) and close(have[1], want[1])
    assert not close(results[0][0], results[2][0])


def test_a_model_with_fewer_blocks_than_before():
    plain, fused = pair(layers=3)
    for model in (plain, fused):
        model.config.num_hidden_layers = 2
    more = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(plain.generate(ids(), **more), fused.generate(ids(), **more))
    for model in (plain, fused):
        model.model.layers = model.model.layers[:2]
    assert torch.equal(plain.generate(ids(), **more), fused.generate(ids(), **more))


# ---- calls that go to the original ---------------------------------------------------------------


def test_hooks_inside_a_block_see_and_replace_what_they_always_did(monkeypatch):
    plain, fused = pair()
    calls = Calls(monkeypatch)
    for model in (plain, fused):
        projection = model.model.layers[0].self_attn.v_proj
        model.handle = projection.register_forward_hook(lambda m, i, out: out * 2)
    with torch.no_grad():
        assert close(fused(ids()).logits, plain(ids()).logits)
        assert (calls.served, calls.refused) == (1, 1)
        plain.handle.remove()
        fused.handle.remove()
        assert close(fused(ids()).logits, plain(ids()).logits)
    assert (calls.served, calls.refused) == (3, 1)


def test_gradients_hidden_states_and_attentions(monkeypatch):
    plain, fused = pair()
    embeds = torch.randn(1, 5, 64)
    grads = []
    for model in (plain, fused):
        x = embeds.clone().requires_grad_()
        model(inputs_embeds=x).logits.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    with torch.no_grad():
        want, have = (m(ids(), output_hidden_states=True) for m in (plain, fused))
        assert len(have.hidden_states) == len(want.hidden_states) == 3
        for a, b in zip(have.hidden_states, want.hidden_states, strict=True):
            assert close(a, b)
    for model in (plain, fused):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        want, have = (m(ids(), output_attentions=True) for m in (plain, fused))
    for a, b in zip(have.attentions, want.attentions, strict=True):
        assert close(a, b)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_calls_after_one_that_asked_for_more_are_fused(asked, monkeypatch):
    """That call leaves transformers' collecting hooks in every block, for good; they used to send
    every later call to the original blocks."""
    plain, fused = pair()
    for model in (plain, fused):
        model.set_attn_implementation("eager")
    calls = Calls(monkeypatch)
    with torch.no_grad():
        want, have = (m(ids(), **{asked: True}) for m in (plain, fused))
        key = asked.removeprefix("output_")
        for a, b in zip(have[key], want[key], strict=True):
            assert close(a, b)
        calls.served = calls.refused = 0
        past = transformers.DynamicCache(config=fused.config)
        assert close(fused(ids(), past_key_values=past).logits, plain(ids()).logits)
        assert (calls.served, calls.refused) == (2, 0)
        before = local.stacks
        fused(ids()[:, :1], past_key_values=past)
        assert local.stacks == before + 1  # all blocks at once, as in any step
        # A hook of the user's own beside them is not taken for one of theirs.
        seen = []
        fused.model.layers[1].self_attn.register_forward_hook(lambda *call: seen.append(call[0]))
        fused(ids())
        assert seen == [fused.model.layers[1].self_attn]
        assert close(fused(ids(), **{asked: True})[key][-1], want[key][-1])


def test_settings_that_change_after_the_proof():
    plain, fused = pair()
    places = (("input_layernorm", "variance_epsilon", 10.0), ("self_attn", "scaling", 0.01))
    with torch.no_grad():
        before = fused(ids()).logits
        for path, name, value in places:
            for model in (plain, fused):
                setattr(model.model.layers[1].get_submodule(path), name, value)
            want = plain(ids()).logits
            assert close(fused(ids()).logits, want) and not close(want, before)
            assert close(copy.deepcopy(fused)(ids()).logits, want)
        for path, name, _ in places:
            inner = fused.model.layers[1].get_submodule(path)
            setattr(inner, name, getattr(fused.model.layers[0].get_submodule(path), name))
        assert torch.equal(fused(ids()).logits, before)


def test_blocks_that_are_taken_out_and_renumbered():
    results = []
    for model in pair(layers=4):
        model.generate(ids(), max_new_tokens=2)
        model.model.layers = nn.ModuleList(list(model.model.layers)[1:])
        model.config.num_hidden_layers = 3
        model.config.layer_types = None
        for index, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = index
        results.append(model.generate(ids(), max_new_tokens=8, do_sample=False))
    assert torch.equal(*results)


def test_a_replaced_projection_is_used():
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(1)
        model.model.layers[1].mlp.up_proj = nn.Linear(64, 160, bias=False)
    with torch.no_grad():
        assert close(fused(ids()).logits, plain(ids()).logits)
        for model in (plain, fused):
            model.model.layers[0].input_layernorm.weight.data = torch.full((64,), 0.5)
        assert close(fused(ids()).logits, plain(ids()).logits)
        for model in (plain, fused):
            model.model.layers[0].input_layernorm.weight.mul_(3)
        assert close(fused(ids()).logits, plain(ids()).logits)


def test_adapters_are_served_by_the_original(monkeypatch):
    peft = pytest.importorskip("peft")
    models = pair()
    calls = Calls(monkeypatch)
    results = []
    for model in models:
        torch.manual_seed(2)
        target = r"model\.layers\.1\.self_attn\.q_proj"
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=target)
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            first = adapted(ids()).logits
            with adapted.disable_adapter():
                second = adapted(ids()).logits
        results.append((first, second))
    for want, have in zip(*results, strict=True):
        assert close(have, want)
    assert not close(results[0][0], results[0][1])
    assert (calls.served, calls.refused) == (2, 2)  # the block without an adapter, and the other


# ---- blocks that are not like the others --------------------------------------------------------


def pair_of(change, layers=4):
    models = []
    for fusing in (False, True):
        model = build(layers=layers)
        change(model)
        models.append(ipex_llm.optimize_model(model, optimize_llm=fusing))
    return models


def test_one_block_computes_something_else():
    def change(model):
        model.model.layers[2].mlp.act_fn = nn.GELU()

    plain, fused = pair_of(change)
    assert len(ipex_llm.optimization_report(fused).fused) == 4
    kinds = [m.__dict__[STATE].description.mlp.activation for m in fused_modules(fused)]
    assert kinds == ["silu", "silu", "gelu", "silu"]
    with torch.no_grad():
        assert close(fused(ids()).logits, plain(ids()).logits)


class Odd(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """Differs where `when` says so: in a batch, or behind other tokens."""

    when = "batch"

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        held = 0 if past_key_values is None else past_key_values.get_seq_length(0)
        odd = hidden_states.shape[0] > 1 if self.when == "batch" else held > 0
        out = super().forward(hidden_states, past_key_values=past_key_values, **kwargs)
        return out * 1.5 if odd else out


class OddLater(Odd):
    when = "later"


@pytest.mark.parametrize("kind", [Odd, OddLater])
@pytest.mark.parametrize("place", [0, 2])
def test_a_block_that_differs_only_in_later_runs_is_left(kind, place):
    def change(model):
        model.model.layers[place].__class__ = kind

    plain, fused = pair_of(change)
    report = ipex_llm.optimization_report(fused)
    whole = [e["name"] for e in report.fused if e["fused"] == "attention and MLP"]
    assert whole == [f"model.layers.{i}" for i in range(4) if i != place], str(report)
    names = [e["name"] for e in report.entries]
    assert names.index(f"model.layers.{place}") == place
    more = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(plain.generate(ids(), **more), fused.generate(ids(), **more))


# ---- what must not change ------------------------------------------------------------------------


def test_names_copies_pickles_and_dtypes():
    plain, fused = pair()
    block, original = fused.model.layers[0], plain.model.layers[0]
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(block), name) == getattr(type(original), name)
    assert isinstance(block, type(original))
    assert list(fused.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        want = fused(ids()).logits
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert len(fused_modules(twin)) == 2
            assert torch.equal(twin(ids()).logits, want)
        twin.to(torch.bfloat16)
        assert close(twin(ids()).logits.float(), want, 0.1)
        assert torch.equal(fused(ids()).logits, want)


def test_saves_do_not_depend_on_fusion(tmp_path):
    plain, fused = pair()
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_low_bit(tmp_path / name)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")}
        for name in ("plain", "fused")
    ]
    assert files[0] == files[1]
    loaded = ipex_llm.load_low_bit(build(), tmp_path / "fused")
    assert fused_modules(loaded) == []
    with torch.no_grad():
        assert close(loaded(ids()).logits, plain(ids()).logits)
    assert len(fused_modules(loaded)) == 2
    unfused = ipex_llm.load_low_bit(build(), tmp_path / "plain")
    with torch.no_grad():
        unfused(ids())
    assert fused_modules(unfused) == []


def test_optimize_llm_false_leaves_every_module():
    plain, _ = pair()
    assert fused_modules(plain) == []
    assert "not looked" in str(ipex_llm.optimization_report(plain))


def test_probes_leave_no_state_behind():
    model = build().train()
    before = torch.get_rng_state()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    ipex_llm.optimize_model(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- models that cannot be fused -----------------------------------------------------------------


def test_a_block_that_raises_is_left_and_reported():
    model = build()

    class Refuses(type(model.model.layers[1])):
        def forward(self, hidden_states, *args, **kwargs):
            if hidden_states.abs().max() > 20:
                raise ValueError("too large for me")
            return super().forward(hidden_states, *args, **kwargs)

    model.model.layers[1].__class__ = Refuses
    ipex_llm.optimize_model(model)
    report = ipex_llm.optimization_report(model)
    reasons = {e["name"]: e["reason"] for e in report.left}
    assert "too large for me" in reasons["model.layers.1"]
    assert any(e["name"] == "model.layers.0" for e in report.fused)
    with torch.no_grad():
        assert model(ids()).logits.isfinite().all()


def test_a_model_that_is_not_a_language_model():
    model = ipex_llm.optimize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert "not a transformers model" in str(ipex_llm.optimization_report(model))


def test_a_block_with_one_thing_different_is_not_fused_wrongly():
    """Each of these changes what the block computes in a way that a description cannot hold."""

    def clamp(block):
        forward_of = type(block).forward

        class Clamped(type(block)):
            def forward(self, *args, **kwargs):
                return forward_of(self, *args, **kwargs).clamp(-2, 2)

        block.__class__ = Clamped

    model = build()
    clamp(model.model.layers[0])
    ipex_llm.optimize_model(model)
    plain = build()
    clamp(plain.model.layers[0])
    ipex_llm.optimize_model(plain, optimize_llm=False)
    assert STATE not in model.model.layers[0].__dict__
    with torch.no_grad():
        assert close(model(ids()).logits, plain(ids()).logits)


def test_a_window_of_the_blocks_own_is_not_lost():
    """Probes are shorter than the window, so they cannot see it."""

    def narrow(attention):
        class Windowed(type(attention)):
            def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
                tokens = hidden_states.shape[1]
                past = 0 if attention_mask is None else attention_mask.shape[-1] - tokens
                near = torch.ones((1, 1, tokens, past + tokens), dtype=torch.bool)
                near = near.tril(past).triu(past - 40)
                mask = near if attention_mask is None else attention_mask & near
                return super().forward(hidden_states, position_embeddings, mask, **kwargs)

        attention.__class__ = Windowed

    plain, fused = build(), build()
    for model in (plain, fused):
        narrow(model.model.layers[0].self_attn)
    ipex_llm.optimize_model(plain, optimize_llm=False)
    ipex_llm.optimize_model(fused)
    parts = {e["name"]: e["fused"] for e in ipex_llm.optimization_report(fused).fused}
    assert parts == {"model.layers.0.mlp": "MLP", "model.layers.1": "attention and MLP"}
    with torch.no_grad():
        want, have = (m(ids(1, 90), use_cache=False).logits for m in (plain, fused))
    assert close(have, want)


class GatedAttention(nn.Module):
    """What heads mix is multiplied by a function of other columns; `form` says how."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(64, 3 * 64)
        self.gate = nn.Linear(64, 4 if form == "softplus by heads" else 64)
        self.out = nn.Linear(64, 64)
        self.shift = nn.Parameter(torch.full((64,), 0.5))

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (t.reshape(batch, tokens, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, 2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, 64)
        gate = self.gate(x)
        if self.form == "softplus by heads":
            gate = nn.functional.softplus(gate).repeat_interleave(16, 2)
        elif self.form == "sigmoid":
            gate = torch.sigmoid(gate)
        else:  # of something that is no column
            gate = torch.sigmoid(gate + self.shift)
        return x + self.out(mixed * gate)


@pytest.mark.parametrize("form", ["sigmoid", "softplus by heads", "shifted"])
def test_gated_attention(form):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([GatedAttention(form)])
    plain = ipex_llm.optimize_model(copy.deepcopy(model).eval(), "sym_int8", optimize_llm=False)
    fused = ipex_llm.optimize_model(model.eval(), "sym_int8")
    x = torch.randn((2, 9, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert close(fused.layers[0](x), plain.layers[0](x))
    report = ipex_llm.optimization_report(fused)
    if form == "shifted":
        assert "norm or gate of it" in report.entries[0]["reason"], str(report)
    else:
        assert report.entries[0]["fused"] == "attention", str(report)


def test_gated_attention_over_windows_and_caches(monkeypatch):
    """afmoe: gates travel with the queries where a cache stores in its own way."""
    options = {"num_dense_layers": 4, "sliding_window": 6, "head_dim": 16, "layers": 4}
    plain, fused = pair("afmoe", **options)
    report = ipex_llm.optimization_report(fused)
    assert sum("attention" in entry["fused"] for entry in report.fused) == 4, str(report)
    calls = Calls(monkeypatch)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        fused.generate(ids(tokens=9), **settings), plain.generate(ids(tokens=9), **settings)
    )
    assert calls.served > 0


@pytest.mark.parametrize("original", [32, 64, 4096])
def test_queries_that_are_scaled_from_some_position_on(original, monkeypatch):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "llama_4_scaling_beta": 2.0}
    rope |= {"original_max_position_embeddings": original}
    plain, fused = pair("ministral3", rope_parameters=rope, head_dim=16)
    parts = {e["fused"] for e in ipex_llm.optimization_report(fused).fused}
    assert parts == ({"MLP"} if original == 32 else {"attention and MLP"})
    with torch.no_grad():
        for tokens in (30, 100):
            want, have = (m(ids(1, tokens)).logits for m in (plain, fused))
            assert close(have, want)
    calls = Calls(monkeypatch)
    generate = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = ids(1, 58)
    assert torch.equal(plain.generate(prompt, **generate), fused.generate(prompt, **generate))
    if original == 64:  # blocks, and the stack of them, up to there
        assert calls.served and calls.refused


def test_the_report_reads_well():
    _, fused = pair(layers=3)
    text = str(fuse.optimization_report(fused))
    assert text.splitlines()[0] == "optimize_llm: 3 modules fused"
    assert "model.layers.0 ... (3) (LlamaDecoderLayer): attention and MLP" in text


def test_experts_that_get_tokens_without_a_batch():
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 96, "mlp_only_layers": []}
    plain, fused = pair("qwen2_moe", **small, **more)
    names = [entry["name"] for entry in ipex_llm.optimization_report(fused).fused]
    assert "model.layers.0.self_attn" in names
    assert "model.layers.0.mlp.shared_expert" in names
    assert "model.layers.0.mlp.experts" in names
    generate = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(ids(), **generate), fused.generate(ids(), **generate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_in_one_tensor(tokens, dtype):
    small = {"num_experts": 12, "num_experts_per_tok": 10, "moe_intermediate_size": 32}
    plain, fused = pair("qwen3_moe", dtype, decoder_sparse_step=1, mlp_only_layers=[], **small)
    experts = [m.model.layers[1].mlp.experts for m in (plain, fused)]
    assert STATE in experts[1].__dict__, str(ipex_llm.optimization_report(fused))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((tokens, 64), generator=generator).to(dtype)
    # 12 stands for no expert.
    chosen = torch.stack([torch.randperm(13, generator=generator)[:10] for _ in range(tokens)])
    weights = torch.rand((tokens, 10), generator=generator).to(dtype)
    with torch.no_grad():
        want, have = (e(x, chosen, weights).float() for e in experts)
        assert close(have, want, 2e-3 if dtype == torch.float32 else 2e-2)
        with pytest.raises(Exception, match=r"expert|index|out of bounds|num_classes"):
            experts[1](x, chosen + 1, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("kind", "place"), [("gpt_oss", "mlp.experts"), ("minimax_m3_vl_text", "mlp.experts")]
)
def test_experts_with_clamped_gates(kind, place, tokens, dtype):
    """Also beyond the clamps, which no probe of the model itself may reach."""
    more = {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2}
    if kind != "gpt_oss":
        more |= {"mlp_layer_types": ["sparse"] * 2, "dense_intermediate_size": 96}
    plain, fused = pair(kind, dtype, **more)
    name = f"model.layers.1.{place}"
    assert STATE in fused.get_submodule(name).__dict__, str(ipex_llm.optimization_report(fused))
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand((tokens, 2), generator=generator).to(dtype)
    for scale in (1, 20, 400):
        x = (scale * torch.randn((tokens, 64), generator=generator)).to(dtype)
        with torch.no_grad():
            want, have = (m.get_submodule(name)(x, chosen, weights).float() for m in (plain, fused))
        assert close(have, want, 2e-3 if dtype == torch.float32 else 2e-2)


class Clipped(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)
        self.where = where

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        if self.where == "before":
            gate, up = gate.clamp(max=50.0), torch.clamp(up, -40.0, 40.0)
        inner = nn.functional.silu(gate)
        if self.where == "after":
            inner = inner.clamp(max=50.0)
        if self.where == "by a tensor":
            inner = nn.functional.silu(gate.clamp(max=torch.tensor(50.0)))
        return self.down(inner * up)


@pytest.mark.parametrize("where", ["before", "after", "by a tensor"])
def test_clamps_that_no_probe_reaches(where):
    """They are served where they are understood, and left where they are not."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Clipped(where), Clipped(where)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    plain = Model().eval()
    fused = copy.deepcopy(plain)
    ipex_llm.optimize_model(plain, optimize_llm=False)
    ipex_llm.optimize_model(fused)
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        fused(x)  # recognised at its first call
        assert bool(fused_modules(fused)) == (where == "before")
        assert close(fused(x), plain(x))
        assert close(fused(500 * x), plain(500 * x))


def test_parameters_of_an_activation_are_read_at_every_call():
    plain, fused = pair("apertus")
    assert len(fused_modules(fused)) == 2
    with torch.no_grad():
        for scale in (1.0, 3.0):
            for model in (plain, fused):
                model.model.layers[0].mlp.act_fn.alpha_p.mul_(scale).add_(scale - 1)
            assert close(fused(ids()).logits, plain(ids()).logits)


def test_models_inside_something_else():
    """As sentence-transformers holds them: found, fused, and named by their place."""

    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = nn.ModuleList([model])

        def forward(self, x):
            return self.inner[0](x).logits

    plain, fused = Holder(build()), Holder(build())
    ipex_llm.optimize_model(plain, optimize_llm=False)
    ipex_llm.optimize_model(fused)
    report = ipex_llm.optimization_report(fused)
    assert [e["name"] for e in report.fused] == ["inner.0.model.layers.0", "inner.0.model.layers.1"]
    with torch.no_grad():
        assert close(fused(ids()), plain(ids()))


def test_the_report_in_the_documents_is_that_of_smollm2(smollm2_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype="auto")
    report = str(ipex_llm.optimization_report(ipex_llm.optimize_model(model)))

    def without_numbers(text):  # the last digits are the machine's
        return re.sub(r"\d\.\d+(e-\d+)?", "#", text)

    root = pathlib.Path(__file__).resolve().parents[3]
    for document in ("README.md", "docs/fusion.md"):
        text = (root / document).read_text(encoding="utf-8")
        assert without_numbers(report) in without_numbers(text), document


def test_queries_that_the_length_of_the_cache_scales(monkeypatch):
    """Llama 4 scales queries without a rotation from some length on, which it asks its cache."""
    settings = {"floor_scale": 200, "attn_scale": 0.5, "no_rope_layers": [0, 0], "head_dim": 16}
    plain, fused = pair(
        "llama4_text",
        moe_layers=[],
        intermediate_size_mlp=96,
        attention_chunk_size=4096,
        **settings,
    )
    states = [m.__dict__[STATE] for m in fused_modules(fused)]
    attentions = [s.description for s in states if s.description.attention is not None]
    assert [d.length_limit for d in attentions] == [128, 128]
    calls = Calls(monkeypatch)
    with torch.no_grad():
        for tokens in (20, 120, 250):
            caches = [transformers.DynamicCache(config=m.config) for m in (plain, fused)]
            for step in (ids(2, tokens), ids(2, 1, 1), ids(2, 10, 1)):
                want, have = (
                    m(step, past_key_values=c).logits
                    for m, c in zip((plain, fused), caches, strict=True)
                )
                assert close(have, want)
    assert calls.served


def test_another_default_dtype_changes_nothing():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        fused = ipex_llm.optimize_model(build(dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(before)
    parts = [entry["fused"] for entry in ipex_llm.optimization_report(fused).fused]
    assert parts == ["attention and MLP"] * 2


def seq2seq_pair(kind, **more):
    settings = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 3}
    models = []
    for fusing in (False, True):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            kind, **settings, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0, **more
        )
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0, 0.3)
                if "relative_attention_bias" in name:
                    parameter.normal_(0.0, 2.0)
        models.append(ipex_llm.optimize_model(model, optimize_llm=fusing))
    return models


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_a_bias_that_blocks_hand_on(kind, monkeypatch):
    """T5's first block makes the bias of relative positions; the others get it, and return it."""
    plain, fused = seq2seq_pair(kind)
    parts = {e["name"]: e["fused"] for e in ipex_llm.optimization_report(fused).fused}
    for stack in ("encoder", "decoder"):
        assert f"{stack}.block.0.layer.0" not in parts
        assert [parts[f"{stack}.block.{i}.layer.0"] for i in (1, 2)] == ["attention"] * 2
    assert [parts[f"decoder.block.{i}.layer.1"] for i in (1, 2)] == ["cross attention"] * 2
    calls = Calls(monkeypatch)
    source, mask = ids(2, 40), torch.ones((2, 40), dtype=torch.long)
    mask[1, 25:] = 0
    target = ids(2, 70, 1)
    with torch.no_grad():
        want, have = (
            m(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
            for m in (plain, fused)
        )
    assert close(have, want)
    assert calls.served >= 8
    for how in ({}, {"num_beams": 3}, {"use_cache": False}):
        more = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **how}
        assert torch.equal(plain.generate(source, **more), fused.generate(source, **more))
