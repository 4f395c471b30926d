"""Modules that own low-bit weights: conversion, ties, loading, copies, and what wraps modules."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor, set_activation_precision
from ipex_llm.methods import Optimized
from ipex_llm.owners import LowBitOwner, install, original_class, swap_class
from ipex_llm.tensor import lowbit_parameters


@pytest.fixture(autouse=True)
def exact():
    torch.manual_seed(0)
    with set_activation_precision("fp32"):
        yield


def convert(model: nn.Module, low_bit: str = "sym_int4") -> nn.Module:
    """Every Linear and Embedding of a tree; one tensor for weights that are tied."""
    done: dict[int, LowBitTensor] = {}
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            if id(weight) not in done:
                done[id(weight)] = LowBitTensor.quantize(weight, low_bit)
            install(module, "weight", done[id(weight)])
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """The same module tree with the dequantized weights in plain modules."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, p in list(module._parameters.items()):
            if isinstance(p, LowBitTensor):
                module._parameters[name] = nn.Parameter(p.dequantize(), requires_grad=False)
    return twin


class Whispering(nn.Linear):
    """whisper's subclass: a forward of its own, through F.linear."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Inheriting(nn.Linear):
    """A subclass with nn.Linear's forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = "kept"


class Tied(nn.Module):
    def __init__(self, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.inner = Inheriting(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 48, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(torch.relu(self.inner(self.embed(ids)))))


IDS = torch.arange(12).view(2, 6) % 48


def close(ours, dense, tolerance=5e-3):
    assert ours.dtype == dense.dtype
    torch.testing.assert_close(ours.float(), dense.float(), rtol=tolerance, atol=tolerance)


# ---- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.Linear, Inheriting, Whispering])
@pytest.mark.parametrize("bias", [True, False])
def test_install(cls, bias):
    layer = cls(64, 48, bias=bias)
    reference = layer.weight.detach().clone()
    weight = LowBitTensor.quantize(layer.weight, "sym_int8")
    assert install(layer, "weight", weight) is weight
    assert isinstance(layer, cls) and type(layer).__name__ == cls.__name__
    assert type(layer).__module__ == cls.__module__
    assert original_class(layer) is cls
    assert layer.weight is weight and isinstance(layer.weight, nn.Parameter)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][: 1 + bias]
    assert "low_bit=sym_int8" in repr(layer)
    assert layer.in_features == 64
    x = torch.randn(3, 64)
    close(layer(x), F.linear(x, weight.dequantize(), layer.bias))
    assert (weight.dequantize() - reference).abs().max() < 0.01
    assert sum(p.numel() for p in layer.parameters()) == 64 * 48 + 48 * bias


def test_own_forward_is_kept():
    layer = convert(Whispering(64, 48))
    assert type(layer).forward is Whispering.forward
    x = torch.ones(1, 64).bfloat16()
    close(layer(x), dense_twin(layer)(x), 0.05)
    assert type(convert(Inheriting(64, 48))).forward is not nn.Linear.forward


class Registered(nn.Linear):
    known: ClassVar[dict] = {}

    def __init_subclass__(cls, **kwargs):
        Registered.known[cls.__name__] = cls


class Final(nn.Linear):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("must not be subclassed")


class Projection(Registered):
    pass


def test_classes_that_keep_track_of_their_subclasses_see_none_of_ours():
    model = nn.Sequential(Projection(64, 64), Final(64, 64))
    ipex_llm.optimize_model(model)
    assert Registered.known == {"Projection": Projection}
    assert all(isinstance(layer.weight, LowBitTensor) for layer in model)
    assert isinstance(model[1], Final) and type(model[1]).__name__ == "Final"
    copied = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 64)
    assert torch.equal(copied(x), model(x))
    ipex_llm.dequantize(model)
    assert type(model[0]) is Projection


def test_swapping_is_repeatable():
    class First:
        pass

    class Second:
        pass

    layer = nn.Linear(4, 4)
    swap_class(layer, First)
    swap_class(layer, Second)
    cls = type(layer)
    assert cls.__mro__[1:4] == (Second, First, nn.Linear)
    assert swap_class(layer, First, Second) is layer
    assert type(layer) is cls
    assert original_class(layer) is nn.Linear
    other = swap_class(swap_class(nn.Linear(4, 4), First), Second)
    assert type(other) is cls  # one class per combination
    install(layer, "weight", LowBitTensor.quantize(torch.randn(32, 32), "nf4"))
    assert isinstance(layer, (First, Second)) and isinstance(layer, LowBitOwner)


