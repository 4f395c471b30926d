"""Conversions and copies: they move bytes, rename the dtype, or refuse."""

from collections.abc import Iterable

import torch

from ipex_llm.tensor import CANNOT_REQUIRE_GRAD, LowBitTensor

from .dense import changes_in_place, fallback
from .register import function, named

Tensor = torch.Tensor
_no_function = torch._C.DisableTorchFunctionSubclass


@function(
    Tensor.to,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.float,
    Tensor.double,
    Tensor.type,
    Tensor.type_as,
)
@function(Tensor.cpu, Tensor.cuda, Tensor.xpu)
def _f_to(func, args, kwargs):
    if len(args) == 2 and not kwargs and args[1] is args[0].dtype:
        return args[0]  # w.to(x.dtype), as whisper does at every call
    w, *rest = args
    if not isinstance(w, LowBitTensor):  # x.to(w), x.type_as(w): only the dtype and device matter
        plain = [_probe(a, ()) if isinstance(a, LowBitTensor) else a for a in rest]
        return func(
            w,
            *plain,
            **{k: _probe(v, ()) if isinstance(v, LowBitTensor) else v for k, v in kwargs.items()},
        )
    # An empty tensor learns what dtype and device the call means.
    rest = [_probe(a, ()) if isinstance(a, LowBitTensor) else a for a in rest]
    kwargs = {k: _probe(v, ()) if isinstance(v, LowBitTensor) else v for k, v in kwargs.items()}
    probe = func(_probe(w, (0,) * len(w.shape)), *rest, **kwargs)
    if not isinstance(probe, Tensor):
        return probe  # w.type() is a text
    if not probe.is_floating_point():
        return fallback(func, args, kwargs)
    copied = kwargs.get("copy", False)
    if probe.dtype == w.dtype and probe.device == w.device and not copied:
        return w
    return w._converted(probe.dtype, probe.device, copy=copied)


def _probe(w: LowBitTensor, shape: Iterable[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=w.dtype, device=w.device)


@function(Tensor.clone, torch.clone)
def _f_clone(func, args, kwargs):
    return args[0]._like(args[0].packed.clone())


@function(Tensor.contiguous)
def _f_contiguous(func, args, kwargs):
    return args[0]


@function(Tensor.detach, torch.detach, Tensor.detach_, torch.detach_)
def _f_detach(func, args, kwargs):
    w = args[0]
    return w if func in (Tensor.detach_, torch.detach_) else w._like(w.packed)


@function(torch.empty_like)
def _f_empty_like(func, args, kwargs):
    w, *rest = args
    probe = func(_probe(w, (0,) * len(w.shape)), *rest, **kwargs)
    if not probe.is_floating_point() or probe.requires_grad:
        return fallback(func, args, kwargs)
    return w._like(torch.empty_like(w.packed, device=probe.device), dtype=probe.dtype)


@function(Tensor.pin_memory)
def _f_pin_memory(func, args, kwargs):
    w, *rest = args
    return w._like(w.packed.pin_memory(*rest, **kwargs))


@function(Tensor.requires_grad_)
def _f_requires_grad_(func, args, kwargs):
    w, flag = named(args, kwargs, ("self",), ("requires_grad",))
    if flag is None or flag:
        raise RuntimeError(CANNOT_REQUIRE_GRAD)
    return w


@function(Tensor.requires_grad.__set__)
def _f_requires_grad_set(func, args, kwargs):
    if args[1]:
        raise RuntimeError(CANNOT_REQUIRE_GRAD)


@function(Tensor.data.__set__)
def _f_data_set(func, args, kwargs):
    w, value = args
    if not isinstance(w, LowBitTensor):
        with _no_function(), torch.no_grad():
            func(w, value.dequantize())
        return
    if not isinstance(value, LowBitTensor):
        raise changes_in_place(".data =")
    if value.shape != w.shape:
        raise ValueError(
            f".data = of a low-bit weight of shape {tuple(w.shape)} got one of {tuple(value.shape)}"
        )
    w._become(value)


@function(Tensor.copy_)
def _f_copy_(func, args, kwargs):
    target, source = named(args, kwargs, ("self",), ("src", "other"))
    return copy_into(target, source)


def copy_into(target: Tensor, source: Tensor) -> Tensor:
    if not isinstance(target, LowBitTensor):
        return target.copy_(source.dequantize(target.dtype if target.is_floating_point() else None))
    if target.packed.is_meta:
        return target  # as with plain tensors: a meta tensor takes no values
    if not isinstance(source, LowBitTensor):
        raise changes_in_place("copy_")
    ours = (
        target.low_bit,
        target.group_size,
        target.stored_shape,
        target.transposed,
        tuple(target.shape),
    )
    theirs = (
        source.low_bit,
        source.group_size,
        source.stored_shape,
        source.transposed,
        tuple(source.shape),
    )
    if ours != theirs:
        raise ValueError(
            "copy_: a low-bit weight takes the bytes of one packed alike; expected (low_bit, "
            f"group_size, stored shape, transposed, shape) {ours}, got {theirs}"
        )
    with torch.no_grad():
        target.packed.copy_(source._moved(target.packed.device))
    target.exponent = source.exponent
    target.numbers = source.numbers
    return target
