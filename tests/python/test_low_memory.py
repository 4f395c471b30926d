"""low_memory_init: parameters on meta, buffers real, and no trace of it afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from ipex_llm.optimize import load_low_bit, low_memory_init, optimize_model
from saved_models import Mixed, ids, mixed, tiny_llama

PATCHED = ("register_parameter", "_apply", "to_empty", "_load_from_state_dict")


@pytest.fixture(autouse=True)
def no_trace():
    """Whatever a test does inside a block, the methods of nn.Module are torch's own again."""
    before = {name: nn.Module.__dict__[name] for name in PATCHED}
    yield
    assert {name: nn.Module.__dict__[name] for name in PATCHED} == before
    assert not [f for f in sys.meta_path if type(f).__name__ == "_PatchOnImport"]
    assert not nn.Linear(2, 2).weight.is_meta


def all_meta(model: nn.Module) -> bool:
    return all(p.is_meta for p in model.parameters())


def no_buffer_is_meta(model: nn.Module) -> bool:
    return not any(b.is_meta for b in model.buffers())


def test_parameters_are_meta_and_buffers_real():
    with low_memory_init():
        model = Mixed()
    assert all_meta(model) and no_buffer_is_meta(model)
    assert torch.equal(model.computed, Mixed().computed)
    assert model.head.weight is model.table.weight
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in Mixed().named_parameters()
    }


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Embedding(8, 8)])
def test_initializers_pass_over_what_is_meta_and_fill_the_rest(make):
    real = torch.full((8, 8), 7.0)
    state = torch.get_rng_state()
    with low_memory_init():
        make()
        assert torch.equal(torch.get_rng_state(), state)
        nn.init.kaiming_uniform_(real)
        assert not (real == 7).any()
        nn.init.zeros_(real)
    assert not real.any()
    nn.init.normal_(make().weight)  # as before again
    assert nn.init.kaiming_uniform_.__module__ == "torch.nn.init"
    assert not hasattr(nn.init._no_grad_normal_, "__wrapped__")


def test_one_parameter_registered_twice_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Parameter(torch.ones(3))
            shared.mark = "kept"
            self.a = shared
            self.b = nn.ParameterList([shared, nn.Parameter(torch.ones(2), requires_grad=False)])

    with low_memory_init():
        model = Twice()
    assert model.a is model.b[0] and model.a.is_meta and model.a.mark == "kept"
    assert not model.b[1].requires_grad


def test_conversions_change_dtypes_only():
    with low_memory_init():
        model = Mixed().half()
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert model.computed.dtype == torch.float16 and no_buffer_is_meta(model)
        model.to("cpu", torch.bfloat16).cpu().float().to(torch.float64)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert all_meta(model)
        assert model.head.weight is model.table.weight


def test_skip_init_and_to_empty_keep_parameters_on_meta():
    with low_memory_init():
        linear = nn.utils.skip_init(nn.Linear, 4, 3, dtype=torch.float16)
        batch = nn.utils.skip_init(nn.BatchNorm1d, 4)
        mixed_model = Mixed().to_empty(device="cpu")
    assert all_meta(linear) and linear.weight.dtype == torch.float16
    assert all_meta(batch) and no_buffer_is_meta(batch)
    assert all_meta(mixed_model)
    assert torch.equal(mixed_model.computed, Mixed().computed)  # not emptied


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_fills_buffers_only(assign):
    state = mixed().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with low_memory_init():
            model = Mixed()
            model.load_state_dict(state, assign=assign)
            assert all_meta(model)
            assert torch.equal(model.batch.running_mean, state["batch.running_mean"])
            state["lift.weight"] = torch.zeros(3, 3)
            with pytest.raises(RuntimeError, match="size mismatch"):
                model.load_state_dict(state)


class NeedsPositive(nn.Module):
    """Refuses the values of an ordinary matrix."""

    def forward(self, x):
        return x @ x.mT

    def right_inverse(self, x):
        return x if x.is_meta else torch.linalg.cholesky(x)


_parametrizations = nn.utils.parametrizations


