"""Comparing tensors of a record, and which calls of it are of interest."""

from __future__ import annotations

import torch
from torch import nn

from ipex_llm.fuse.trace import Record, Seen
from ipex_llm.tensor import LowBitTensor

# Relative to the largest value: float32 sums in another order, and products with activations
# rounded to 15 bits.
TOLERANCE = 2e-4


class Unrecognised(Exception):
    """Why a module is left as it is; the text ends up in the report."""


def equal(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether shapes are equal and values are, up to `tolerance` of the largest of `b`."""
    if a.shape != b.shape or a.numel() == 0:
        return False
    a, b = a.float(), b.float()
    limit = tolerance * max(float(b.abs().max()), 1e-6)
    return bool((a - b).abs().max() <= limit)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One tensor, perhaps under two views, or equal numbers."""
    if a is b:
        return True
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    return equal(a.reshape(b.shape), b, 1e-6)


def linears(record: Record) -> list[Seen]:
    """The calls of modules that multiply by a packed matrix [outputs, inputs], in order."""
    return [
        call
        for call in record.calls
        if isinstance(call.module._parameters.get("weight"), LowBitTensor)
        and len(call.module._parameters["weight"].stored_shape) == 2
        and call.input.shape[-1] == call.module._parameters["weight"].stored_shape[1]
        and call.output.shape[-1] == call.module._parameters["weight"].stored_shape[0]
        and not isinstance(call.module, nn.Embedding)
    ]


def with_matrices(record: Record) -> set[str]:
    """Names of the modules that were called and hold a matrix, low-bit or not."""
    return {
        call.name
        for call in record.calls
        if call.name
        and any(p is not None and p.dim() > 1 for p in call.module._parameters.values())
    }


def first_result(record: Record) -> torch.Tensor:
    """The tensor that the module returned, or the first of its tuple; Unrecognised without one."""
    result = record.result
    while isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, torch.Tensor):
        raise Unrecognised("the module returns no tensor")
    return result


def factor_of(total: torch.Tensor, base: torch.Tensor, update: torch.Tensor) -> float | None:
    """a in total = base + a * update, or None."""
    difference = (total - base).double().flatten()
    direction = update.double().flatten()
    square = float(direction @ direction)
    if square == 0:
        return None
    a = float(direction @ difference) / square
    if abs(a - 1) < 1e-4:
        a = 1.0
    # Relative to what is added: the residual stream may be much larger.
    limit = 1e-3 * max(float((a * update).abs().max()), 1e-6) + 1e-6 * float(total.abs().max())
    if float((base + a * update - total).abs().max()) > limit:
        return None
    return a


def flat(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """[1, tokens, everything else]"""
    return tensor.reshape(1, tokens, -1)
