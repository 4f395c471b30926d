"""The growing cache, in the model's type and quantized: fused and unfused see the same.

For quantized caches the unfused model gets quantized layers too. It hands them its keys and values
and attends over what they give back, so what remains is float32 rounding and a code here and there
that falls to the other side of a tie.
"""

import copy
import json
import pickle

import pytest
import torch
from test_fuse import build, close, ids, pair

import ipex_llm
from ipex_llm.fuse import cache as caches
from ipex_llm.fuse.state import STATE, local

transformers = pytest.importorskip("transformers")

KINDS = pytest.mark.parametrize("kind", [None, "int8", "fp8"], ids=str)


@pytest.fixture(autouse=True)
def exact_activations():
    with ipex_llm.set_activation_precision("fp32"):
        yield


@pytest.fixture(scope="module")
def models():
    """The same model unfused, fused, and fused with each quantized cache."""
    plain, fused = pair()
    quantized = {k: ipex_llm.optimize_model(build(), kv_cache_dtype=k) for k in ("int8", "fp8")}
    return plain, {None: fused, **quantized}


def fresh(model, kind=None):
    """An empty cache whose layers quantize, whoever fills them."""
    cache = transformers.DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        if kind is not None:
            caches.layer_of(cache, index, caches.FORMATS[kind])
    return cache


def both(models, kind, steps):
    """`steps` with the unfused and with the fused model and caches of theirs: lists of logits."""
    plain, fused = models
    results = []
    for model, cache in ((plain, fresh(plain, kind)), (fused[kind], fresh(plain))):

        def call(tokens, mask=None, model=model, cache=cache):
            with torch.no_grad():
                return model(tokens, attention_mask=mask, past_key_values=cache).logits

        results.append(list(steps(call, cache)))
        lengths = {layer.get_seq_length() for layer in cache.layers}
        assert len(lengths) == 1
    return results


def expect_close(results, kind):
    for step, (want, have) in enumerate(zip(*results, strict=True)):
        # A flipped code moves a key by 1 % (fp8: 12 %) of a group of 32.
        assert close(have, want, {None: 1e-3, "int8": 4e-3, "fp8": 2e-2}[kind]), step


@KINDS
def test_several_appends_across_growth_of_the_buffers(models, kind):
    def steps(call, cache):
        for seed, tokens in enumerate((5, 1, 7, 64, 170, 1, 12, 1, 300, 1, 1)):
            yield call(ids(1, tokens, seed))
        assert cache.get_seq_length() == 563

    before = local.stacks
    expect_close(both(models, kind, steps), kind)
    assert local.stacks - before == 6  # up to 8 tokens, but for the first call


@KINDS
def test_a_padded_batch_with_beams_crops_and_selections(models, kind):
    def steps(call, cache):
        mask = torch.ones((2, 9), dtype=torch.long)
        mask[1, :4] = 0
        yield call(ids(2, 9), mask)[mask.bool()]
        cache.batch_repeat_interleave(3)
        beams, rows = ids(6, 1, 1), mask.repeat_interleave(3, 0)
        for order in ((0, 0, 2, 3, 5, 4), (1, 0, 0, 5, 5, 5)):
            rows = torch.cat([rows, rows.new_ones((6, 1))], 1)
            yield call(beams, rows)
            cache.reorder_cache(torch.tensor(order))
        cache.crop(-2)
        yield call(ids(6, 3, 2), torch.cat([rows, rows.new_ones((6, 1))], 1))
        chosen = torch.tensor([4, 1])
        cache.batch_select_indices(chosen)
        rows = torch.cat([rows, rows.new_ones((6, 2))], 1)[chosen]
        yield call(ids(2, 1, 3), rows)

    expect_close(both(models, kind, steps), kind)


@KINDS
@pytest.mark.parametrize("how", ["crop", "assign"])
def test_contents_that_were_handed_out_outlive_a_cut(models, kind, how):
    """A prefix that others go on with: the cache is cut, and filled with something else."""

    def steps(call, cache):
        yield call(ids(2, 12))
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        before = [tensor.clone() for tensor in kept]
        if how == "crop":
            cache.crop(-7)
        else:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
        yield call(ids(2, 5, 1))
        yield call(ids(2, 1, 2))
        for tensor, value in zip(kept, before, strict=True):
            assert torch.equal(tensor, value)

    expect_close(both(models, kind, steps), kind)


