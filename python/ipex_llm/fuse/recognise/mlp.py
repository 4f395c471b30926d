"""The MLP: its linears, gate, clamps and activation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ipex_llm.fuse.describe import Gating, Mlp, Norm
from ipex_llm.fuse.recognise.activations import activations, numbers_in, xielu
from ipex_llm.fuse.recognise.match import Unrecognised, equal, linears, same
from ipex_llm.fuse.recognise.norms import find_norm, readings
from ipex_llm.fuse.trace import Record, Seen


def find_mlp(record: Record, source: torch.Tensor, others: Iterable[str] = ()) -> tuple[Mlp, Seen]:
    """The MLP that reads `source` or a norm of it, and the call of its last linear."""
    others = set(others)
    calls = [c for c in linears(record) if c.name not in others]
    reason = "no linear of the MLP reads the module's input, or a known norm of it"
    for norm, tensor in readings(record, source):
        first = [c for c in calls if same(c.input, tensor)]
        if not first:
            continue
        for last in calls:
            if last in first:
                continue
            inner_norm, found = Norm(), _gate_and_up(record, first, last.input)
            if found is None:
                through = find_norm(record, last.input)
                if through is not None:
                    inner_norm, found = through[0], _gate_and_up(record, first, through[1])
            if found is None:
                reason = "an MLP with an unknown activation or gate"
                continue
            used, gate, up, activation, gating = found
            return (
                Mlp(
                    inputs=[c.name for c in used],
                    output=last.name,
                    width=last.input.shape[-1],
                    gate=gate,
                    up=up,
                    activation=activation,
                    gating=gating,
                    norm=norm,
                    inner_norm=inner_norm,
                ),
                last,
            )
    raise Unrecognised(reason)


@dataclass
class _Part:
    """Columns of a linear that may be a gate or its counterpart."""

    call: Seen
    column: int
    step: int
    values: torch.Tensor  # [rows, width], clamped where the module does so
    low: float = -math.inf
    high: float = math.inf


def _gate_and_up(record: Record, first: list[Seen], target: torch.Tensor):
    """Which of the linears `first` give `target`: (linears, gate, up, activation, Gating)."""
    inner = target.reshape(-1, target.shape[-1])
    width = inner.shape[-1]
    parts = _parts(record, first, *inner.shape)
    if parts is None:
        return None
    for name, alpha, function in activations(numbers_in(record)):
        for gate in parts:
            active = function(gate.values)
            gating = Gating(gate.step, gate.low, gate.high, alpha=alpha)
            if gate.call.output.shape[-1] == width and equal(active, inner):
                return [gate.call], 0, -1, name, gating
            found = _up(parts, gate, active, inner)
            if found is not None:
                return (*found[:-1], name, replace(gating, **found[-1]))
    for call in record.calls if len(record.clamps) == 0 else ():
        for part in parts:
            if call.input.numel() == inner.numel() and same(call.input, part.values):
                found = xielu(record, call)
                active = call.output.reshape(inner.shape)
                if found is None or part.step != 1:
                    continue
                if part.call.output.shape[-1] == width and equal(active, inner):
                    return [part.call], 0, -1, "xielu", found
                pair = _up(parts, part, active, inner)
                if pair is not None:
                    return (*pair[:-1], "xielu", replace(found, **pair[-1]))
    return None


def _parts(record: Record, first: list[Seen], rows: int, width: int) -> list[_Part] | None:
    """Columns of as many as `width`; None where a clamp of as many values is not understood."""
    parts = []
    for call in first:
        if call.output.numel() // call.output.shape[-1] != rows:
            continue
        out = call.output.reshape(rows, -1)
        columns = out.shape[1]
        places = [(c, 1) for c in dict.fromkeys((0, columns - width)) if 0 <= c <= columns - width]
        if columns == 2 * width:
            places += [(0, 2), (1, 2)]
        for column, step in places:
            part = out[:, column : column + (width - 1) * step + 1 : step]
            parts.append(_Part(call, column, step, part))
    for clamp in record.clamps:
        if clamp.input.numel() != rows * width or clamp.input.shape[-1] != width:
            continue
        known = [p for p in parts if torch.equal(clamp.input.reshape(rows, width), p.values)]
        if not known or clamp.bounds is None:
            return None
        for part in known:
            part.low, part.high = clamp.bounds
            part.values = clamp.output.reshape(rows, width)
    return parts


def _up(parts: list[_Part], gate: _Part, active: torch.Tensor, inner: torch.Tensor):
    """(linears, gate column, up column, settings) where `inner` is `active` times another part."""
    width = inner.shape[-1]
    for up in parts:
        if up.step != gate.step or (up.call is gate.call and up.column == gate.column):
            continue
        for plus in (0.0, 1.0):
            if not equal(active * (up.values + plus), inner):
                continue
            settings = {"up_low": up.low, "up_high": up.high, "up_plus": plus}
            if up.call is gate.call:
                return [up.call], gate.column, up.column, settings
            if gate.step == 1 and {width} == {c.output.shape[-1] for c in (gate.call, up.call)}:
                return [gate.call, up.call], 0, width, settings
    return None
