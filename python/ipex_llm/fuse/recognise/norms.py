"""Norms: which one a module is, and which read or made a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from ipex_llm.fuse.describe import Norm
from ipex_llm.fuse.recognise.match import equal, same
from ipex_llm.fuse.trace import Record, Seen
from ipex_llm.tensor import LowBitTensor


def norm_of(call: Seen, width: int) -> Norm | None:
    """The norm that a module is, found by trying; None if it is none of them."""
    module = call.module
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    for p in (weight, bias):
        if p is not None and (isinstance(p, LowBitTensor) or tuple(p.shape) != (width,)):
            return None
    if any(p is not None for n, p in module._parameters.items() if n not in ("weight", "bias")):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, width), generator=generator, dtype=torch.float32)
    # Small rows, where eps decides, a large one, and one far from zero mean.
    x = x * torch.tensor([[1.0], [1e-3], [50.0], [1.0]]) + torch.tensor([[0.0], [0], [0], [3.0]])
    x = x.reshape(1, 4, width)
    try:
        expected = module(x)
    except Exception:
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    guesses = [
        float(value)
        for value in module.__dict__.values()
        if isinstance(value, float) and 0 <= value < 0.1
    ]
    for eps in dict.fromkeys((*guesses, 1e-6, 1e-5, 1e-12, 1e-8, torch.finfo(torch.float32).eps)):
        for kind in ("rms", "layer"):
            centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
            base = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                value = base if weight is None else base * (weight + offset)
                value = value if bias is None else value + bias
                # Row by row: the large row must not excuse the small one.
                if all(equal(value[0, i], expected[0, i], 2e-5) for i in range(4)):
                    return Norm(kind, call.name, eps, offset)
    return None


def find_norm(record: Record, output: torch.Tensor) -> tuple[Norm, torch.Tensor] | None:
    """The norm whose output `output` is, with its input."""
    for call in record.calls:
        if call.is_leaf and call.output.shape[-1] == call.input.shape[-1]:
            if call.output is output or same(call.output, output):
                norm = norm_of(call, call.input.shape[-1])
                if norm is not None:
                    return norm, call.input
    return None


def readings(record: Record, source: torch.Tensor) -> Iterator[tuple[Norm, torch.Tensor]]:
    """A tensor as it is, and through every norm that reads it."""
    yield Norm(), source
    for call in record.calls:
        if call.is_leaf and call.input.shape == source.shape and same(call.input, source):
            norm = norm_of(call, source.shape[-1])
            if norm is not None:
                yield norm, call.output


def ways(record: Record, source: torch.Tensor) -> Iterator[tuple[Norm, torch.Tensor]]:
    """A tensor as it is, and through the first norm that reads it."""
    return islice(readings(record, source), 2)