def test_a_cut_copies_only_what_was_handed_out(models):
    cache = fresh(models[0])
    with torch.no_grad():
        models[1][None](ids(1, 12), past_key_values=cache)
        slot = cache.layers[0].__dict__["_keys"]
        buffer = slot.buffer
        cache.crop(-4)
        models[1][None](ids(1, 3), past_key_values=cache)
        assert slot.buffer is buffer


@KINDS
def test_copies_and_pickles_hold_the_same_and_go_their_own_way(models, kind):
    model, cache = models[1][kind], fresh(models[0])
    with torch.no_grad():
        model(ids(2, 70), past_key_values=cache)
        others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        for other in others:
            for a, b in zip(cache.layers, other.layers, strict=True):
                assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        want = model(ids(2, 1, 1), past_key_values=cache).logits
        for other in others:
            model(ids(2, 4, 2), past_key_values=copy.deepcopy(other))
            assert torch.equal(model(ids(2, 1, 1), past_key_values=other).logits, want)
    assert cache.get_seq_length() == 71


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"assistant": 6}, {"prompt_lookup_num_tokens": 3}, {}], ids=str
)
@pytest.mark.parametrize("kind", [None, "int8"], ids=str)
def test_generate(models, kind, how):
    """Every way of generate() that rearranges a cache. Quantized: the same as token by token."""
    plain, fused = models[0], models[1][kind]
    how = dict(how)
    if "assistant" in how:
        how["assistant_model"] = models[1][None]
        how["num_assistant_tokens"] = how.pop("assistant")
    batch = 2 if how.keys() <= {"num_beams"} else 1
    prompt = ids(batch)
    mask = torch.ones_like(prompt)
    if batch > 1:
        mask[1, :4] = 0
    more = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    have = fused.generate(prompt, **more, **how)
    beams = {k: v for k, v in how.items() if k == "num_beams"}
    reference = {} if kind is None else {"past_key_values": fresh(plain, kind)}
    want = plain.generate(prompt, **more, **beams, **reference)
    assert torch.equal(have, want)


def test_static_caches_of_the_user_are_used(models):
    plain, fused = models
    results = []
    for model in (plain, fused["int8"]):
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            logits = [model(ids(1, n, n), past_key_values=cache).logits for n in (9, 1, 4, 1)]
        assert int(cache.get_seq_length()) == 15
        assert type(cache.layers[0]) is transformers.cache_utils.StaticLayer
        results.append(logits)
    expect_close(results, None)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_layers_show_floats_and_take_half_the_room(models, kind):
    cache = fresh(models[0])
    with torch.no_grad():
        models[1][kind](ids(2, 256), past_key_values=cache)
    layer = cache.layers[0]
    assert layer.keys.shape == layer.values.shape == (2, 2, 256, 16)
    assert layer.keys.dtype == torch.float32 == layer.dtype
    held = [slot.buffer for slot in (layer._keys, layer._values)]
    # 512 positions of room; 16 codes and one scale of two bytes each
    assert [b.numel() * b.element_size() for b in held] == [2 * 2 * 512 * 18] * 2
    # Somebody's own tensors are quantized when the model goes on with them.
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    with pytest.raises(AttributeError):
        layer.format = 0
    assert layer.room(1, 2, 1, (16, 16), torch.float32)[0].dtype == torch.uint8
    assert layer.room(1, 2, 1, (16, 16), torch.bfloat16) is None
    layer.reset()
    assert layer.get_seq_length() == 0


def test_calls_that_are_not_fused_go_on_with_a_quantized_cache(models):
    """A hook inside sends single calls to the original, which attends over dequantized keys."""
    plain, fused = models[0], models[1]["int8"]

    def steps(call, cache):
        yield call(ids(2, 9))
        hook = fused.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *a: None)
        yield call(ids(2, 3, 1))
        yield call(ids(2, 1, 2))
        hook.remove()
        yield call(ids(2, 1, 3))
        assert all(layer.format == 1 for layer in cache.layers)

    expect_close(both((plain, {"int8": fused}), "int8", steps), "int8")


