"""Functions that an MLP or a gate may apply."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from ipex_llm.fuse.describe import Gating
from ipex_llm.fuse.recognise.match import equal
from ipex_llm.fuse.trace import Record, Seen


def _relu2(x):
    return F.relu(x).square()


ACTIVATION_FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "identity": lambda x: x,
}


def numbers_in(record: Record) -> list[float]:
    """Settings of the modules that may be a factor inside an activation, or bounds."""
    modules = {id(c.module): c.module for c in record.calls}
    if record.module is not None:
        modules[id(record.module)] = record.module
    return numbers_of(modules.values())


def numbers_of(modules: Iterable[nn.Module]) -> list[float]:
    """Floats among the attributes of modules that may be the parameter of an activation."""
    values = (v for module in modules for v in module.__dict__.values())
    return [*dict.fromkeys(v for v in values if type(v) is float and 0.1 <= v <= 1000)]


def activations(numbers: Iterable[float]):
    """(name, alpha, function)"""
    for name, function in ACTIVATION_FUNCTIONS.items():
        yield name, 1.0, function
    for alpha in numbers:
        yield "swish", alpha, lambda x, alpha=alpha: x * torch.sigmoid(alpha * x)


def xielu(record: Record, call: Seen) -> Gating | None:
    """An activation with two parameters: a parabola above zero, an exponential below."""
    owned = [n for n, p in call.module._parameters.items() if p is not None]
    if len(owned) != 2 or any(call.module._parameters[n].numel() != 1 for n in owned):
        return None
    settings = [b for b in call.module._buffers.values() if b is not None and b.numel() == 1]
    prefix = f"{call.name}." if call.name else ""
    x = call.input
    for beta in dict.fromkeys(float(b) for b in settings):
        for names in (owned, owned[::-1]):
            a, b = (F.softplus(call.module._parameters[n].float()) for n in names)
            below = (torch.expm1(x.clamp(max=0)) - x) * (b + beta)
            if equal(torch.where(x > 0, a * x * x, below) + beta * x, call.output):
                return Gating(positive=prefix + names[0], negative=prefix + names[1], beta=beta)
    return None