def test_hooks_modes_and_attributes_survive():
    layer = nn.Linear(64, 48)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append("hook"))
    layer.register_forward_pre_hook(lambda *args: calls.append("pre"))
    layer.eval()
    convert(layer)
    layer(torch.randn(1, 64))
    assert calls == ["pre", "hook"]
    assert not layer.training
    assert layer.train().training
    layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match="LoRA"):
        layer.requires_grad_(True)


def test_training_the_bias():
    layer = convert(nn.Linear(64, 48))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.bias.detach().clone()
    layer(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer.zero_grad()
    assert torch.allclose(layer.bias, before - 0.4)


def test_other_dtypes_of_activations():
    layer = convert(nn.Linear(64, 48))
    twin = dense_twin(layer)
    for dtype in (torch.float16, torch.bfloat16):
        # Permissive where torch insists on equal dtypes: the result has the dtype of x.
        close(layer(torch.ones(2, 64).to(dtype)), twin(torch.ones(2, 64)).to(dtype), 0.02)
    close(layer.double()(torch.ones(2, 64).double()), twin.double()(torch.ones(2, 64).double()))
    with pytest.raises(TypeError, match="float"):
        layer(torch.ones(2, 64).long())
    with pytest.raises(ValueError, match="last dimension of x must be 64"):
        layer(torch.ones(2, 63))


# ---- .to() and its family ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_with_a_live_graph_weak_references_and_ties(dtype):
    model = convert(Tied())
    weight = model.embed.weight
    model.requires_grad_(False)
    references = [weakref.ref(p) for p in model.parameters()]
    x = torch.randn(2, 64, requires_grad=True)
    loss = model.inner(x).sum()
    assert model.to(dtype) is model
    assert model.embed.weight is model.head.weight is weight
    assert all(reference() is not None for reference in references)
    assert {p.dtype for p in model.parameters()} == {dtype}
    loss.backward()  # the graph holds packed bytes, which have not moved
    torch.testing.assert_close(
        x.grad, model.inner.weight.dequantize(torch.float32).sum(0).expand(2, 64)
    )
    # Outputs reach 20, and three layers round them to the dtype in different places.
    close(model(IDS), dense_twin(model)(IDS), 20 * 4 * max(torch.finfo(dtype).eps, 2.0**-14))
    assert model.float().head.weight.dtype == torch.float32
    assert len(list(model.parameters())) == 5


def test_meta_and_back_keeps_ties():
    model = convert(Tied())
    weight = model.head.weight
    model.to("meta")
    assert model.head.weight is model.embed.weight
    assert model.head.weight.is_meta and isinstance(model.head.weight, nn.Parameter)
    assert not weight.is_meta
    assert model(IDS.to("meta")).shape == (2, 6, 48)
    model.to_empty(device="cpu")
    assert model.head.weight is model.embed.weight
    assert not model.head.weight.is_meta
    assert model.head.weight.low_bit == "sym_int4"
    again = convert(Tied())
    model.load_state_dict(again.state_dict())
    close(model(IDS), again(IDS), 0)


def test_conversion_to_what_it_cannot_be():
    layer = convert(nn.Linear(64, 48))
    with pytest.raises(TypeError, match="float32, float16, bfloat16 or float64"):
        layer.to(torch.float8_e4m3fn)
    assert layer.bias.dtype == torch.float32  # nothing half done
    with pytest.raises(TypeError, match="float32, float16, bfloat16 or float64"):
        layer.type(torch.int32)
    assert isinstance(layer.weight, LowBitTensor)


def test_share_memory_of_a_module():
    model = convert(Tied())
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    close(model(IDS), dense_twin(model)(IDS))


def test_inference_mode():
    model = Tied()
    with torch.inference_mode():
        convert(model).bfloat16()
        inside = model(IDS)
        copied = copy.deepcopy(model)
    for own in (model, copied):
        assert not own.inner.weight.packed.is_inference()
    with torch.no_grad():
        assert torch.equal(model(IDS), inside)
    # Norms and biases are inference tensors now, as in plain torch; the weights are not.
    x = torch.randn(2, 64, requires_grad=True)
    F.linear(x, model.inner.weight).sum().backward()


# ---- copies --------------------------------------------------------------------------------------


def _through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def _through_torch_save(value, weights_only=False):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        _through_pickle,
        _through_torch_save,
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_modules(way):
    model = swap_class(convert(Tied()), Optimized)
    copied = way(model)
    assert type(copied) is type(model)
    assert type(copied.inner) is type(model.inner)
    assert copied.inner.extra == "kept"
    assert copied.head.weight is copied.embed.weight
    assert copied.head.weight is not model.head.weight
    assert torch.equal(copied(IDS), model(IDS))
    # Independent of the original.
    copied.bfloat16()
    assert model.head.weight.dtype == torch.float32


def test_state_dict():
    model = convert(Tied())
    keys = list(Tied().state_dict())
    state = model.state_dict()
    assert list(state) == keys
    assert isinstance(state["head.weight"], LowBitTensor)
    assert state["head.weight"].packed.data_ptr() == model.head.weight.packed.data_ptr()
    loaded = _through_torch_save(state, weights_only=True)
    for assign in (False, True):
        other = convert(Tied(), "sym_int4")
        assert other.load_state_dict(loaded, assign=assign).missing_keys == []
        assert torch.equal(other(IDS), model(IDS))
        assert isinstance(other.inner.weight, LowBitTensor)


def test_float_values_into_a_low_bit_model_are_refused():
    model = convert(Tied())
    before = [(p, p.packed.clone()) for _, p in lowbit_parameters(model)]
    floats = Tied().state_dict()
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="expected a low-bit weight") as raised:
            model.load_state_dict(floats, assign=assign)
        assert "load_low_bit" in str(raised.value) and '"inner.weight"' in str(raised.value)
        assert "Missing" not in str(raised.value) and "Unexpected" not in str(raised.value)
        with pytest.raises(RuntimeError, match="expected a low-bit weight"):
            model.load_state_dict(floats, strict=False, assign=assign)
    model.norm.load_state_dict(nn.LayerNorm(64).state_dict())
    for (_, p), (was, packed) in zip(lowbit_parameters(model), before, strict=True):
        assert p is was and torch.equal(p.packed, packed)