def test_gradients_flow_through_a_quantized_cache(models):
    cache = fresh(models[0], "int8")
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    keys, _ = cache.update(x, x, 0)
    keys.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_cache_keeps_the_type_it_was_begun_with(models):
    _, fused = models
    cache = fresh(models[0])
    with torch.no_grad():
        fused[None](ids(), past_key_values=cache)
        fused["int8"](ids(2, 1), past_key_values=cache)
    assert cache.layers[0].format == 0
    assert cache.get_seq_length() == 12


def test_the_choice_travels_with_copies_and_saves(models, tmp_path):
    plain, fused = models
    with torch.no_grad():
        want = [fused["int8"](ids(), use_cache=True), None]
        copied = copy.deepcopy(fused["int8"])
        assert copied(ids()).past_key_values.layers[0].format == 1
        fused["int8"].save_low_bit(tmp_path / "int8")
        loaded = ipex_llm.optimize.load_low_bit(build(), tmp_path / "int8")
        have = loaded(ids(), use_cache=True)
        assert have.past_key_values.layers[1].format == 1
        assert torch.equal(want[0].logits, have.logits)
    for model, name in ((plain, "plain"), (fused[None], "fused")):
        model.save_low_bit(tmp_path / name)
        manifest = json.loads((tmp_path / name / "ipex_llm.json").read_text())
        assert "kv_cache_dtype" not in manifest["options"]


def test_what_is_no_kv_cache_dtype():
    model = build(layers=1)
    for value, error, text in (
        ("int4", ValueError, "expected one of int8, fp8"),
        ("int_8", ValueError, "did you mean 'int8'"),
        (8, TypeError, "must be a str or None"),
    ):
        with pytest.raises(error, match=text):
            ipex_llm.optimize_model(model, kv_cache_dtype=value)
    for more in ({"optimize_llm": False}, {"low_bit": None}):
        with pytest.raises(ValueError, match="needs optimize_llm"):
            ipex_llm.optimize_model(model, kv_cache_dtype="int8", **more)
    with pytest.warns(UserWarning, match="no attention of this Sequential was fused"):
        ipex_llm.optimize_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), kv_cache_dtype="int8")


def test_operators_refuse_what_does_not_fit():
    packed = torch.zeros((1, 2, 1, caches._block_bytes(16)), dtype=torch.uint8)
    x = torch.zeros(1, 2, 65, 16)
    for arguments, text in (
        ((packed, x, 0, 1, 0), "blocks of 64 for 65 positions"),
        ((packed, x[:, :, :1, :15].contiguous(), 64, 1, 0), "blocks of 64 for 65 positions"),
        ((packed, x[:, :1, :1], 0, 1, 0), "x must be"),
        ((packed, x[:, :, :1], 0, 0, 0), "cache_format must be"),
        ((packed, x[:, :, :1], 0, 1, 2), "part must be"),
        ((packed.float(), x[:, :, :1], 0, 1, 0), "must be uint8"),
    ):
        with pytest.raises(RuntimeError, match=text):
            caches._append(*arguments)
    with pytest.raises(RuntimeError, match="positions"):
        caches._read(packed, 65, 16, 1, 0, torch.float32)


def test_smollm2_says_the_same_with_int8_keys_and_values(smollm2_dir):
    """Real keys have channels a hundred times the others; the groups of 32 keep that apart."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    text = "The heart pumps blood through the body. Its four chambers work in pairs: " * 8
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16)
    ipex_llm.optimize_model(model.eval(), kv_cache_dtype="int8")
    states = [m.__dict__[STATE] for m in model.modules() if STATE in m.__dict__]
    results = {}
    for kind, number in caches.FORMATS.items():
        for state in states:
            state.cache_format = number
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt[:, :-8], past_key_values=cache)
            logits = [
                model(prompt[:, i : i + 1], past_key_values=cache).logits[0, 0].float()
                for i in range(prompt.shape[1] - 8, prompt.shape[1])
            ]
        assert cache.layers[0].format == number
        results[kind] = torch.stack(logits).log_softmax(-1)
    exact = results[None]
    divergence = {
        kind: float((exact.exp() * (exact - other)).sum(-1).mean())
        for kind, other in results.items()
    }
    assert divergence["int8"] < 2e-3
    assert divergence["int8"] < divergence["fp8"] < 5e-2
