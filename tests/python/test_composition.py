"""Models that are put together in unusual ways: parametrized, lazy, wrapped, adapted, mixed."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor, optimize_model, plan
from references import assert_close, dequantized, exact


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def packed(model):
    return {n for n, p in model.named_parameters() if isinstance(p, LowBitTensor)}


def same_as_dequantized(model, x, layers=4):
    with exact():
        assert_close(model(x), dequantized(model)(x), layers)


# ---- weights computed from other weights ------------------------------


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


def test_parametrized_weights_stay_float_and_say_why():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Symmetric())
    entry = next(e for e in plan(model) if "original" in e.name)
    assert "parametrized" in entry.reason
    optimize_model(model)
    assert packed(model) == {"1.weight"}
    assert torch.equal(model[0].weight, model[0].weight.T)
    same_as_dequantized(model, torch.randn(2, 32))


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
    ],
)
def test_weight_norms(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.utils.weight_norm is deprecated, and still in use
        model = nn.Sequential(norm(nn.Linear(32, 32)), nn.Linear(32, 32)).eval()
    expected = model[0](torch.ones(1, 32))
    optimize_model(model)
    assert packed(model) == {"1.weight"}
    assert torch.equal(model[0](torch.ones(1, 32)), expected)
    model(torch.randn(2, 32))


def test_a_parametrization_added_later_wins():
    model = optimize_model(nn.Sequential(nn.Linear(32, 32)))
    replaced = {"0.weight": torch.eye(32), "0.bias": torch.zeros(32)}
    x = torch.randn(2, 32)
    assert torch.allclose(torch.func.functional_call(model, replaced, (x,)), x)


# ---- sharing -----------------------------------------------------------


def test_two_parameters_over_one_memory_are_packed_once():
    a, b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    b.weight = nn.Parameter(a.weight.data)
    model = optimize_model(nn.Sequential(a, b))
    assert packed(model) == {"0.weight", "1.weight"}
    assert a.weight is not b.weight
    assert a.weight.packed.data_ptr() == b.weight.packed.data_ptr()  # still one memory
    same_as_dequantized(model, torch.randn(2, 32))


def test_a_weight_tied_to_a_slice_of_another():
    big, small = nn.Linear(32, 64, bias=False), nn.Linear(32, 16, bias=False)
    small.weight = nn.Parameter(big.weight.data[:16])
    model = optimize_model(nn.ModuleList([big, small]))
    x = torch.randn(2, 32)
    with exact():
        assert_close(small(x), dequantized(small)(x))
        assert torch.equal(small.weight.dequantize(), big.weight.dequantize()[:16])
    assert len(packed(model)) == 2


def test_one_module_under_two_parents_and_names():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    optimize_model(model, modules_to_not_convert=["b"])
    assert not packed(model)  # either name excludes it
    optimize_model(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert isinstance(shared.weight, LowBitTensor)


def test_a_weight_tied_across_kinds_of_layers():
    embed, conv = nn.Embedding(64, 48), nn.Linear(48, 64)
    conv.weight = embed.weight
    model = optimize_model(nn.ModuleList([embed, conv]), "sym_int8")
    assert embed.weight is conv.weight
    ids = torch.arange(5)
    assert torch.equal(embed(ids), embed.weight.dequantize()[ids])
    assert len(packed(model)) == 1


# ---- construction ------------------------------------------------------


def test_skip_init():
    layer = torch.nn.utils.skip_init(nn.Linear, 32, 32)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.zero_()
    same_as_dequantized(optimize_model(nn.Sequential(layer)), torch.randn(2, 32))


def test_lazy_modules_stay_until_their_shape_is_known():
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 32))
    assert "lazy" in next(e for e in plan(model) if e.name == "0.weight").reason
    optimize_model(model)
    assert packed(model) == {"1.weight"}
    assert model(torch.randn(2, 20)).shape == (2, 32)
    ready = nn.Sequential(nn.LazyLinear(32))
    ready(torch.randn(1, 20))
    optimize_model(ready)
    assert packed(ready) == {"0.weight"}


def test_a_model_with_a_part_on_meta_is_refused_untouched():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match=r"meta device.*1\.weight"):
        optimize_model(model)
    assert not packed(model)
    optimize_model(model, modules_to_not_convert=["1"])
    assert packed(model) == {"0.weight"}


def test_mixed_dtypes():
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    model = nn.ModuleList(nn.Linear(40, 24, dtype=dtype) for dtype in dtypes)
    optimize_model(model)
    for layer, dtype in zip(model, dtypes, strict=True):
        assert layer.weight.dtype == dtype
        x = torch.randn(3, 40, dtype=dtype)
        with exact():
            assert layer(x).dtype == dtype
            assert_close(layer(x), dequantized(layer)(x))


class Delegating(nn.Module):
    """Hands unknown attributes to what it wraps, as many wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


