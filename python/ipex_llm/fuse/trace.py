"""What flows through a module: a float32 shadow of it, run once with everything recorded.

A shadow shares packed bytes and settings with the module but has its own parameters (in float32),
hooks and flags, so that a probe changes nothing. Float32 because in bfloat16 a rotation that is off
by one position hides in the rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ipex_llm.precision import PRECISIONS, current
from ipex_llm.tensor import LowBitTensor

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def shadow(
    module: nn.Module, dtype: torch.dtype | None = torch.float32, keep: type | None = None
) -> nn.Module:
    """A copy of the module tree in `dtype` (None: as it is) and in eval mode; bytes are shared.

    Modules of the class `keep` keep their dtype.
    """
    return _shadow(module, dtype, keep, {})


def _shadow(
    module: nn.Module,
    dtype: torch.dtype | None,
    keep: type | None,
    memo: dict[int, nn.Module],
) -> nn.Module:
    if keep is not None and isinstance(module, keep):
        dtype = None
    if id(module) in memo:
        return memo[id(module)]
    copied = module.__class__.__new__(module.__class__)
    memo[id(module)] = copied
    copied.__dict__.update(module.__dict__)
    for name in (*_HOOKS, *_HOOK_FLAGS):
        if name in copied.__dict__:
            copied.__dict__[name] = OrderedDict()
    copied.__dict__["training"] = False
    copied.__dict__["_parameters"] = {
        name: None if p is None else _cast(p, dtype) for name, p in module._parameters.items()
    }
    copied.__dict__["_buffers"] = {
        name: None if b is None else _cast(b, dtype) for name, b in module._buffers.items()
    }
    copied.__dict__["_modules"] = {
        name: None if m is None else _shadow(m, dtype, keep, memo)
        for name, m in module._modules.items()
    }
    return copied


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if isinstance(tensor, LowBitTensor):
        result = tensor._like(tensor.packed, dtype=dtype or tensor.dtype)
        result._is_param = True
        return result
    value = tensor.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


@contextlib.contextmanager
def undisturbed(precision: str | None = "fp32"):
    """Inside, no gradients, exact products, and the random state of before comes back after."""
    rng = torch.get_rng_state()
    before = current.precision
    if precision is not None:
        current.precision = PRECISIONS.index(precision)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        current.precision = before
        torch.set_rng_state(rng)


_SMALL_BUFFER = 1 << 18  # elements: masks and tables of positions, not activations kept somewhere


@contextlib.contextmanager
def preserved(model: nn.Module):
    """Puts attributes, submodules, buffers and hooks of all modules back as they were before.

    A forward may store what it saw, stretch its position tables, exchange modules for good because
    an input was short, or install hooks and note that it did: transformers' models do where hidden
    states are asked for, and would install them twice if only the note went.
    """
    before = []
    for module in model.modules():
        inner = {
            name: dict(value)
            for name, value in module.__dict__.items()
            if name in ("_modules", "_buffers") or ("_hooks" in name and isinstance(value, dict))
        }
        values = [
            (b, b.clone())
            for b in module._buffers.values()
            if b is not None and b.numel() <= _SMALL_BUFFER and not b.is_sparse
        ]
        before.append((module, dict(module.__dict__), inner, values))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attributes, inner, values in before:
                for name in module.__dict__.keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                for name, entries in inner.items():
                    module.__dict__[name].clear()
                    module.__dict__[name].update(entries)
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Float tensors inside tuples and dicts in `dtype`; caches and the like stay."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(converted(v, dtype) for v in value)
    if type(value) is dict:
        return {k: converted(v, dtype) for k, v in value.items()}
    return value


@dataclass
class Seen:
    """One call of a module: its first tensor argument and its first tensor result."""

    name: str
    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor
    is_leaf: bool


@dataclass
class Attended:
    """One call of scaled_dot_product_attention, or of the products that compute the same."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scale: float
    output: torch.Tensor
    softcap: float = 0.0
    sinks: torch.Tensor | None = None  # [heads], a parameter
    bias: torch.Tensor | None = None  # added to the scores, an argument


