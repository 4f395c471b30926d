"""A fused model in a server: threads, interruptions, and what must not be left behind."""

import copy
import sys
import threading
import time

import pytest
import torch
from test_fuse import build, close, fused_modules, ids, pair

import ipex_llm
from ipex_llm.fuse import cache as caches
from ipex_llm.fuse import collecting, observe, prove
from ipex_llm.fuse.stack import STACK
from ipex_llm.fuse.state import local
from ipex_llm.optimize import load_low_bit

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def exact_activations():
    with ipex_llm.set_activation_precision("fp32"):
        yield


@pytest.fixture
def eager_switching():
    """Threads of Python take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def model():
    return ipex_llm.optimize_model(build(layers=3))


def jobs():
    """Arguments of generate(): lengths, batches, padding, beams, with and without a cache."""
    mask = torch.ones((2, 9), dtype=torch.long)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 8, "do_sample": False}
    return [
        {"inputs": ids(1, 5, 1), **settings},
        {"inputs": ids(2, 9, 2), "attention_mask": mask, **settings},
        {"inputs": ids(1, 70, 3), **settings},
        {"inputs": ids(1, 7, 4), "num_beams": 2, **settings},
        {"inputs": ids(1, 6, 5), "cache_implementation": "static", **settings},
        {"inputs": ids(2, 3, 6), "use_cache": False, **settings},
    ]


def in_threads(model, want, beside=None, threads=3, rounds=2):
    """What went wrong while `threads` threads generate and another one calls `beside`."""
    wrong, done = [], threading.Event()

    def work(offset):
        try:
            with ipex_llm.set_activation_precision("fp32"):
                for number in range(offset, offset + rounds * len(want)):
                    index = number % len(want)
                    if not torch.equal(model.generate(**jobs()[index]), want[index]):
                        wrong.append(f"job {index} differs")
        except Exception as error:
            wrong.append(error)

    def other():
        try:
            while not done.is_set():
                beside()
                time.sleep(1e-3)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    others = [threading.Thread(target=other)] if beside else []
    for thread in workers + others:
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    for thread in others:
        thread.join()
    return wrong


@pytest.mark.parametrize("beside", [None, "to", "deepcopy", "save", "hidden states", "hooks"])
def test_threads_share_a_model(model, beside, tmp_path, eager_switching):
    hooked = model.model.layers[1].self_attn.q_proj
    asked = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    calls = {
        None: None,
        "to": lambda: model.to("cpu", torch.float32).eval(),
        "deepcopy": lambda: copy.deepcopy(model),
        "save": lambda: (model.save_low_bit(tmp_path), model.state_dict()),
        "hidden states": lambda: model.generate(ids(1, 5), do_sample=False, **asked),
        "hooks": lambda: hooked.register_forward_hook(lambda *a: None).remove(),
    }
    want = [model.generate(**job) for job in jobs()]
    assert not in_threads(model, want, calls[beside])
    assert local.stack is None


def test_a_loaded_model_is_fused_once_whoever_calls_it_first(model, tmp_path, eager_switching):
    model.save_low_bit(tmp_path)
    want = [model.generate(**job) for job in jobs()[:2]]
    for _ in range(3):
        loaded = load_low_bit(build(layers=3), tmp_path)
        assert not in_threads(loaded, want, threads=4, rounds=1)
        assert len(fused_modules(loaded)) == 3 == len(ipex_llm.optimization_report(loaded).entries)
        assert STACK in loaded.model.__dict__
    waiting = copy.deepcopy(load_low_bit(build(layers=3), tmp_path))
    assert "first call" in str(ipex_llm.optimization_report(waiting))
    assert torch.equal(waiting.generate(**jobs()[0]), want[0])
    assert len(ipex_llm.optimization_report(waiting).fused) == 3


def test_a_thread_inside_the_model_is_not_observed(model, tmp_path, monkeypatch):
    """A call with gradients goes on while another thread fuses."""
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(build(layers=3), tmp_path)
    run, errors = observe._Inputs.run, []

    def call():
        try:
            with torch.enable_grad():
                loaded(ids(2, 13))
        except Exception as error:
            errors.append(error)

    def with_another_call(self, *args):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        run(self, *args)

    monkeypatch.setattr(observe._Inputs, "run", with_another_call)
    with torch.no_grad():
        assert close(loaded(ids()).logits, model(ids()).logits)
    assert not errors
    assert len(fused_modules(loaded)) == 3


def test_a_hook_that_comes_while_hooks_are_looked_at(monkeypatch):
    model = ipex_llm.optimize_model(build(layers=1))
    block = model.model.layers[0]
    with torch.no_grad():
        plain = model(ids()).logits
        block.mlp.down_proj.register_forward_hook(lambda *args: None)

        def key_of(hook):  # another thread registers one on a module that was seen already
            monkeypatch.undo()
            block.self_attn.v_proj.register_forward_hook(lambda m, args, output: output * 0)
            return "attentions"

        monkeypatch.setattr(collecting, "key_of", key_of)
        model(ids())
        assert not close(model(ids()).logits, plain)


def test_moving_a_model_to_where_it_is_takes_no_weight_away():
    layer = ipex_llm.optimize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)))[0]
    weight = layer.weight

    def stay(tensor):
        assert layer.weight is weight
        return tensor

    layer._apply(stay)
    layer.to(torch.float32)
    assert layer.weight is weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16


def test_one_class_of_growing_layers(monkeypatch):
    def slow():
        time.sleep(0.05)
        return type("GrowableLayer", (), {})

    monkeypatch.setattr(caches, "_classes", [])
    monkeypatch.setattr(caches, "_make_growable_class", slow)
    made = []
    threads = [threading.Thread(target=lambda: made.append(caches.growable_class())) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1


class Interrupts:
    """Stands in for a function: Ctrl-C comes at one of its calls."""

    def __init__(self, function, at):
        self.function, self.left = function, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


PLACES = [("prove_alike", 2), ("prove", 1), ("prove", 2), ("prove_stack", 1)]


def expect_unfused(model):
    assert not fused_modules(model)
    assert not any(STACK in m.__dict__ for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not ipex_llm.optimization_report(model).entries


def expect_fused(model):
    assert len(fused_modules(model)) == 3 == len(ipex_llm.optimization_report(model).fused)
    assert len(ipex_llm.optimization_report(model).entries) == 3
    assert STACK in model.model.__dict__


@pytest.mark.parametrize(("function", "at"), PLACES)
def test_ctrl_c_while_blocks_are_fused(model, function, at, monkeypatch):
    interrupted = build(layers=3)
    monkeypatch.setattr(prove, function, Interrupts(getattr(prove, function), at))
    with pytest.raises(KeyboardInterrupt):
        ipex_llm.optimize_model(interrupted)
    monkeypatch.undo()
    expect_unfused(interrupted)  # nothing that is not proved stays
    with torch.no_grad():
        assert close(interrupted(ids()).logits, model(ids()).logits)
    ipex_llm.optimize_model(interrupted)
    expect_fused(interrupted)


@pytest.mark.parametrize(("function", "at"), PLACES)
def test_ctrl_c_at_the_first_call_of_a_loaded_model(model, function, at, monkeypatch, tmp_path):
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(build(layers=3), tmp_path)
    monkeypatch.setattr(prove, function, Interrupts(getattr(prove, function), at))
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            loaded(ids())
        monkeypatch.undo()
        expect_unfused(loaded)
        assert "first call" in str(ipex_llm.optimization_report(loaded))
        assert close(loaded(ids()).logits, model(ids()).logits)
    expect_fused(loaded)


def test_ctrl_c_while_a_block_learns(monkeypatch):
    torch.manual_seed(0)
    config = build(layers=2).config

    class Blocks(torch.nn.Module):
        """Not a model whose inputs are known."""

        def __init__(self):
            super().__init__()
            llama = transformers.models.llama.modeling_llama
            layers = [llama.LlamaMLP(config) for _ in range(2)]
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = ipex_llm.optimize_model(Blocks().eval())
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        monkeypatch.setattr(prove, "prove", Interrupts(prove.prove, 1))
        with pytest.raises(KeyboardInterrupt):
            model(x)
        monkeypatch.undo()
        assert not ipex_llm.optimization_report(model).entries
        model(x)
    assert len(ipex_llm.optimization_report(model).fused) == 2 == len(fused_modules(model))


def test_a_model_compiled_with_a_growing_cache():
    plain, fused = pair(layers=1)
    compiled = torch.compile(fused, backend="aot_eager", dynamic=True)
    results = []
    for steps in ((plain,) * 4, (fused, compiled, fused, fused)):
        cache = transformers.DynamicCache(config=plain.config)
        with torch.no_grad():
            inputs = [(step, ids(1, n, n)) for step, n in zip(steps, (5, 1, 1, 3), strict=True)]
            results.append([step(x, past_key_values=cache).logits for step, x in inputs])
        assert cache.get_seq_length() == 10
    for want, have in zip(*results, strict=True):
        assert close(have, want)