def test_modules_that_override_getattr():
    model = optimize_model(Delegating(nn.Linear(32, 32)))
    assert model.in_features == 32
    assert model.weight is model.inner.weight
    same_as_dequantized(model, torch.randn(2, 32))
    assert isinstance(copy.deepcopy(model).weight, LowBitTensor)


class Slotted(nn.Module):
    """Keeps a second reference to a child outside of the module tree."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.__dict__["alias"] = self.layer

    def forward(self, x):
        return self.alias(x)


def test_aliases_outside_the_tree_see_the_packed_weight():
    model = optimize_model(Slotted())
    assert isinstance(model.alias.weight, LowBitTensor)
    same_as_dequantized(model, torch.randn(2, 32))


# ---- wrapped models ----------------------------------------------------


def inner():
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))


def test_models_already_compiled():
    compiled = torch.compile(inner().eval(), backend="eager")
    x = torch.randn(2, 32)
    compiled(x)
    assert optimize_model(compiled) is compiled
    assert len(packed(compiled)) == 2
    assert type(compiled._orig_mod).__name__ == "Sequential"
    with exact():
        assert_close(compiled(x), dequantized(compiled._orig_mod)(x), layers=2)
    with pytest.raises(ValueError, match="already optimized"):
        optimize_model(compiled)
    with pytest.raises(ValueError, match="already optimized"):
        optimize_model(compiled._orig_mod)


def test_compiling_afterwards():
    model = optimize_model(inner().eval())
    x = torch.randn(2, 32)
    with torch.no_grad():
        expected = model(x)
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_traced_graphs(tmp_path):
    model = optimize_model(torch.fx.symbolic_trace(inner()).eval())
    x = torch.randn(2, 32)
    same_as_dequantized(model, x)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    model.save_low_bit(tmp_path)
    assert torch.equal(ipex_llm.load_low_bit(inner().eval(), tmp_path)(x), model(x))


def test_compiling_attention_and_experts():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    attention = optimize_model(nn.ModuleList([nn.MultiheadAttention(64, 4, batch_first=True)]))[0]
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        compiled = torch.compile(attention.eval(), backend="eager", fullgraph=True)
        assert_close(compiled(x, x, x), attention(x, x, x))
    config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)
    config._experts_implementation = "batched_mm"
    experts = MixtralExperts(config).eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    experts = optimize_model(nn.ModuleList([experts]))[0]
    chosen, weights = torch.tensor([[0, 2], [3, 1]]), torch.full((2, 2), 0.5)
    with exact():
        compiled = torch.compile(experts, backend="eager", fullgraph=True)
        expected = experts(torch.ones(2, 64), chosen, weights)
        assert_close(compiled(torch.ones(2, 64), chosen, weights), expected, layers=4)


def test_data_parallel(tmp_path):
    model = nn.DataParallel(inner().eval())
    optimize_model(model)
    same_as_dequantized(model, torch.randn(2, 32))
    model.save_low_bit(tmp_path)
    loaded = ipex_llm.load_low_bit(inner().eval(), tmp_path)  # saved without the wrapper's prefix
    x = torch.randn(2, 32)
    assert torch.equal(loaded(x), model(x))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_wrappers(one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(inner().eval())
    optimize_model(model)
    with torch.no_grad():
        assert model(torch.randn(2, 32)).shape == (2, 8)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(inner(), mesh=mesh)
    with pytest.raises(ValueError, match=r"FSDP.*optimize the model first"):
        optimize_model(sharded)
    assert not packed(sharded)


def test_accelerate_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model = inner().eval()
    for layer in model:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
    optimize_model(model)
    same_as_dequantized(copy.deepcopy(model), torch.randn(2, 32))


# ---- adapters ----------------------------------------------------------


def lora(model, **kwargs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **kwargs)
    return peft.get_peft_model(model, config)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


TARGETS = {"target_modules": ["up", "down"]}


def test_a_model_with_adapters_keeps_them_float():
    model = lora(Small(), **TARGETS)
    optimize_model(model)
    names = packed(model)
    assert len(names) == 2
    assert all("base_layer" in name for name in names)
    entry = next(e for e in plan(model) if "lora_A" in e.name)
    assert "PEFT" in entry.reason
    x = torch.randn(4, 32)
    model(x).square().sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients)


def test_adapters_on_an_optimized_model_train():
    model = lora(optimize_model(Small()), **TARGETS)
    x, target = torch.randn(16, 32), torch.randn(16, 32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("low_bit", ["sym_int8", "nf4", "bf16"])
def test_merging_adapters(low_bit):
    model = lora(optimize_model(Small(), low_bit), **TARGETS).eval()
    x = torch.randn(4, 32)
    floats = dequantized(model).merge_and_unload()
    merged = ipex_llm.merge_adapters(model)
    assert type(merged).__name__ == "Small"
    assert packed(merged) == {"up.weight", "down.weight"}
    assert {p.low_bit for p in merged.parameters() if isinstance(p, LowBitTensor)} == {low_bit}
    # The merged weights are what packing the exactly merged float weights gives, once.
    for name in ("up", "down"):
        expected = LowBitTensor.quantize(getattr(floats, name).weight.detach(), low_bit)
        assert torch.equal(getattr(merged, name).weight.packed, expected.packed)
    with torch.no_grad():
        assert (merged(x) - floats(x)).norm() < 0.2 * floats(x).norm()


def test_merging_small_adapters_warns_before_they_are_lost():
    """What an adapter adds is often smaller than half a step of four bits: packed anew in the same
    type, the trained model said what it had said before training, without a word."""

    def trained():
        torch.manual_seed(3)
        model = lora(optimize_model(Small()), **TARGETS).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.01)
        return model

    x = torch.randn(4, 32)
    with torch.no_grad():
        want = trained()(x)
        with pytest.warns(UserWarning, match=r"sym_int4 keeps 0% .*median of 2 weights.*low_bit="):
            ipex_llm.merge_adapters(trained())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = ipex_llm.merge_adapters(trained(), low_bit="bf16")
        assert {p.low_bit for p in merged.parameters() if isinstance(p, LowBitTensor)} == {"bf16"}
        assert (merged(x) - want).norm() < 0.02 * want.norm()


def test_merging_an_adapted_conv1d_keeps_its_layout():
    from transformers.pytorch_utils import Conv1D

    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = Conv1D(96, 32)

        def forward(self, x):
            return self.c_attn(x)

    model = lora(optimize_model(Old()), target_modules=["c_attn"], fan_in_fan_out=True)
    merged = ipex_llm.merge_adapters(model)
    assert merged.c_attn.weight.transposed
    same_as_dequantized(merged, torch.randn(2, 32))


def test_merge_adapters_wants_a_model_with_adapters():
    with pytest.raises(TypeError, match="PEFT"):
        ipex_llm.merge_adapters(Small())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ipex_llm.merge_adapters("model")


# ---- and back ----------------------------------------------------------


def test_dequantize_gives_an_ordinary_model():
    model = inner()
    hook = model[0].register_forward_hook(lambda *a: None)
    names = list(model.state_dict())
    optimize_model(model.half(), lightweight_bmm=True)
    rounded = model[0].weight.dequantize()
    assert ipex_llm.dequantize(model) is model
    assert type(model) is nn.Sequential and type(model[0]) is nn.Linear
    assert list(model.state_dict()) == names
    assert type(model[0].weight) is nn.Parameter and model[0].weight.dtype == torch.float16
    assert torch.equal(model[0].weight, rounded)
    assert len(model[0]._forward_hooks) == 1
    hook.remove()
    assert not hasattr(model, "save_low_bit")
    torch.save(model, io.BytesIO())
    optimize_model(model, "nf4")  # and may be optimized again
    assert model[0].weight.low_bit == "nf4"


def test_dequantize_keeps_ties_and_takes_a_dtype():
    embed, head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
    head.weight = embed.weight
    model = optimize_model(nn.ModuleList([embed, head]))
    ipex_llm.dequantize(model, torch.bfloat16)
    assert embed.weight is head.weight
    assert embed.weight.dtype == torch.bfloat16
    assert type(embed) is nn.Embedding


def test_dequantize_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="dequantize"):
        ipex_llm.dequantize({})