@dataclass
class Product:
    """One batched product of two tensors that are not weights."""

    a: torch.Tensor
    b: torch.Tensor
    output: torch.Tensor


@dataclass
class Softmax:
    """One call of softmax."""

    input: torch.Tensor
    output: torch.Tensor


@dataclass
class Clamped:
    """One call of clamp, or of what may be one: None for bounds that are no numbers."""

    input: torch.Tensor
    output: torch.Tensor
    bounds: tuple[float, float] | None


@dataclass
class Record:
    """What one run of a shadow showed, in the order of the calls."""

    calls: list[Seen] = field(default_factory=list)
    attention: list[Attended] = field(default_factory=list)
    # Products and softmaxes in their order, for attention written out.
    steps: list[Product | Softmax] = field(default_factory=list)
    clamps: list[Clamped] = field(default_factory=list)
    module: nn.Module | None = None
    result: Any = None

    def of(self, name: str) -> list[Seen]:
        return [call for call in self.calls if call.name == name]


_PRODUCTS = frozenset(
    (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
)
_SUMS_OF_PRODUCTS = frozenset((torch.baddbmm, torch.Tensor.baddbmm))
_SOFTMAXES = frozenset((F.softmax, torch.softmax, torch.Tensor.softmax))


_CLAMPS = frozenset((torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip))
_LOWER = frozenset((torch.clamp_min, torch.Tensor.clamp_min))
_UPPER = frozenset((torch.clamp_max, torch.Tensor.clamp_max))
_OTHER_CLAMPS = frozenset((F.hardtanh, F.relu6))


def _bounds(func, low=None, high=None, **named) -> tuple[float, float] | None:
    if func in _UPPER:
        low, high = None, low
    low, high = named.get("min", low), named.get("max", high)
    if func in _OTHER_CLAMPS or any(type(v) not in (int, float, type(None)) for v in (low, high)):
        return None
    return (-math.inf if low is None else low, math.inf if high is None else high)


class _AttentionMode(TorchFunctionMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._note(result, *args, **kwargs)
        elif func in _CLAMPS or func in _LOWER or func in _UPPER or func in _OTHER_CLAMPS:
            self._note_clamp(func, result, *args, **kwargs)
        elif func in _SOFTMAXES:
            self.record.steps.append(Softmax(args[0] if args else kwargs["input"], result))
        elif func in _PRODUCTS and len(args) == 2:
            self._note_product(*args, result)
        elif func in _SUMS_OF_PRODUCTS:
            factors = args[1:] if len(args) == 3 else (kwargs["batch1"], kwargs["batch2"])
            self._note_product(*factors, result)
        return result

    def _note_clamp(self, func, output, input=None, *bounds, **named) -> None:
        if isinstance(input, torch.Tensor) and input.is_floating_point():
            self.record.clamps.append(Clamped(input, output, _bounds(func, *bounds, **named)))

    def _note_product(self, a, b, output) -> None:
        if a.dim() >= 3 and b.dim() >= 3 and type(b) is torch.Tensor:
            self.record.steps.append(Product(a, b, output))

    def _note(
        self,
        output,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        if scale is None:
            scale = query.shape[-1] ** -0.5
        self.record.attention.append(
            Attended(query, key, value, attn_mask, is_causal, float(scale), output)
        )


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that `value` is or begins with; None if that is none."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)) and value:
        return first_tensor(value[0])
    return None


def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Record:
    """Runs a shadow with its modules and attention calls recorded."""
    seen = Record(module=module)
    handles = []

    def note(name: str):
        def hook(inner, inputs, inner_kwargs, output):
            tensor = first_tensor(inputs)
            if tensor is None:
                floats = (first_tensor(v) for v in inner_kwargs.values())
                tensor = next((t for t in floats if t is not None and t.is_floating_point()), None)
            result = first_tensor(output)
            if tensor is not None and result is not None:
                leaf = not inner._modules
                seen.calls.append(Seen(name, inner, tensor, result, leaf))

        return hook

    try:
        for name, inner in module.named_modules():
            handles.append(inner.register_forward_hook(note(name), with_kwargs=True))
        with _AttentionMode(seen):
            seen.result = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