@pytest.mark.parametrize(
    "norm",
    [
        _parametrizations.weight_norm,
        _parametrizations.spectral_norm,
        _parametrizations.orthogonal,
        lambda layer: _parametrizations.orthogonal(layer, orthogonal_map="cayley"),
        lambda layer: _parametrizations.orthogonal(layer, orthogonal_map="householder"),
        lambda layer: _parametrizations.orthogonal(layer, use_trivialization=False),
    ],
)
@pytest.mark.parametrize("outputs", [16, 32, 48])
def test_parametrizations_that_look_at_values(norm, outputs, tmp_path):
    def build():
        return nn.Sequential(norm(nn.Linear(32, outputs)), nn.Linear(outputs, 32)).eval()

    model = optimize_model(build())
    model.save_low_bit(str(tmp_path))
    with low_memory_init():
        fresh = build()
    assert all(p.is_meta for p in fresh.parameters())
    loaded = load_low_bit(fresh, str(tmp_path))
    x = torch.randn(2, 32)
    assert torch.equal(loaded(x), model(x))


def test_a_parametrization_that_refuses_the_values_it_gets():
    with low_memory_init():
        layer = nn.Linear(8, 8)
        nn.utils.parametrize.register_parametrization(layer, "weight", NeedsPositive())
    assert layer.parametrizations.weight.original.is_meta


def test_a_tied_weight_that_is_parametrized_stays_tied():
    with low_memory_init():
        a, b = nn.Linear(32, 32), nn.Linear(32, 32)
        b.weight = a.weight
        _parametrizations.orthogonal(a)
    assert a.parametrizations.weight.original is b.weight


def test_blocks_nest():
    with low_memory_init():
        with low_memory_init():
            assert nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_an_exception_restores_everything():
    with pytest.raises(ZeroDivisionError), low_memory_init(), low_memory_init():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta  # and no_trace looks at the rest


def test_other_threads_construct_normally():
    inside, checked = threading.Event(), threading.Event()
    seen = {}

    def other():
        inside.wait(10)
        layer = nn.Linear(8, 8).half()
        layer.load_state_dict(layer.state_dict())
        seen["real"] = not layer.weight.is_meta and layer.weight.dtype == torch.float16
        with low_memory_init():
            seen["own block"] = nn.Linear(2, 2).weight.is_meta
        seen["after it"] = not nn.Linear(2, 2).weight.is_meta
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with low_memory_init():
        inside.set()
        assert checked.wait(10)
        assert nn.Linear(2, 2).weight.is_meta  # the other thread's block is over, ours is not
    thread.join()
    assert seen == {"real": True, "own block": True, "after it": True}


def test_outside_the_block_a_model_from_it_moves_like_any_other():
    with low_memory_init():
        model = nn.Linear(3, 3)
    with pytest.raises(NotImplementedError, match="meta"):
        model.to("cpu")
    assert not model.to_empty(device="cpu").weight.is_meta


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    optimize_model(tiny_llama().bfloat16()).save_low_bit(directory)
    return directory


def test_from_pretrained_reads_no_weights(llama_dir):
    from transformers import AutoModelForCausalLM

    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(llama_dir)
    reference = tiny_llama()
    assert all_meta(model) and no_buffer_is_meta(model) and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for (name, buffer), (other_name, other) in zip(
        model.named_buffers(), reference.named_buffers(), strict=True
    ):
        assert name == other_name and buffer.dtype == other.dtype and torch.equal(buffer, other)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
        (None, torch.bfloat16),
    ],
)
def test_dtype_arguments(llama_dir, keyword, value, expected):
    from transformers import AutoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch_dtype is an old name to transformers
        with low_memory_init():
            model = AutoModel.from_pretrained(llama_dir, **{keyword: value})
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.config.dtype == expected


def test_other_arguments(llama_dir):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with low_memory_init():
        model, info = AutoModelForCausalLM.from_pretrained(
            llama_dir,
            attn_implementation="eager",
            low_cpu_mem_usage=True,
            device_map="auto",
            output_loading_info=True,
            use_cache=False,
        )
        assert model.config._attn_implementation == "eager"
        assert model.config.use_cache is False
        assert not any(info.values())
        config = LlamaConfig.from_pretrained(llama_dir)
        config.num_hidden_layers = 1
        shallow = LlamaForCausalLM.from_pretrained(llama_dir, config=config)
        assert len(shallow.model.layers) == 1 and config.num_hidden_layers == 1
        with pytest.raises(ValueError, match="quantization_config"):
            LlamaForCausalLM.from_pretrained(llama_dir, quantization_config={"bits": 4})
        with pytest.raises(ValueError, match="dtype"):
            LlamaForCausalLM.from_pretrained(llama_dir, dtype="int8")
        with pytest.raises(OSError, match="nowhere"):
            LlamaForCausalLM.from_pretrained(llama_dir / "nowhere")
        with pytest.warns(UserWarning, match="device_map"):
            LlamaForCausalLM.from_pretrained(llama_dir, device_map="cuda:0")


