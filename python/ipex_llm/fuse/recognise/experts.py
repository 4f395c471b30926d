"""Experts in two 3-D tensors."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from ipex_llm.fuse.describe import Description, Gating, Mlp
from ipex_llm.fuse.recognise.activations import activations, numbers_of
from ipex_llm.fuse.recognise.match import Unrecognised, equal
from ipex_llm.fuse.trace import Record
from ipex_llm.tensor import LowBitTensor


def expert_parameters(module: nn.Module) -> dict[str, LowBitTensor]:
    """3-D low-bit parameters that the module itself owns."""
    return {
        name: p
        for name, p in module._parameters.items()
        if isinstance(p, LowBitTensor) and len(p.stored_shape) == 3
    }


def find_experts(record: Record, arguments: dict, x: torch.Tensor) -> Description:
    """Experts in two 3-D tensors, chosen by two of the arguments: which, and how much of each."""
    module, result = record.module, record.result
    matrices = expert_parameters(module)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.dim() == 2}
    ids = [k for k, v in tensors.items() if v.dtype == torch.int64]
    if len(matrices) != 2 or len(ids) != 1 or x.dim() != 2:
        raise Unrecognised("experts of an unknown form")
    chosen = tensors[ids[0]]
    shares = [
        k
        for k, v in tensors.items()
        if v.shape == chosen.shape and v.is_floating_point() and v is not x
    ]
    if len(shares) != 1 or not isinstance(result, torch.Tensor) or result.shape != x.shape:
        raise Unrecognised("experts that are not chosen by an index and a weight")
    # Once more so loud that every clamp is reached.
    name = next(k for k, v in arguments.items() if v is x)
    loud = 300 * x
    rows = [(x[0], result[0].float()), (loud[0], module(**{**arguments, name: loud})[0].float())]
    hidden = x.shape[1]
    for first, last in (tuple(matrices), tuple(matrices)[::-1]):
        count, columns, inputs = matrices[first].stored_shape
        outputs, width = matrices[last].stored_shape[1:]
        if inputs != hidden or outputs != hidden or columns not in (width, 2 * width):
            continue
        biases = [_expert_bias(module, count, n) for n in (columns, outputs)]
        tried = _ChosenExperts(
            module, first, last, biases, chosen[0].tolist(), tensors[shares[0]][0].float()
        )
        found = tried.search(rows, width, columns == 2 * width, _limits(record, width))
        if found is None:
            continue
        gate, up, activation, gating = found
        mlp = Mlp([first], last, width, gate, up, activation, gating, residual=False)
        mlp.experts = count
        mlp.input_bias, mlp.output_bias = biases
        return Description(mlp=mlp, choice=(ids[0], shares[0]))
    raise Unrecognised("experts with an unknown activation, gate or bias")


def _limits(record: Record, width: int) -> list[tuple]:
    """Bounds that gate and counterpart may have: all that the module has, or none."""
    unlimited = (-math.inf, math.inf)
    found = {c.bounds for c in record.clamps if c.input.shape[-1] == width}
    if None in found:
        return []
    choices = {*found, unlimited}
    return [pair for pair in product(choices, choices) if found <= {*pair}]


def _expert_bias(module: nn.Module, count: int, columns: int) -> str:
    """The parameter with `columns` values for every expert; "" for none."""
    found = [
        name
        for name, p in module._parameters.items()
        if p is not None and not isinstance(p, LowBitTensor) and tuple(p.shape) == (count, columns)
    ]
    return found[0] if len(found) == 1 else ""


class _ChosenExperts:
    """The experts of one token: what they would give with this or that gate."""

    def __init__(self, module, first: str, last: str, biases, experts, shares) -> None:
        self.module, self.experts, self.shares = module, experts, shares
        self.first = [self._expert(first, biases[0], e) for e in experts]
        self.last = [self._expert(last, biases[1], e) for e in experts]

    def _expert(self, name: str, bias: str, expert: int):
        all_experts = self.module._parameters[name]
        weight = all_experts[expert].float()
        weight = weight.mT if all_experts.transposed else weight
        return weight, self.module._parameters[bias][expert].float() if bias else None

    def search(self, rows, width: int, gated: bool, limits):
        """(gate, up, activation, Gating) that explains all rows: (input, result)."""
        wide = [[F.linear(x, *expert) for expert in self.first] for x, _ in rows]
        layouts = ((0, width, 1), (width, 0, 1), (0, 1, 2), (1, 0, 2)) if gated else ((0, -1, 1),)
        numbers = numbers_of((self.module,))
        functions = [*activations(numbers)]
        for (bounds, up_bounds), (gate, up, step), plus in product(limits, layouts, (0.0, 1.0)):
            for name, alpha, function in functions if up >= 0 or plus == 0 else ():
                gating = Gating(step, *bounds, *up_bounds, plus, alpha)
                # A few outputs first.
                if all(
                    self._fits(w, want[:some], function, gate, up, width, gating, some)
                    for some in (8, rows[0][1].numel())
                    for w, (_, want) in zip(wide, rows, strict=True)
                ):
                    return gate, up, name, gating
        return None

    def _fits(self, wide, want, function, gate, up, width, g: Gating, outputs: int) -> bool:
        total = torch.zeros_like(want)
        span = (width - 1) * g.step + 1
        for columns, share, (weight, bias) in zip(wide, self.shares, self.last, strict=True):
            inner = function(columns[gate : gate + span : g.step].clamp(g.low, g.high))
            if up >= 0:
                others = columns[up : up + span : g.step].clamp(g.up_low, g.up_high)
                inner = inner * (others + g.up_plus)
            bias = None if bias is None else bias[:outputs]
            total += share * F.linear(inner, weight[:outputs], bias)
        return equal(total, want, 2e-3)