def test_other_low_bit_values_are_refused():
    model = convert(Tied())
    with pytest.raises(RuntimeError, match="packed alike"):
        model.load_state_dict(convert(Tied(), "nf4").state_dict())


def test_low_bit_values_into_a_float_model_dequantize():
    model = convert(Tied())
    plain = Tied()
    plain.load_state_dict(model.state_dict())
    assert type(plain.inner.weight) is nn.Parameter
    assert torch.equal(plain.inner.weight, model.inner.weight.dequantize())
    close(plain(IDS), model(IDS))


def test_partial_state_dicts():
    model = convert(Tied(tie=False))
    state = model.state_dict()
    del state["inner.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*inner\.weight"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["inner.weight"]


# ---- what wraps modules and parameters -----------------------------------------------------------


def test_functional_call_with_floats():
    layer = convert(nn.Linear(64, 48))
    x = torch.randn(2, 64)
    dense = {"weight": torch.randn(48, 64), "bias": torch.zeros(48)}
    close(torch.func.functional_call(layer, dense, (x,)), x @ dense["weight"].T)
    other = {"weight": LowBitTensor.quantize(dense["weight"], "bf16")}
    ours = torch.func.functional_call(layer, other, (x,))
    close(ours, F.linear(x, dense["weight"], layer.bias), 0.05)
    close(layer(x), dense_twin(layer)(x))


def test_float_weight_put_back():
    layer = convert(nn.Linear(64, 48))
    layer.weight = nn.Parameter(layer.weight.dequantize())
    x = torch.randn(2, 64)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert type(layer.half().weight) is nn.Parameter


def test_parametrizations():
    layer = convert(nn.Linear(64, 48))
    x = torch.randn(2, 64)

    class Doubled(nn.Module):
        def forward(self, w):
            return w * 2

    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    twin = layer.parametrizations.weight.original.dequantize() * 2
    close(layer(x), F.linear(x, twin, layer.bias))
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert isinstance(layer.weight, LowBitTensor)
    close(layer(x), F.linear(x, twin / 2, layer.bias))


def test_weight_norm_of_a_low_bit_weight():
    """Its parametrization makes a float magnitude, and keeps the low-bit weight for direction."""
    layer = convert(nn.Linear(64, 48))
    x = torch.randn(2, 64)
    expected = layer(x).detach()
    torch.nn.utils.parametrizations.weight_norm(layer)
    close(layer(x), expected)
    # The magnitude is as frozen as what it was made of, and trainable when asked.
    layer.parametrizations.weight.original0.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_symbolic_tracing():
    model = nn.Sequential(convert(nn.Linear(64, 48)), nn.ReLU())
    x = torch.randn(2, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_function_transforms_of_a_module():
    layer = convert(nn.Linear(64, 48))
    twin = dense_twin(layer)
    x = torch.randn(5, 64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(torch.vmap(transform(layer))(x), torch.vmap(transform(twin))(x))
    close(torch.func.hessian(lambda x: layer(x).square().sum())(x[0]), 2 * _gram(twin), 2e-2)


def _gram(layer):
    return layer.weight.T @ layer.weight


def test_distributed_data_parallel(tmp_path):
    """Its first broadcast would write float values into the weights; without it, it works."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = convert(nn.Linear(64, 48))
        with pytest.raises(RuntimeError, match="in place"):
            nn.parallel.DistributedDataParallel(layer)
        parallel = nn.parallel.DistributedDataParallel(layer, init_sync=False)
        parallel(torch.randn(2, 64)).sum().backward()
        assert layer.bias.grad is not None
    finally:
        distributed.destroy_process_group()


def test_multihead_attention():
    """The fast path and the slow one, with and without gradient: dense per call, and right."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    for owner, name in ((attention, "in_proj_weight"), (attention.out_proj, "weight")):
        install(owner, name, LowBitTensor.quantize(getattr(owner, name), "sym_int8"))
    twin = dense_twin(attention)
    x = torch.randn(2, 5, 64)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    for mode in (torch.no_grad, torch.enable_grad):
        for options in ({}, {"need_weights": False}, {"key_padding_mask": mask}):
            with mode():
                close(attention(x, x, x, **options)[0], twin(x, x, x, **options)[0])


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = convert(nn.TransformerEncoder(layer, 2).eval(), "sym_int8")
    twin = dense_twin(encoder)
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            close(encoder(x)[:, :3], twin(x)[:, :3])
            ours, dense = encoder(x, src_key_padding_mask=mask), twin(x, src_key_padding_mask=mask)
            close(ours[:, :3], dense[:, :3])


def test_checkpointing():
    model = convert(Tied())
    x = torch.randn(2, 6, 64, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(model.inner, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(model.inner(x).sum(), x)
    assert torch.equal(grad, expected)


def test_torchscript_is_refused_not_crashed():
    """torch.jit.save of a traced model used to end the process."""
    model = convert(Tied())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"torch\.export"):
            torch.jit.trace(model, (IDS,))
        with pytest.raises(RuntimeError, match=r"torch\.export"):
            torch.jit.script(model)


def test_freed_layer_by_layer():
    model = convert(Tied(tie=False))
    packed = [weakref.ref(p.packed) for _, p in lowbit_parameters(model)]
    model.inner = nn.Identity()
    gc.collect()
    assert [reference() is None for reference in packed] == [False, True, False]
    del model
    gc.collect()
    assert all(reference() is None for reference in packed)


def test_install_checks_its_weight():
    with pytest.raises(TypeError, match="LowBitTensor, got Parameter"):
        install(nn.Linear(4, 4), "weight", nn.Linear(4, 4).weight)


@pytest.mark.parametrize("low_bit", ["sym_int4", "nf3", "fp8", "bf16"])
def test_embedding_owner(low_bit):
    layer = nn.Embedding(50, 64, padding_idx=3)
    install(layer, "weight", LowBitTensor.quantize(layer.weight, low_bit))
    table = layer.weight.dequantize()
    for ids in (IDS, IDS.int(), torch.tensor(4), torch.empty(0, 3, dtype=torch.long)):
        assert torch.equal(layer(ids), table[ids.long()])
    assert layer.bfloat16()(IDS).dtype == torch.bfloat16
    with pytest.raises((ValueError, IndexError), match="50"):
        layer(torch.tensor([50]))
    layer.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        layer(IDS)


class Pooled(nn.Sequential):
    """Hands a method of its class to other processes, as sentence-transformers does."""

    @classmethod
    def work(cls, model, x):
        return model(x).detach()


def test_classes_of_optimized_models_pickle():
    """They went by the original's name and were refused: "it's not the same object"."""
    model = ipex_llm.optimize_model(Pooled(nn.Linear(64, 64)))
    x = torch.randn(2, 64)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps((type(model), type(model).work, model), protocol)
        cls, work, copied = pickle.loads(data)
        assert cls is type(model) is type(copied)
        assert torch.equal(work(copied, x), model(x))
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert torch.equal(pool.apply(type(model).work, (model, x)), model(x))