def test_generation_config_is_read(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    model.generation_config.max_new_tokens = 5
    optimize_model(model).save_low_bit(tmp_path)
    with low_memory_init():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 5
    loaded = load_low_bit(loaded, tmp_path)
    tokens = ids()[:1] + 1
    assert torch.equal(
        loaded.generate(tokens, do_sample=False), model.generate(tokens, do_sample=False)
    )


def test_transformers_may_be_imported_inside_the_block(llama_dir):
    program = (
        "import sys, torch\n"
        "from ipex_llm.optimize import load_low_bit, low_memory_init\n"
        "assert 'transformers' not in sys.modules\n"
        "with low_memory_init():\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(llama_dir)!r})\n"
        "assert all(p.is_meta for p in model.parameters())\n"
        f"load_low_bit(model, {str(llama_dir)!r})\n"
        "assert not any(p.is_meta for p in model.parameters())\n"
        "from transformers import PreTrainedModel\n"
        "assert PreTrainedModel.from_pretrained.__module__ == 'transformers.modeling_utils'\n"
        "assert 'low_memory' not in PreTrainedModel.from_pretrained.__func__.__code__.co_filename\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_remote_code_that_never_calls_post_init(tmp_path):
    """Plain transformers 5 leaves the computed buffers of such a class uninitialised."""
    (tmp_path / "modeling_old.py").write_text(
        "import torch\n"
        "from torch.nn.utils import skip_init\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "class OldConfig(PretrainedConfig):\n    model_type = 'old-style-for-tests'\n"
        "class OldModel(PreTrainedModel):\n"
        "    config_class = OldConfig\n    base_model_prefix = 'transformer'\n"
        "    def __init__(self, config, device=None, empty_init=True):\n"
        "        super().__init__(config)\n"
        "        self.layer = skip_init(torch.nn.Linear, 64, 32, dtype=config.torch_dtype)\n"
        "        inv = 1.0 / (10000 ** (torch.arange(0, 32, 2).float() / 32))\n"
        "        self.register_buffer('inv_freq', inv, persistent=False)\n"
        "    def forward(self, x):\n        return self.layer(x) * self.inv_freq.sum()\n"
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "old-style-for-tests",
                "torch_dtype": "float32",
                "auto_map": {
                    "AutoConfig": "modeling_old.OldConfig",
                    "AutoModel": "modeling_old.OldModel",
                },
            }
        )
    )
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    nn.init.normal_(model.layer.weight)  # skip_init left them as the memory was
    nn.init.zeros_(model.layer.bias)
    model = optimize_model(model)
    x = torch.ones(1, 64)
    expected = model(x)
    model.save_low_bit(tmp_path / "saved")
    with low_memory_init():
        empty = AutoModel.from_pretrained(
            tmp_path / "saved", torch_dtype="auto", trust_remote_code=True
        )
        assert all_meta(empty) and not empty.inv_freq.is_meta
    assert torch.equal(load_low_bit(empty, tmp_path / "saved")(x), expected)


# ---- other libraries -----------------------------------------------------------------------------


def test_whisper(tmp_path):
    whisper = pytest.importorskip("whisper.model")
    dims = whisper.ModelDimensions(8, 20, 64, 2, 2, 100, 16, 64, 2, 2)
    torch.manual_seed(0)
    model = whisper.Whisper(dims)
    # whisper leaves this parameter uninitialized; what lay in that memory may be NaN.
    torch.nn.init.normal_(model.decoder.positional_embedding)
    state = model.state_dict()
    mel, tokens = torch.randn(1, 8, 40), torch.tensor([[1, 2, 3]])
    model = optimize_model(model.eval())
    expected = model(mel, tokens)
    model.save_low_bit(tmp_path)
    with low_memory_init():
        empty = whisper.Whisper(dims)
        empty.load_state_dict(state)
        empty.to("cpu").half().float()
    assert all_meta(empty)
    loaded = load_low_bit(empty.eval(), tmp_path)
    assert torch.equal(loaded(mel, tokens), expected)


def test_sentence_transformers(minilm_dir, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = optimize_model(st.SentenceTransformer(minilm_dir, device="cpu"), low_bit="sym_int8")
    expected = model.encode(["a small test"])
    model.save_low_bit(tmp_path)
    with low_memory_init():
        empty = st.SentenceTransformer(minilm_dir, device="cpu")
    assert all_meta(empty)
    loaded = load_low_bit(empty, tmp_path)
    assert (loaded.encode(["a small test"]) == expected).all()
