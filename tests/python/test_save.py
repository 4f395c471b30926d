"""What save_low_bit writes, and what it refuses to write."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from ipex_llm import optimize_model
from ipex_llm.arguments import LOW_BITS
from ipex_llm.optimize import load_low_bit, low_memory_init
from ipex_llm.save import save_low_bit
from ipex_llm.tensor import LowBitTensor
from saved_models import Mixed, ids, mixed, tiny_llama, weight_files


@pytest.mark.parametrize("low_bit", [*LOW_BITS, None])
def test_a_loaded_model_is_the_saved_one_bit_for_bit(low_bit, tmp_path):
    model = optimize_model(mixed(), low_bit=low_bit, cpu_embedding=True)
    expected = model(ids())
    model.save_low_bit(tmp_path)
    with low_memory_init():
        empty = Mixed()
    loaded = load_low_bit(empty.eval(), tmp_path)
    assert loaded is empty
    assert torch.equal(loaded(ids()), expected)
    saved = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        assert type(parameter) is type(saved[name]), name
        assert parameter.dtype == saved[name].dtype
        if isinstance(parameter, LowBitTensor):
            assert torch.equal(parameter.packed, saved[name].packed), name
            assert parameter.packed.data_ptr() % 64 == 0
            for attribute in ("low_bit", "group_size", "exponent", "transposed", "stored_shape"):
                assert getattr(parameter, attribute) == getattr(saved[name], attribute)
        else:
            assert torch.equal(parameter, saved[name]), name
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name])
    assert loaded.head.weight is loaded.table.weight


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_group_sizes_come_back(group_size, tmp_path):
    model = optimize_model(mixed(), group_size=group_size)
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(mixed(1), tmp_path)
    assert loaded.lift.weight.group_size == group_size
    assert torch.equal(loaded(ids()), model(ids()))


def test_exponents_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(64, 16))
    with torch.no_grad():
        model[0].weight.mul_(2.0**-40)
    model = optimize_model(model)
    assert model[0].weight.exponent < 0
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(nn.Sequential(nn.Linear(64, 16)), tmp_path)
    assert torch.equal(loaded[0].weight.dequantize(), model[0].weight.dequantize())


def test_two_saves_are_byte_equal_and_so_is_a_save_of_the_loaded_model(tmp_path):
    model = optimize_model(mixed(), modules_to_not_convert=["lstm"])
    model.save_low_bit(tmp_path / "a", max_shard_size="20KB")
    model.save_low_bit(tmp_path / "b", max_shard_size=20_000)
    load_low_bit(mixed(3), tmp_path / "a").save_low_bit(tmp_path / "c", max_shard_size="20kB")
    names = sorted(os.listdir(tmp_path / "a"))
    assert len(names) > 3
    for other in "bc":
        assert sorted(os.listdir(tmp_path / other)) == names
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / other / name).read_bytes()


def test_saving_over_the_directory_that_is_mapped(tmp_path):
    optimize_model(mixed()).save_low_bit(tmp_path)
    loaded = load_low_bit(mixed(1), tmp_path)
    expected = loaded(ids())
    first = weight_files(tmp_path)
    with torch.no_grad():
        loaded.norm.weight.add_(1)  # mapped privately: the file keeps its value
    changed = loaded(ids())
    loaded.save_low_bit(tmp_path)
    assert weight_files(tmp_path) != first and len(weight_files(tmp_path)) == 1
    assert torch.equal(loaded(ids()), changed) and not torch.equal(changed, expected)
    assert torch.equal(load_low_bit(mixed(1), tmp_path)(ids()), changed)


def test_a_new_save_removes_the_files_of_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    optimize_model(mixed()).save_low_bit(tmp_path, max_shard_size="20KB")
    optimize_model(mixed(), low_bit="nf3").save_low_bit(tmp_path)
    assert len(weight_files(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["ipex_llm.json", "notes.txt", *weight_files(tmp_path)]
    )


def test_dtypes_after_a_cast_are_those_that_load(tmp_path):
    model = optimize_model(mixed(), torch_dtype=torch.bfloat16).float()
    model.save_low_bit(tmp_path)
    loaded = load_low_bit(mixed(1), tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(ids()), model(ids()))


def test_every_dtype_of_plain_tensors_comes_back(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 16)
            for dtype in (
                "bool uint8 int8 float8_e4m3fn float8_e5m2 uint16 int16 float16 bfloat16 uint32 "
                "int32 float32 uint64 int64 float64 complex64"
            ).split():
                value = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(getattr(torch, dtype))
                self.register_buffer("a_" + dtype, value)
            self.register_buffer("scalar", torch.tensor(3))
            self.register_buffer("nothing", torch.empty(0, 5))
            self.register_buffer("strided", torch.arange(12.0).reshape(3, 4).T)

    model = optimize_model(Holder())
    model.save_low_bit(tmp_path)
    blank = Holder()
    for name, buffer in blank.named_buffers():
        setattr(blank, name, torch.zeros_like(buffer))
    loaded = load_low_bit(blank, tmp_path)
    for name, buffer in model.named_buffers():
        other = getattr(loaded, name)
        assert other.dtype == buffer.dtype and other.shape == buffer.shape, name
        assert torch.equal(other.to(torch.complex128), buffer.to(torch.complex128)), name


def test_a_save_does_not_depend_on_fusion(tmp_path):
    tokens = ids() + 1
    saves = []
    for optimize_llm in (True, False):
        model = optimize_model(tiny_llama(), optimize_llm=optimize_llm)
        for run in range(2):
            directory = tmp_path / f"{optimize_llm}-{run}"
            model.save_low_bit(directory)
            saves.append(directory)
            with torch.no_grad():
                model(tokens)  # the first call may rearrange weights in memory
    weights = {tuple((d / name).read_bytes() for name in weight_files(d)) for d in saves}
    assert len(weights) == 1
    fused, again, *_ = ((d / "ipex_llm.json").read_text() for d in saves)
    assert fused == again


def test_config_and_generation_config_go_along(tmp_path):
    model = optimize_model(tiny_llama().bfloat16())
    model.generation_config.max_new_tokens = 7
    model.save_low_bit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["model_type"] == "llama"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 7
    assert not (tmp_path / "model.safetensors").exists()


def test_a_diffusers_model_is_constructed_from_the_directory_alone(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    kind = diffusers.DiTTransformer2DModel
    model = kind(num_attention_heads=2, attention_head_dim=16, num_layers=1, sample_size=8).eval()
    model.register_to_config(_name_or_path=str(tmp_path / "here"))
    optimize_model(model).save_low_bit(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    with low_memory_init():
        empty = kind.from_config(kind.load_config(tmp_path / "saved")).eval()
    loaded = load_low_bit(empty, tmp_path / "saved")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1])
    with torch.no_grad():
        have, want = (
            m(x, timestep=t, class_labels=c).sample for m in (loaded, model) for x, t, c in [inputs]
        )
    assert torch.equal(have, want)


def test_remote_code_goes_along_with_what_it_imports(tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    (source / "modeling_tiny.py").write_text(
        "import torch\nfrom transformers import PreTrainedModel\n"
        "from .configuration_tiny import TinyConfig\nfrom .helpers import width\n"
        "class TinyModel(PreTrainedModel):\n"
        "    config_class = TinyConfig\n    base_model_prefix = 'tiny'\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.layer = torch.nn.Linear(width(config), 32)\n        self.post_init()\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
    )
    (source / "helpers.py").write_text("def width(config):\n    return config.width\n")
    (source / "configuration_tiny.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class TinyConfig(PretrainedConfig):\n    model_type = 'tiny-for-tests'\n"
        "    def __init__(self, width=64, **kwargs):\n        self.width = width\n"
        "        super().__init__(**kwargs)\n"
    )
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "tiny-for-tests",
                "width": 64,
                "auto_map": {
                    "AutoConfig": "configuration_tiny.TinyConfig",
                    "AutoModel": "modeling_tiny.TinyModel",
                },
            }
        )
    )
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = optimize_model(AutoModel.from_config(config, trust_remote_code=True).eval())
    model.save_low_bit(saved)
    for name in ("modeling_tiny.py", "helpers.py", "configuration_tiny.py"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    with low_memory_init():
        empty = AutoModel.from_pretrained(saved, trust_remote_code=True)
    x = torch.ones(2, 64)
    assert torch.equal(load_low_bit(empty, saved)(x), model(x))


# ---- refusals ------------------------------------------------------------------------------------


def test_only_optimized_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="call optimize_model"):
        save_low_bit(mixed(), tmp_path / "x")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        save_low_bit(mixed().state_dict(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("size", "error"),
    [
        ("4 pigs", ValueError),
        ("", ValueError),
        ("-1GB", ValueError),
        (0, ValueError),
        (-5, ValueError),
        (1 << 63, ValueError),
        (1.5, TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_bad_shard_sizes(size, error, tmp_path):
    with pytest.raises(error, match="max_shard_size"):
        optimize_model(mixed()).save_low_bit(tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", [None, 3, "", b""])
def test_bad_directories(path):
    with pytest.raises((TypeError, ValueError), match="save_low_bit: the directory"):
        optimize_model(nn.Linear(32, 16)).save_low_bit(path)


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    model = optimize_model(nn.Linear(32, 16))
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            model.save_low_bit(path)
    assert os.listdir(tmp_path) == ["file"]


def test_what_safetensors_cannot_hold_is_named(tmp_path):
    model = optimize_model(nn.Sequential(nn.Linear(32, 16)))
    model.register_buffer("fine", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"'fine' is torch\.complex128"):
        model.save_low_bit(tmp_path / "x")
    model.fine = torch.eye(3).to_sparse()
    with pytest.raises(TypeError, match=r"'fine' is a torch\.sparse_coo"):
        model.save_low_bit(tmp_path / "x")
    del model.fine
    model.register_buffer("fine", torch.eye(3).to_sparse(), persistent=False)
    model.save_low_bit(tmp_path / "x")  # not saved, so no obstacle


def test_meta_and_extra_state_are_refused(tmp_path):
    model = optimize_model(nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)))
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"'1\.weight' is on the meta device"):
        model.save_low_bit(tmp_path / "x")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    model = optimize_model(nn.Sequential(Extra(32, 16)))
    with pytest.raises(ValueError, match="extra state"):
        model.save_low_bit(tmp_path / "x")
    assert not (tmp_path / "x").exists()
